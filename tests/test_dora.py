"""DoRA: worked numbers of `m V / |V|`, its switches and its cost."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from jax import lax
from peftjax.roles import Role, Roles

from experiments.bench.step import steps
from experiments.models import bert

KEY = jax.random.key(0)


def data(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


W, X, BIAS = data(4, 3), data(5, 4), data(3)


def one(method, w=W, axes="io"):
    op = "linear" if len(w.shape) == 2 else "conv"
    return method.init(KEY, {"w": w}, Roles({"w": Role(op, axes, 0, ("dot_general",))}))["w"]


def away(tuned, seed=3):
    moved = {n: jnp.asarray(np.asarray(getattr(tuned, n)) + data(*getattr(tuned, n).shape, seed=seed)) for n in "abm"}
    return tuned.replace(**moved)


def by_hand(t, read, s=3.0, f=1.0):
    """The tuned weight, in numpy: `f` moves the product and the magnitude together."""
    norm = lambda v: np.sqrt((v**2).sum(read, keepdims=True))
    w, a, b, m = (np.asarray(x, np.float64) for x in (t.base, t.a, t.b, t.m))
    v = w + f * s * np.tensordot(a, b, 1)
    magnitude = norm(w) + f * (np.expand_dims(m, read) - norm(w))
    return magnitude * v / norm(v)


@pytest.mark.parametrize("bias", [0, BIAS])
def test_linear(bias):
    """y = (m / |V|) (x V) + b: the bias is not scaled."""
    t = away(one(pj.dora(rank=2, alpha=6, targets="w")))
    got = pj.wrap(lambda p, x: x @ p["w"] + jnp.broadcast_to(bias, (5, 3)))({"w": t}, X)
    np.testing.assert_allclose(got, X @ by_hand(t, 0) + bias, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(pj.merge({"w": t})["w"], by_hand(t, 0), rtol=2e-5, atol=1e-5)


def test_by_hand():
    """W = I, A B turns the first output by (0, 1): V = [[1, 0], [1, 1]], |V| = (sqrt 2, 1); magnitudes 2 and 3."""
    t = one(pj.dora(rank=1, targets="w"), np.eye(2, dtype=np.float32))
    np.testing.assert_array_equal(t.m, [1, 1])
    t = t.replace(a=jnp.array([[0.0], [1]]), b=jnp.array([[1.0, 0]]), m=jnp.array([2.0, 3]))
    want = [[2 / np.sqrt(2), 0], [2 / np.sqrt(2), 3]]
    np.testing.assert_allclose(pj.merge({"w": t})["w"], want, rtol=1e-6)


def test_convolution():
    """The norm of an output channel runs over the window and the input channels."""
    t = away(one(pj.dora(rank=2, alpha=6, targets="w"), data(3, 2, 4, 6), "iiio"))
    conv = lambda p, x: lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = data(2, 5, 5, 4)
    assert t.m.shape == (6,) and not pj.explain(conv, {"w": t}, x).merged
    want = conv({"w": by_hand(t, (0, 1, 2)).astype(np.float32)}, x)
    np.testing.assert_allclose(pj.wrap(conv)({"w": t}, x), want, rtol=2e-5, atol=2e-5)


def test_embedding():
    """The norm of an embedding dimension runs over the vocabulary, for the lookup and for a tied head."""
    ids, table = np.array([0, 6, 2]), data(7, 4)
    tied = lambda p, ids: p["w"][ids] @ p["w"].T
    tuned = pj.dora(rank=2, alpha=6, targets="w").init(KEY, {"w": table}, pj.roles(tied, {"w": table}, ids))
    t = away(tuned["w"])
    want = by_hand(t, 0)
    assert t.m.shape == (4,) and not pj.explain(tied, {"w": t}, ids).merged
    np.testing.assert_allclose(pj.wrap(tied)({"w": t}, ids), want[ids] @ want.T, rtol=5e-5, atol=5e-5)


def test_gradients_treat_the_norm_as_constant():
    """dm = x V / |V|; dB = (m / |V|) s A^T x: for one input and one output."""
    t = away(one(pj.dora(rank=1, alpha=3, targets="w"), data(4, 1)))
    grads = pj.value_and_grad(lambda p, x: pj.wrap(lambda p, x: x @ p["w"])(p, x).sum())({"w": t}, X[:1])[1]["w"]
    v = np.asarray(t.base + 3 * t.a @ t.b)
    norm = np.linalg.norm(v)
    np.testing.assert_allclose(grads.m, (X[:1] @ v)[0] / norm, rtol=1e-5)
    np.testing.assert_allclose(grads.b, float(t.m[0]) / norm * 3 * np.asarray(t.a).T @ X[:1].T, rtol=1e-5)


@pytest.mark.parametrize("factor", [0, 0.5, 1, 2])
def test_scale_moves_magnitude_and_direction(factor):
    t = away(one(pj.dora(rank=2, alpha=6, targets="w")))
    got = pj.merge(pj.scale({"w": t}, factor))["w"]
    np.testing.assert_allclose(got, by_hand(t, 0, f=factor), rtol=3e-5, atol=1e-5)


def test_disabled_it_is_the_base_in_every_bit():
    t = away(one(pj.dora(rank=2, targets="w")))
    np.testing.assert_array_equal(pj.merge(pj.disable({"w": t}))["w"], W)
    both = pj.chain(pj.lora(rank=1, targets="w"), pj.dora(rank=2, targets="w")).init(KEY, {"w": W})["w"]
    both = away(both).replace(base=both.base.replace(b=jnp.ones_like(both.base.b)))
    np.testing.assert_array_equal(pj.merge(pj.disable({"w": both}))["w"], W)


def test_on_another_overlay_the_norm_is_that_of_both():
    t = pj.chain(pj.lora(rank=1, targets="w"), pj.dora(rank=2, alpha=6, targets="w")).init(KEY, {"w": W})["w"]
    t = away(t).replace(base=t.base.replace(b=jnp.ones_like(t.base.b)))
    assert t.norm is None
    below = t.replace(base=np.asarray(W + t.base.a @ t.base.b))
    np.testing.assert_allclose(pj.merge({"w": t})["w"], by_hand(below, 0), rtol=3e-5, atol=1e-5)


def test_a_column_of_zeros_stays_zero_and_can_move():
    w = W * np.array([[1, 0, 1]], np.float32)
    t = one(pj.dora(rank=2, targets="w"), w)
    np.testing.assert_array_equal(pj.merge({"w": t})["w"], w)
    grads = pj.value_and_grad(lambda p: pj.wrap(lambda p: (X @ p["w"]).sum())(p))({"w": t})[1]["w"]
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)) and bool(grads.b[:, 1].any())


def test_dropout_reads_the_dropped_input_beside_the_base():
    """y = x W + (g - 1) x' W + g s x' A B: all of what x' adds comes from x' alone."""
    t = away(one(pj.dora(rank=2, alpha=6, targets="w", dropout=0.5)))
    apply = pj.wrap(lambda p, x: x @ p["w"])
    x = np.ones((1, 4), np.float32)
    change = by_hand(t, 0) - W
    dropped = [np.where([b == "1" for b in f"{n:04b}"], 2.0, 0.0) for n in range(16)]
    could = [x @ W + d[None] @ change for d in dropped]
    for seed in range(5):
        got = apply(pj.with_key({"w": t}, jax.random.key(seed)), x)
        assert min(np.abs(got - y).max() for y in could) < 1e-4
    np.testing.assert_allclose(apply({"w": t}, x), x @ by_hand(t, 0), rtol=3e-5, atol=1e-5)


def test_layers_that_are_left_out_keep_their_weights():
    stack = data(3, 4, 3)
    t = away(one(pj.dora(rank=2, targets="w", layers=(0, 2)), stack, "sio"))
    merged = np.asarray(pj.merge({"w": t})["w"])
    np.testing.assert_array_equal(merged[1], stack[1])
    assert np.abs(merged[[0, 2]] - stack[[0, 2]]).min(axis=(1, 2)).shape == (2,) and t.m.shape == (3, 3)
    assert (np.abs(merged - stack).max(axis=(1, 2)) > 0.1).tolist() == [True, False, True]


def test_fields_are_float32_on_bfloat16():
    t = one(pj.dora(rank=2, targets="w"), jnp.asarray(W, jnp.bfloat16))
    assert {getattr(t, n).dtype for n in ("a", "b", "m", "norm")} == {jnp.dtype("float32")}
    np.testing.assert_allclose(t.m, np.linalg.norm(np.asarray(t.base, np.float32), axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=4), "dora: rank 4 at w.*expected 1 to 3"),
        (dict(init="svd"), "dora: unknown init 'svd'; expected one of kaiming"),
        (dict(dropout=1.0), "dora: dropout is a rate in \\[0, 1\\), found 1.0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        one(pj.dora(targets="w", **options))


def scanned(step, tokens=2048, width=384, layers=6):
    """XLA's count of a step of residual layers under a scan."""
    params = {"up": data(layers, width, 4 * width) / 20, "down": data(layers, 4 * width, width) / 40}
    body = lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None)
    fn = lambda params, x: lax.scan(body, x, params)[0]
    x = jax.ShapeDtypeStruct((tokens, width), "float32")
    apply, tuned = pj.attach(step, fn, params, x, key=KEY)
    trainable, frozen = pj.partition(tuned)
    grad = jax.grad(lambda t, f, x: (apply(pj.combine(t, f), x) ** 2).sum())
    return jax.jit(grad).lower(trainable, frozen, x).compile().cost_analysis()["flops"]


def test_a_scanned_step_costs_little_more_than_loras():
    assert scanned(pj.dora(rank=8, targets="up|down")) <= 1.15 * scanned(pj.lora(rank=8, targets="up|down"))


class Block(nn.Module):
    """A layer of BERT as a step of a scan."""

    config: bert.Config

    @nn.compact
    def __call__(self, x, mask):
        return bert.Layer(self.config, name="layer")(x, mask, False), None


def scanned_bert(method, layers=6, width=384):
    """XLA's count of a step of BERT's layers under `nn.scan`; it counts a loop's body once, so the loop is unrolled."""
    config = bert.Config(8, width, layers, 12, 4 * width, 8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=layers, unroll=layers)
    stack = nn.scan(Block, in_axes=nn.broadcast, **options)(config)
    fn = lambda params, x, mask: stack.apply({"params": params}, x, mask)[0]
    x, mask = jnp.ones((16, 128, width)), jnp.ones((16, 128))
    types = jax.eval_shape(stack.init, KEY, x, mask)["params"]
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), types)
    apply, tuned = pj.attach(method, fn, params, x, mask, key=KEY)
    trainable, frozen = pj.partition(tuned)
    assert len(pj.extract(tuned)) >= 6 * 2 and not pj.explain(fn, tuned, x, mask).merged
    grad = jax.grad(lambda t, f: (apply(pj.combine(t, f), x, mask) ** 2).sum())
    return jax.jit(grad).lower(trainable, frozen).compile().cost_analysis()["flops"]


@pytest.mark.ci
@pytest.mark.third_party
def test_a_step_of_a_scanned_bert_costs_little_more_than_loras():
    lora, dora = (scanned_bert(make(rank=8, alpha=16, targets=".*kernel")) for make in (pj.lora, pj.dora))
    assert lora > 6 * 1.5e10  # of every layer, not of one
    assert dora <= 1.15 * lora


@pytest.mark.full
@pytest.mark.third_party
def test_a_step_of_bert_costs_little_more_than_loras():
    made = steps(("lora", "dora"))
    lora, dora = made["lora"].cost, made["dora"].cost
    assert dora.flops <= 1.15 * lora.flops
    assert dora.temp_bytes <= 1.15 * lora.temp_bytes


def test_norms_are_those_of_the_base_as_it_is_stored():
    """A model that computes in bfloat16 casts its kernel; the norms, the magnitude and what training does to it do not."""
    w = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    fn = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    tuned = pj.dora(rank=2).init(jax.random.key(0), {"w": w})
    own, cast = (np.linalg.norm(x.astype(np.float64), axis=0) for x in (w, np.asarray(jnp.asarray(w, jnp.bfloat16))))
    np.testing.assert_allclose(tuned["w"].m, own, rtol=1e-6)
    assert np.abs(cast / own - 1).max() > 1e-5
    for x in (tuned["w"].m, tuned["w"].norm, *tuned["w"].norms()):
        assert x.dtype == jnp.float32
    traced = jax.make_jaxpr(pj.wrap(fn))(tuned, np.ones((3, 64), np.float32))
    roots = [eqn for eqn in equations(traced.jaxpr) if eqn.primitive.name == "sqrt"]
    assert roots and {eqn.invars[0].aval.dtype for eqn in roots} == {jnp.dtype("float32")}
    assert traced.out_avals[0].dtype == jnp.bfloat16


def equations(jaxpr):
    """Those of a program and of its regions."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            yield from equations(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else ()
