"""LoReFT: the equation by hand, at chosen positions, orthonormal rows, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import peftjax as pj
from trees import away
from peftjax.methods.reft import orthonormal
from peftjax.paths import flatten


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)


X = drawn(3, 5, 6, seed=1)
PARAMS = {"up": drawn(6, 8), "down": drawn(8, 6, seed=2), "bias": drawn(6)}


def block(p, x, join=lambda h, r: h + r):
    x = jnp.sin(x)
    return join(jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"][None, None], x)


def rows(free):
    """R by Gram and Schmidt, a column at a time."""
    found = []
    for column in free.T:
        for r in found:
            column = column - (column @ r) * r
        found.append(column / jnp.sqrt(column @ column))
    return jnp.stack(found)


def hand(z, f):
    r = rows(f["free"])
    return 1.5 * (z @ f["weight"] + f["bias"] - z @ r.T) @ r


def test_rows_stay_orthonormal_and_vary_smoothly():
    free = drawn(6, 3)
    np.testing.assert_allclose(orthonormal(free).T, rows(free), atol=1e-6)
    np.testing.assert_allclose(orthonormal(free).T @ orthonormal(free), np.eye(3), atol=1e-6)
    np.testing.assert_allclose(orthonormal(rows(free).T), rows(free).T, atol=1e-6)


@pytest.mark.parametrize("where", ["residual", "output"])
def test_the_equation(where):
    method = pj.reft(rank=2, scale=1.5, where=where)
    apply, fresh = pj.attach(method, block, PARAMS, X, key=jax.random.key(0))
    tuned = away(fresh)
    f = {k.rpartition("/")[2]: v for k, v in pj.extract(tuned).items()}
    edit = lambda f: (lambda h, r: h + r + hand(h + r, f)) if where == "residual" else (lambda h, r: h + hand(h, f) + r)
    twin = lambda f: block(PARAMS, X, edit(f))
    with jax.numpy_rank_promotion("allow"):
        want, want_grads = twin(f), jax.grad(lambda f: jnp.sin(twin(f)).sum())(f)
    np.testing.assert_allclose(apply(tuned, X), want, atol=1e-5 * np.abs(want).max())
    grads = pj.value_and_grad(lambda t: jnp.sin(apply(t, X)).sum())(tuned)[1]
    for name, g in want_grads.items():
        np.testing.assert_allclose(getattr(grads["bias"], name), g, atol=1e-5 * np.abs(g).max(), err_msg=name)
    np.testing.assert_allclose(apply(fresh, X), block(PARAMS, X), atol=1e-6)
    np.testing.assert_array_equal(apply(pj.disable(tuned), X), jax.jit(block)(PARAMS, X))


def test_the_edit_is_within_the_subspace():
    """Across the subspace nothing changes; within it, `R z` becomes `W z + b`."""
    apply, fresh = pj.attach(pj.reft(rank=2), block, PARAMS, X, key=jax.random.key(0))
    tuned = away(fresh)
    r, z = rows(tuned["bias"].free), block(PARAMS, X)
    y = apply(tuned, X)
    np.testing.assert_allclose(y @ r.T, z @ tuned["bias"].weight + tuned["bias"].bias[None, None], atol=1e-5)
    np.testing.assert_allclose(y - (y @ r.T) @ r, z - (z @ r.T) @ r, atol=1e-5)


def test_scanned_layers_have_a_subspace_each():
    fn, params, args = zoo.MODELS["nnx_scan"].make()
    apply, fresh = pj.attach(pj.reft(rank=2, init="uniform"), fn, params, *args, key=jax.random.key(0))
    tuned = away(fresh)
    leaves, f = dict(flatten(params)), {k.rpartition("/")[2]: v for k, v in pj.extract(tuned).items()}
    assert f["free"].shape == (3, 8, 2)
    x = args[0]
    with jax.numpy_rank_promotion("allow"):
        for k in range(3):
            at = lambda name: leaves[f"layers/{name}"][k]
            s = x + jnp.tanh(x @ at("up/kernel") + at("up/bias")) @ at("down/kernel") + at("down/bias")
            x = s + hand(s, {n: v[k] for n, v in f.items()}) / 1.5
    np.testing.assert_allclose(apply(tuned, *args), x, atol=1e-5 * np.abs(x).max())
    np.testing.assert_allclose(jax.jit(jax.checkpoint(apply))(tuned, *args), x, atol=1e-5 * np.abs(x).max())


TABLE = drawn(11, 6, seed=3)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))


@pytest.mark.parametrize("positions, chosen", [("f2", [0, 1]), ("l1", [6]), ("f1+l2", [0, 5, 6]), ("f5+l5", range(7))])
@pytest.mark.parametrize("time_major", [False, True])
def test_positions(positions, chosen, time_major):
    def fn(params, input_ids):
        x = params["table"][input_ids]
        y = block(params, jnp.swapaxes(x, 0, 1) if time_major else x)
        return jnp.swapaxes(y, 0, 1) if time_major else y

    params = {**PARAMS, "table": TABLE}
    roles = pj.roles(fn, params, IDS)
    some, every = (
        away(pj.reft(rank=2, positions=p).init(jax.random.key(0), params, roles)) for p in (positions, "all")
    )
    got = pj.wrap_tokens(fn, mask=None)(some, input_ids=IDS)
    want = np.array(fn(params, IDS))
    want[:, list(chosen)] = np.asarray(pj.wrap(fn)(every, IDS))[:, list(chosen)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="bias holds LoReFT.*wrap_tokens"):
        pj.wrap(fn)(some, IDS)


def test_positions_where_tokens_have_no_axis():
    def fn(params, input_ids):
        x = params["table"][input_ids]
        return block(params, x.reshape(1, -1, 6)).reshape(x.shape)

    params = {**PARAMS, "table": TABLE}
    tuned = pj.reft(rank=2, positions="f1").init(jax.random.key(0), params, pj.roles(fn, params, IDS))
    with pytest.raises(ValueError, match="LoReFT.*at bias acts on tokens"):
        pj.wrap_tokens(fn, mask=None)(tuned, input_ids=IDS)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"positions": "first"}, ("positions 'first'", "'f7+l7'")),
        ({"positions": "f0"}, ("positions 'f0'",)),
        ({"positions": "f1+"}, ("positions 'f1+'",)),
        ({"where": "input"}, ("where 'input'", "residual, output")),
        ({"init": "zero"}, ("init 'zero'", "identity, uniform")),
        ({"rank": 0}, ("rank 0 at bias", "1 to 6")),
        ({"rank": 7}, ("rank 7 at bias", "1 to 6")),
        ({"targets": "up"}, ("output of up is not added to a residual stream",)),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError) as caught:
        pj.attach(pj.reft(**options), block, PARAMS, X, key=jax.random.key(0))
    assert all(word in str(caught.value) for word in words)


def test_it_does_not_merge():
    tuned = pj.attach(pj.reft(rank=1), block, PARAMS, X, key=jax.random.key(0))[1]
    with pytest.raises(ValueError, match=r"bias \(LoReFT\)"):
        pj.merge(tuned)
