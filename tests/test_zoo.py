"""The models themselves: they run, alike with and without jit, and every leaf that the table lists matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covers import some

from zoo import MODELS, arrays_only, path_of, paths


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if is_float(x)]


@pytest.mark.parametrize("name", some(list(MODELS), 12))
def test_model(name):
    model = MODELS[name]
    example = model.make()
    fn, args = arrays_only(example)

    leaves, tree = jax.tree.flatten(example.params)
    where = [i for i, x in enumerate(leaves) if is_float(x)]

    def loss(values):
        full = list(leaves)
        for i, value in zip(where, values):
            full[i] = value
        out = fn(jax.tree.unflatten(tree, full), *args)
        return jnp.sum((out[0] if "state" in model.tags else out).astype(jnp.float32)), floats(out)

    values = [leaves[i] for i in where]
    if "forward_only" in model.tags:
        (value,) = values  # one leaf, pushed forward in one direction, stands for its gradient
        _, slope, found = jax.jvp(lambda x: loss([x]), (value,), (jnp.ones_like(value),), has_aux=True)
        grads = [jnp.full_like(value, slope)]
    else:
        grads, found = jax.jit(jax.grad(loss, has_aux=True))(values)
    assert found and all(np.isfinite(np.asarray(x, np.float64)).all() for x in found)
    names = [path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(example.params)[0]]
    by_path = {names[i]: g for i, g in zip(where, grads)}
    for path, axes in model.axes.items():
        gradient = np.asarray(by_path[path], np.float64)
        assert gradient.ndim == len(axes)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 1e-3, f"{path} does not matter"


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_eager_is_jitted(name):
    model = MODELS[name]
    example = model.make()
    fn, args = arrays_only(example)
    eager, jitted = fn(example.params, *args), jax.jit(fn)(example.params, *args)
    assert floats(eager)
    for a, b in zip(floats(eager), floats(jitted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=(2e-2 if "bf16" in model.tags else 1e-5) * np.abs(a).max(), rtol=0)


def test_numbers_are_the_same_each_time():
    first, second = (MODELS["pre_norm_encoder"].make() for _ in range(2))
    for (path, a), (_, b) in zip(paths(first.params), paths(second.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
