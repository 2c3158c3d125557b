"""LoHa: worked numbers of its update, how it starts, and what it refuses."""

import jax
import numpy as np
import peftjax as pj
import pytest
from laws import moved
from zoo import MODELS

KEY = jax.random.key(0)
W = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
X = np.array([[1, 2, 0, -1], [0, 1, 1, 3]], np.float32)
draw = lambda *shape: np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
FLAT = {"w/w1a": draw(2, 3), "w/w1b": draw(4, 2), "w/w2a": -draw(2, 3), "w/w2b": draw(4, 2) + 1}


def linear(p, x):
    return x @ p["w"]


def test_the_update_entry_by_entry():
    """dW_ij = s (sum_r w1b_ir w1a_rj) (sum_r w2b_ir w2a_rj), with s = alpha / rank = 3."""
    tuned = pj.insert(pj.loha(rank=2, alpha=6).init(KEY, {"w": W}), FLAT)
    want = W.astype(np.float64)
    for i in range(4):
        for j in range(3):
            first = sum(float(FLAT["w/w1b"][i, r]) * float(FLAT["w/w1a"][r, j]) for r in range(2))
            second = sum(float(FLAT["w/w2b"][i, r]) * float(FLAT["w/w2a"][r, j]) for r in range(2))
            want[i, j] += 3 * first * second
    np.testing.assert_allclose(pj.merge(tuned)["w"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pj.wrap(linear)(tuned, X), X @ want, rtol=1e-5, atol=1e-4)


def test_it_starts_at_zero_and_within_its_bounds():
    w = pj.loha(rank=4).init(KEY, {"w": np.ones((64, 9), np.float32)})["w"]
    for x, fan in ((w.w1a, 4), (w.w2a, 4), (w.w1b, 64)):
        top = np.abs(x).max() * np.sqrt(fan)
        assert 0.8 < top <= 1, top
    assert not np.any(w.w2b) and not np.array_equal(w.w1a, w.w2a) and w.scale == 1
    np.testing.assert_array_equal(pj.merge({"w": w})["w"], np.ones((64, 9)))


def test_a_convolution_is_the_matrix_of_its_taps():
    """(kh, kw, in, out) as (kh kw in, out)."""
    example = MODELS["linen_conv"].make()
    roles = pj.roles(example.fn, example.params, *example.args)
    tuned = moved(pj.loha(rank=2, alpha=1, targets="kernel").init(KEY, example.params, roles), 0)
    k = tuned["kernel"]
    flat = lambda b, a: np.reshape(b, (36, 2)) @ np.reshape(a, (2, 6))
    assert k.axes == "iiio" and k.w1b.shape == (3, 3, 4, 2)
    delta = flat(k.w1b, k.w1a) * flat(k.w2b, k.w2a) / 2
    np.testing.assert_allclose(pj.merge(tuned)["kernel"], k.base + delta.reshape(3, 3, 4, 6), rtol=1e-5, atol=1e-6)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="rank 4 at w .*expected 1 to 3"):
        pj.loha(rank=4).init(KEY, {"w": W})
    with pytest.raises(ValueError, match="matches b, which is no kernel"):
        pj.loha(targets="b").init(KEY, {"b": W[0]})
