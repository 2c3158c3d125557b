"""VeRA: worked numbers of its formula, the matrices that its layers share, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from jax import lax
from peftjax.overlay import Ref
from peftjax.roles import Role, Roles

KEY = jax.random.key(0)
DOWN = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
UP = np.arange(6, dtype=np.float32).reshape(3, 2) / 5
PARAMS = {"down": DOWN, "up": UP}
X = np.array([[1, 2, 0, -1], [0, 1, 1, 3]], np.float32)


def fn(p, x):
    return jnp.tanh(x @ p["down"]) @ p["up"]


def numbers(tuned):
    """The tree with whole numbers in the place of what it drew, and those numbers."""
    a = np.array([[1, 0], [0, 2], [1, 1], [-1, 1]], np.float32)
    b = np.array([[1, 0, 2], [-1, 1, 0]], np.float32)
    vectors = {
        "down/d": np.array([2, -1], np.float32),
        "down/b": np.array([1, 3, 0.5], np.float32),
        "up/d": np.array([1, 0.5], np.float32),
        "up/b": np.array([-2, 1], np.float32),
    }
    tuned = pj.insert(tuned, vectors)
    return {**tuned, "down": tuned["down"].replace(shared_a=jnp.array(a), shared_b=jnp.array(b))}, a, b, vectors


def test_the_formula():
    """W' = W + A[:in] diag(d) B[:, :out] diag(b): the second layer uses the first rows and columns."""
    tuned, a, b, v = numbers(pj.vera(rank=2, targets=("down", "up")).init(KEY, PARAMS))
    down = DOWN + a @ np.diag(v["down/d"]) @ b @ np.diag(v["down/b"])
    up = UP + a[:3] @ np.diag(v["up/d"]) @ b[:, :2] @ np.diag(v["up/b"])
    np.testing.assert_allclose(pj.wrap(fn)(tuned, X), np.tanh(X @ down) @ up, rtol=1e-5)
    merged = pj.merge(tuned)
    np.testing.assert_allclose(merged["down"], down, rtol=1e-6)
    np.testing.assert_allclose(merged["up"], up, rtol=1e-6)
    half = pj.merge(pj.scale(tuned, 0.5))["up"]
    np.testing.assert_allclose(half, (UP + up) / 2, rtol=1e-6)


def test_where_it_starts():
    wide = {"down": np.zeros((400, 300), np.float32), "up": np.zeros((300, 400), np.float32)}
    tuned = pj.vera(rank=64).init(KEY, wide)
    np.testing.assert_array_equal(tuned["up"].d, np.full(64, 0.1, np.float32))
    assert not tuned["up"].b.any()
    a, b = tuned["down"].shared_a, tuned["down"].shared_b
    assert a.shape == (400, 64) and b.shape == (64, 400)
    for x, fan in ((a, 400), (b, 64)):
        assert np.abs(x).max() <= np.sqrt(6 / fan)
        np.testing.assert_allclose(x.std(), np.sqrt(2 / fan), rtol=0.02)


def test_one_pair_of_matrices_that_does_not_train():
    tuned = pj.vera(rank=2, targets=("down", "up")).init(KEY, PARAMS)
    assert tuned["up"].shared_a == Ref("down", "shared_a", 0) and tuned["up"].shared_b == Ref("down", "shared_b", 0)
    assert list(pj.extract(tuned)) == ["down/d", "down/b", "up/d", "up/b"]
    assert pj.count(tuned).trainable == 2 + 3 + 2 + 2


def test_a_folder_keeps_the_matrices(tmp_path):
    method = pj.vera(rank=2, targets=("down", "up"))
    tuned, a, b, _ = numbers(method.init(KEY, PARAMS))
    pj.save(tmp_path / "adapter", tuned, method)
    again = pj.load(tmp_path / "adapter", PARAMS)
    np.testing.assert_array_equal(again["down"].shared_a, a)
    np.testing.assert_array_equal(again["down"].shared_b, b)
    np.testing.assert_array_equal(pj.wrap(fn)(again, X), pj.wrap(fn)(tuned, X))


def test_layers_of_a_stack_share_the_matrices_and_have_their_own_vectors():
    params = {"w": np.stack([DOWN[:3], DOWN[1:]])}
    stack = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    x = X[:, :3]
    tuned = pj.vera(rank=2, targets="w").init(KEY, params, pj.roles(stack, params, x))
    d, b = np.array([[1, 2], [3, -1]], np.float32), np.array([[1, 0, 2], [-1, 1, 1]], np.float32)
    tuned = pj.insert(tuned, {"w/d": d, "w/b": b})
    reads, writes = np.asarray(tuned["w"].shared_a), np.asarray(tuned["w"].shared_b)
    want = x
    for k in range(2):
        want = np.tanh(want @ (params["w"][k] + (reads * d[k][None]) @ writes * b[k][None]))
    np.testing.assert_allclose(pj.wrap(stack)(tuned, x), want, rtol=1e-5)


def test_heads_are_taken_as_one_axis():
    heads = np.zeros((4, 3, 2), np.float32)
    roles = Roles({"w": Role("linear", "ioo", 0, ("dot_general",))})
    tuned = pj.vera(rank=3, targets="w").init(KEY, {"w": heads}, roles)["w"]
    b = np.arange(6, dtype=np.float32).reshape(3, 2)
    want = 0.1 * tuned.shared_a @ tuned.shared_b * b.reshape(1, 6)
    np.testing.assert_allclose(pj.merge({"w": tuned.replace(b=b)})["w"].reshape(4, 6), want, rtol=1e-5)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="rank of at least 1, found 0"):
        pj.vera(rank=0)
    with pytest.raises(ValueError, match="down already holds VeRA"):
        pj.chain(pj.vera(rank=1), pj.vera(rank=1, targets="down")).init(KEY, PARAMS)
    roles = Roles({"w": Role("linear", "?o", 0, ("dot_general",))})
    with pytest.raises(ValueError, match="w has axes '\\?o'; expected a kernel"):
        pj.vera(rank=1, targets="w").init(KEY, {"w": DOWN}, roles)


def test_dropout_drops_what_a_reads():
    """y = x W + x' A diag(d) B diag(b): each entry of x' is that of x, twice or not at all."""
    x = np.ones((1, 4), np.float32)
    tuned = pj.vera(rank=2, dropout=0.5, targets="w").init(KEY, {"w": DOWN})
    tuned = pj.insert(tuned, {"w/d": np.array([2, -1], np.float32), "w/b": np.array([1, 3, 0.5], np.float32)})
    apply, change = pj.wrap(lambda p, x: x @ p["w"]), np.asarray(pj.merge(tuned)["w"]) - DOWN
    dropped = [np.where([b == "1" for b in f"{n:04b}"], 2.0, 0.0) for n in range(16)]
    for seed in range(5):
        got = apply(pj.with_key(tuned, jax.random.key(seed)), x)
        assert min(np.abs(got - (x @ DOWN + d[None] @ change)).max() for d in dropped) < 1e-4
    np.testing.assert_allclose(apply(tuned, x), x @ (DOWN + change), rtol=1e-5)
    with pytest.raises(ValueError, match="dropout is a rate in"):
        pj.vera(dropout=1.0)


def test_over_a_locked_one_and_under_others():
    """Two VeRAs on one leaf, each with its own matrices; and methods that ask for the value of a leaf with references."""
    first = pj.vera(rank=2).init(KEY, PARAMS)
    first = pj.insert(first, {name: x + 0.5 for name, x in pj.extract(first).items()})
    below = pj.merge(first)
    tuned = pj.vera(rank=3).init(jax.random.key(1), pj.lock(first))
    tuned = pj.insert(tuned, {name: x - 0.25 for name, x in pj.extract(tuned).items()})
    plain, whole = pj.vera(rank=3).init(jax.random.key(1), PARAMS), pj.merge(tuned)
    held = next(x for x in tuned.values() if not isinstance(x.shared_a, Ref))
    for path, w in below.items():
        x = tuned[path]
        n_in, n_out = w.shape
        want = w + (held.shared_a[:n_in] * x.d[None]) @ held.shared_b[:, :n_out] * x.b[None]
        np.testing.assert_allclose(whole[path], want, rtol=1e-5)
    assert set(pj.extract(plain)) == set(pj.extract(tuned))
    for over in (pj.dora(rank=1), pj.lora(rank=1, init="pissa")):
        again = pj.merge(over.init(KEY, pj.lock(first)))
        for path, w in below.items():
            np.testing.assert_allclose(again[path], w, rtol=1e-5)
