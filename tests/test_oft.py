"""OFT: worked numbers of its turns, where they act, and what it refuses."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest

KEY = jax.random.key(0)
draw = lambda *shape: np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
W, X = draw(6, 5), draw(4, 6)


def linear(p, x):
    return x @ p["w"]


def tuned(upper, w=W, **options):
    return pj.insert(pj.oft(**options).init(KEY, {"w": w}), {"w/upper": np.asarray(upper, np.float32)})


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, atol=atol)


def test_a_block_of_two_is_a_rotation():
    """Q = [[0, v], [-v, 0]]: R = [[1 - v^2, -2 v], [2 v, 1 - v^2]] / (1 + v^2)."""
    v = np.array([0.5, -2, 0.1])
    r = np.zeros((6, 6))
    for k, q in enumerate(v):
        r[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = np.array([[1 - q * q, -2 * q], [2 * q, 1 - q * q]]) / (1 + q * q)
    tree = tuned(v[:, None], block_size=2)
    close(pj.merge(tree)["w"], r @ W)
    close(pj.wrap(linear)(tree, X), X @ r @ W)


def test_the_triangle_is_read_row_by_row():
    a, b, c = 0.3, -0.2, 0.7
    q = np.array([[0, a, b], [-a, 0, c], [-b, -c, 0]])
    r = np.linalg.solve(np.eye(3) + q, np.eye(3) - q)
    tree = tuned([[a, b, c], [0, 0, 0]], rank=2)
    close(pj.merge(tree)["w"], np.concatenate([r @ W[:3], W[3:]]))
    np.testing.assert_array_equal(pj.merge(tree)["w"][3:], W[3:])


def test_lengths_and_angles_between_columns_stay():
    close(pj.merge(tuned(draw(1, 15), rank=1))["w"].T @ pj.merge(tuned(draw(1, 15), rank=1))["w"], W.T @ W, 1e-4)


def test_the_series_is_that_of_the_opposite_turn():
    upper = draw(2, 3) / 30
    exact = np.asarray(pj.merge(tuned(-upper, rank=2))["w"])
    error = lambda terms: np.abs(pj.merge(tuned(upper, rank=2, neumann_terms=terms))["w"] - exact).max()
    assert error(5) < 2e-5 < error(3) < error(2) < 0.1
    q = np.array([[0, 0.5], [-0.5, 0]])
    fourth = np.eye(2) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    close(pj.merge(tuned([[0.5], [0], [0]], block_size=2, neumann_terms=5))["w"][:2], fourth @ W[:2])


def test_one_block_for_all():
    upper = draw(1, 3)
    close(pj.merge(tuned(upper, rank=2, share=True))["w"], pj.merge(tuned(upper[[0, 0]], rank=2))["w"])


def test_the_constraint_is_a_norm_of_each_block():
    """|Q| <= eps / sqrt(blocks), |Q|^2 = 2 sum v^2: of (3, 4) the block is scaled to 1 / sqrt(2), (0, 0.01) stays."""
    upper = np.zeros((2, 3))
    upper[0, :2], upper[1, 1] = (3, 4), 0.01
    inside = upper.copy()
    inside[0] *= 1 / np.sqrt(2) / np.sqrt(2 * 25)
    tree = tuned(upper, rank=2, eps=1.0)
    close(pj.merge(tree)["w"], pj.merge(tuned(inside, rank=2))["w"])
    close(pj.oft(rank=2, eps=1.0).update(tree, None, 0)["w"].upper, inside)
    grads = lambda t: jax.grad(lambda u: pj.wrap(linear)(pj.insert(t, {"w/upper": u}), X).sum())(t["w"].upper)
    close(grads(tree), grads(tuned(inside, rank=2)), 1e-4)
    assert np.isfinite(grads(tuned(0 * upper, rank=2, eps=1.0))).all()


def test_scale_interpolates_and_disable_is_the_base():
    tree = tuned(draw(2, 3), rank=2)
    close(pj.merge(pj.scale(tree, 0.25))["w"], 0.75 * W + 0.25 * pj.merge(tree)["w"])
    np.testing.assert_array_equal(pj.wrap(linear)(pj.disable(tree), X), linear({"w": jnp.asarray(W)}, X))


def test_no_weight_is_formed_nor_its_gradient():
    tree = tuned(draw(3, 1), block_size=2)
    trainable, frozen = pj.partition(tree)
    loss = lambda t: (pj.wrap(linear)(pj.combine(t, frozen), X) ** 2).sum()
    text = jax.jit(jax.grad(loss)).lower(trainable).as_text()
    products = set(re.findall(r"dot_general.*-> tensor<(\w+)xf32>", text))
    assert "4x5" in products and not products & {"6x5", "5x6", "6x6"}, products


def moved(method, fn, params, *args):
    roles = pj.roles(fn, params, *args)
    tree = method.init(KEY, params, roles)
    return pj.insert(tree, {k: x + draw(*x.shape) / 3 for k, x in pj.extract(tree).items()})


def dense_r(upper):
    """R of blocks, as one matrix."""
    b = int(np.sqrt(2 * upper.shape[-1])) + 1
    r = np.zeros((len(upper) * b,) * 2)
    for k, v in enumerate(np.asarray(upper, np.float64)):
        q = np.zeros((b, b))
        q[np.triu_indices(b, 1)] = v
        q -= q.T
        r[k * b : k * b + b, k * b : k * b + b] = np.linalg.inv(np.eye(b) + q) @ (np.eye(b) - q)
    return r


def test_of_a_table_the_features_are_turned():
    table, ids = {"embedding": draw(10, 6)}, np.array([[1, 9], [0, 1]])
    fn = lambda p, ids: p["embedding"][ids]
    tree = moved(pj.oft(rank=2, targets="embedding"), fn, table, ids)
    want = table["embedding"] @ dense_r(tree["embedding"].upper)
    close(pj.wrap(fn)(tree, ids), want[ids])
    close(pj.merge(tree)["embedding"], want)


@pytest.mark.parametrize("window", [(3, 2), (1, 1)])
def test_a_convolution_reads_channels_then_the_window(window):
    conv = nn.Conv(5, window)
    x = draw(2, 6, 6, 4)
    params = conv.init(KEY, x)["params"]
    fn = lambda p, x: conv.apply({"params": p}, x)
    tree = moved(pj.oft(block_size=4, targets="kernel"), fn, params, x)
    k = np.moveaxis(np.asarray(params["kernel"]), 2, 0)  # (in, kh, kw, out)
    want = (dense_r(tree["kernel"].upper) @ k.reshape(-1, 5)).reshape(k.shape)
    close(pj.merge(tree)["kernel"], np.moveaxis(want, 0, 2))
    close(pj.wrap(fn)(tree, x), fn(pj.merge(tree), x), 1e-4)
    assert ("kernel  OFT      merged" in str(pj.explain(fn, tree, x))) == (window != (1, 1))


def test_inputs_of_several_axes_count_as_one():
    """A block of 4 over (2, 6) inputs crosses from the first row into the second."""
    params, x = {"w": draw(2, 6, 5)}, draw(3, 2, 6)
    fn = lambda p, x: jnp.einsum("bhk,hko->bo", x, p["w"])
    tree = moved(pj.oft(block_size=4, targets="w"), fn, params, x)
    want = dense_r(tree["w"].upper) @ params["w"].reshape(12, 5)
    close(pj.wrap(fn)(tree, x), x.reshape(3, 12) @ want)
    assert "merged" not in str(pj.explain(fn, tree, x))


VIEWS = {
    "split inputs": (lambda w: w.reshape(2, 3, 5), "bij,ijo->bo", False),
    "swapped inputs": (lambda w: w.reshape(2, 3, 5).transpose(1, 0, 2), "bij,jio->bo", False),
    "transposed": (lambda w: w.T, "bi,oi->bo", False),
    "half of the outputs": (lambda w: w[:, 1:3], "bi,io->bo", False),
    "half of the inputs": (lambda w: jnp.concatenate([w[2:], w[:2]]), "bi,io->bo", True),
    "the inputs turned round": (lambda w: w[::-1], "bi,io->bo", True),
}


@pytest.mark.parametrize("view", VIEWS)
def test_it_follows_what_the_model_makes_of_a_weight(view):
    change, formula, merges = VIEWS[view]
    x = X.reshape(4, 2, 3) if "ij" in formula else X
    fn = lambda p, x: jnp.einsum(formula, x, change(p["w"]))
    tree = tuned(draw(2, 3), rank=2)
    close(pj.wrap(fn)(tree, x), fn({"w": dense_r(tree["w"].upper) @ W}, x))
    assert ("merged" in str(pj.explain(fn, tree, x))) == merges


def over(first, second):
    fn = lambda p, x: x @ p["w"]
    return moved(pj.chain(first, second), fn, {"w": W}, X), fn


OFT, GAIN = pj.oft(rank=2, targets="w"), pj.ia3((), "w")
NESTED = {
    "ia3 on what a turned weight reads": (OFT, GAIN, lambda one, two: np.diag(two.vector) @ dense_r(one.upper) @ W),
    "turned ia3": (GAIN, OFT, lambda one, two: dense_r(two.upper) @ np.diag(one.vector) @ W),
    "two turns": (
        pj.oft(rank=3, targets="w"),
        OFT,
        lambda one, two: dense_r(two.upper) @ dense_r(one.upper) @ W,
    ),
    "ia3 on outputs": (OFT, pj.ia3("w"), lambda one, two: dense_r(one.upper) @ W @ np.diag(two.vector)),
    "lora beside it": (OFT, pj.lora(rank=2, targets="w"), lambda one, two: dense_r(one.upper) @ W + two.a @ two.b),
    "turned lora": (pj.lora(rank=2, targets="w"), OFT, lambda one, two: dense_r(two.upper) @ (W + one.a @ one.b)),
}


@pytest.mark.parametrize("name", NESTED)
def test_overlays_act_in_the_order_in_which_they_were_laid(name):
    first, second, formula = NESTED[name]
    tree, fn = over(first, second)
    want = formula(tree["w"].base, tree["w"])
    close(pj.merge(tree)["w"], want)
    close(pj.wrap(fn)(tree, X), X @ want)
    assert ("merged" in str(pj.explain(fn, tree, X))) == (name == "ia3 on what a turned weight reads")


@pytest.mark.parametrize(
    "options,words",
    [
        ({"rank": 2, "block_size": 3}, "rank=2 and block_size=3; give one"),
        ({"block_size": 4}, "block_size 4 at w, which is turned along 6 features.*nearest: 2, 3, 6"),
        ({"rank": 6}, "rank 6 at w.*blocks of two features or more .nearest: 1, 2, 3"),
        ({"block_size": 1}, "block_size 1 at w"),
        ({"rank": 0}, "rank 0 at w"),
        ({}, "block_size 32 at w"),
        ({"rank": 2, "neumann_terms": 1}, "at least 2 neumann_terms, found 1"),
        ({"rank": 2, "eps": 0.0}, "positive eps, found 0.0"),
    ],
)
def test_what_it_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        pj.oft(**options).init(KEY, {"w": W})
