"""Models of Equinox and of Haiku, as their own users write them."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covers import covered

import peftjax as pj

pytestmark = pytest.mark.third_party


class Block(eqx.Module):
    """A convolution and attention over what it gives, of one example."""

    conv: eqx.nn.Conv1d
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv1d(3, 8, 3, padding=1, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
        self.norm, self.out = eqx.nn.LayerNorm(8), eqx.nn.Linear(8, 5, key=keys[2])

    def __call__(self, x):
        h = self.conv(x).T
        h = jax.vmap(self.norm)(h + self.attention(h, h, h))
        return self.out(h.mean(0))


def equinox():
    params, static = eqx.partition(Block(jax.random.key(0)), eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


def haiku():
    def model(x):
        h = hk.Conv1D(8, 3, data_format="NCW", name="conv")(x).swapaxes(1, 2)
        h += hk.MultiHeadAttention(2, 4, model_size=8, w_init=hk.initializers.VarianceScaling(1.0), name="attention")(h, h, h)
        h = hk.LayerNorm(-1, True, True, name="norm")(h)
        return hk.Linear(5, name="out")(h.mean(1))

    net = hk.without_apply_rng(hk.transform(model))
    return net.apply, net.init(jax.random.key(0), jnp.zeros((1, 3, 6)))


METHODS = [pj.lora(rank=2), pj.chain(pj.ia3(targets="all-linear"), pj.layer_norm())]


@pytest.mark.parametrize("framework, method", covered([equinox, haiku], METHODS, at=(0,)))
def test_models_of_other_frameworks(framework, method, tmp_path):
    (fn, params), x = framework(), jax.random.normal(jax.random.key(1), (4, 3, 6))
    report = pj.check(method, fn, params, x)
    assert report.ok, report
    apply, tuned = pj.attach(method, fn, params, x, key=jax.random.key(2))
    trainable, frozen = pj.partition(tuned)
    loss = lambda trainable, frozen: (apply(pj.combine(trainable, frozen), x) ** 2).sum()
    before, grads = jax.jit(jax.value_and_grad(loss))(trainable, frozen)
    moved = pj.combine(jax.tree.map(lambda t, g: t - 1e-2 * g, trainable, grads), frozen)
    assert loss(*pj.partition(moved)) < before
    kernels = [path for path, role in pj.roles(fn, params, x).items() if role.op in ("linear", "conv")]
    assert len(kernels) == 6
    pj.save(tmp_path / "adapter", moved, method)
    loaded = pj.load(tmp_path / "adapter", params, pj.roles(fn, params, x))
    merged = pj.merge(loaded)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(fn(merged, x), apply(moved, x), rtol=1e-4, atol=1e-6)
