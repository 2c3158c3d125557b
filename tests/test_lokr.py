"""LoKr: worked numbers of its update, how axes are cut, how it starts, where it is formed, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from jax import lax
from laws import moved
from peftjax.lowrank import factorization
from peftjax.roles import Role, Roles
from zoo import MODELS

KEY = jax.random.key(0)
draw = lambda *shape: np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
linear = lambda p, x: x @ p["w"]


def one(method, w, axes="io", **role):
    """The method on one weight."""
    return method.init(KEY, {"w": w}, Roles({"w": Role("linear", axes, 0, ("dot_general",), **role)}))


def test_the_update_entry_by_entry():
    """dW_ij = s w1_(i / n, j / k) w2_(i mod n, j mod k), w2 = w2b w2a, with s = alpha / rank = 3."""
    w, x = draw(12, 15), draw(2, 12)
    tuned = pj.lokr(rank=2, alpha=6).init(KEY, {"w": w})
    shapes = {k: v.shape for k, v in pj.extract(tuned).items()}
    assert shapes == {"w/w1": (3, 3), "w/w2b": (4, 2), "w/w2a": (2, 5)}
    flat = {k: draw(*shape) for k, shape in shapes.items()}
    tuned, w2, want = pj.insert(tuned, flat), flat["w/w2b"] @ flat["w/w2a"], w.astype(np.float64)
    for i in range(12):
        for j in range(15):
            want[i, j] += 3 * float(flat["w/w1"][i // 4, j // 5]) * float(w2[i % 4, j % 5])
    np.testing.assert_allclose(pj.merge(tuned)["w"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pj.wrap(linear)(tuned, x), x @ want, rtol=1e-5, atol=1e-4)
    assert not pj.explain(linear, tuned, x).merged


def test_whole_matrices_are_krona():
    """Above half of the larger side of w2 both are whole: dW = s kron(w1, w2), with s = alpha / rank as well."""
    w = draw(6, 4)
    tuned = moved(pj.lokr(rank=8, alpha=4).init(KEY, {"w": w}), 0)
    t = tuned["w"]
    assert t.w1.shape == (2, 2) and t.w2.shape == (3, 2) and t.w2a is None
    np.testing.assert_allclose(pj.merge(tuned)["w"], w + 0.5 * np.kron(t.w1, t.w2), rtol=1e-5, atol=1e-6)
    other = {"w": t.replace(outer="w2", w1=draw(3, 2), w2=draw(2, 2))}
    np.testing.assert_allclose(pj.merge(other)["w"], w + 0.5 * np.kron(draw(2, 2), draw(3, 2)), rtol=1e-5, atol=1e-6)


def test_both_may_be_of_low_rank():
    t = moved(pj.lokr(rank=1, factor=8, decompose_both=True).init(KEY, {"w": draw(64, 32)}), 0)["w"]
    assert {n: getattr(t, n).shape for n in ("w1a", "w1b", "w2a", "w2b")} == {
        "w1a": (1, 8), "w1b": (8, 1), "w2a": (1, 4), "w2b": (8, 1)
    }  # fmt: skip
    want = t.base + np.kron(t.w1b @ t.w1a, t.w2b @ t.w2a)
    np.testing.assert_allclose(pj.merge({"w": t})["w"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "size, factor, want",
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (768, -1, (24, 32)),
        (36, 12, (12, 3)),
        (10, 4, (2, 5)),
        (1, -1, (1, 1)),
    ],
)
def test_how_an_axis_is_cut(size, factor, want):
    assert factorization(size, factor) == want


def test_it_starts_at_zero_and_within_its_bounds():
    w = pj.lokr(rank=4, factor=16, decompose_both=True).init(KEY, {"w": np.ones((1024, 1024), np.float32)})["w"]
    for x, fan in ((w.w1b, 16), (w.w2b, 64), (w.w2a, 4)):
        top = np.abs(x).max() * np.sqrt(fan)
        assert 0.8 < top <= 1, top
    assert not np.any(w.w1a) and w.scale == 1
    np.testing.assert_array_equal(pj.merge({"w": w})["w"], np.ones((1024, 1024)))


def test_the_product_is_not_formed():
    """A step of LoKr costs what its small contractions do: 2 rows (m n l + n l k) forward, twice that backward."""
    rows, size = 64, 256  # fewer rows than inputs: the operator is not summed first
    params, x = {"w": draw(size, size)}, draw(rows, size)
    tuned = pj.lokr(rank=16).init(KEY, params)

    def flops(tuned):
        trainable, frozen = pj.partition(tuned)
        loss = lambda t, f: (pj.wrap(linear)(pj.combine(t, f), x) ** 2).sum()
        return jax.jit(jax.grad(loss)).lower(trainable, frozen).compile().cost_analysis()["flops"]

    base, small = 2 * rows * size * size, 2 * rows * 2 * 16**3
    assert flops(tuned) < base + 3 * small + 20 * rows * size
    assert flops(pj.loha(rank=4).init(KEY, params)) > 2 * base


def test_a_convolution_is_the_product_at_every_tap():
    """w2 has the window: dW[y, x] = s kron(w1, w2[y, x]); of a Tucker form w2[y, x] = w2b t2[y, x] w2a."""
    example = MODELS["linen_conv"].make()  # (3, 3, 4, 6)
    roles = pj.roles(example.fn, example.params, *example.args)
    for options in (dict(rank=8), dict(rank=1), dict(rank=1, tucker=True)):
        tuned = moved(pj.lokr(alpha=2, targets="kernel", **options).init(KEY, example.params, roles), 0)
        t = tuned["kernel"]
        if t.tucker:
            assert t.t2.shape == (3, 3, 1, 1) and t.w2b.shape == (2, 1)
            w2 = t.w2b @ t.t2 @ t.w2a
        else:
            w2 = t.w2 if t.w2 is not None else t.w2b @ t.w2a
        assert w2.shape == (3, 3, 2, 3)
        want = [[t.base[i, j] + t.scale * np.kron(t.w1, w2[i, j]) for j in range(3)] for i in range(3)]
        np.testing.assert_allclose(pj.merge(tuned)["kernel"], want, rtol=1e-5, atol=1e-6)


def test_heads_are_cut_where_a_cut_falls_between_or_within_them():
    """Outputs (heads, features) of 4 x 6 are one axis of 24 = 4 x 6; of 2 x 9, 18 = 3 x 6 cuts a head unevenly."""
    project = lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"])
    for heads, merged in (((4, 6), False), ((2, 12), False), ((2, 9), False)):
        w, x = draw(4, *heads), draw(3, 4)
        tuned = moved(one(pj.lokr(rank=9), w, "ioo"), 0)
        t = tuned["w"]
        want = np.reshape(w, (4, -1)) + np.kron(t.w1, t.w2)
        np.testing.assert_allclose(pj.merge(tuned)["w"], want.reshape(w.shape), rtol=1e-5, atol=1e-6)
        got = pj.wrap(project)(tuned, x)
        np.testing.assert_allclose(got.reshape(3, -1), x @ want, rtol=1e-5, atol=1e-5)
        assert bool(pj.explain(project, tuned, x).merged) is merged


def test_several_on_one_weight():
    """The same cut is shared; of other cuts, the product is formed; others stand beside, below and above them."""
    w, x = draw(12, 24), draw(5, 12)
    same, other = pj.lokr(rank=1, alpha=2, targets="w"), pj.lokr(rank=8, factor=2, targets="w")
    beside = (pj.lora(rank=2, targets="w"), pj.dora(rank=2, targets="w"), pj.oft(block_size=3, targets="w"))
    for methods in ((same, same), (same, other), (other, same, *beside), (*beside, same, other)):
        tuned = moved(pj.chain(*methods).init(KEY, {"w": w}), 0)
        np.testing.assert_allclose(pj.wrap(linear)(tuned, x), x @ pj.merge(tuned)["w"], rtol=1e-4, atol=1e-4)
    outer = moved(pj.chain(same, other).init(KEY, {"w": w}), 0)["w"]
    inner = outer.base
    want = w + 2 * np.kron(inner.w1, inner.w2b @ inner.w2a) + np.kron(outer.w1, outer.w2)
    assert inner.w1.shape == (3, 4) and outer.w1.shape == (2, 2)
    np.testing.assert_allclose(pj.merge({"w": outer})["w"], want, rtol=1e-5, atol=1e-5)


def test_layers_of_a_stack_have_their_own():
    w = draw(3, 4, 6)
    stack = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w)[:, :4], None), x, p["w"])[0]
    x = draw(2, 4)
    tuned = moved(one(pj.lokr(rank=9), w, "sio"), 0)
    t = tuned["w"]
    want = [w[k] + np.kron(t.w1[k], t.w2[k]) for k in range(3)]
    np.testing.assert_allclose(pj.merge(tuned)["w"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pj.wrap(stack)(tuned, x), stack({"w": np.stack(want)}, x), rtol=1e-5, atol=1e-5)
    assert not pj.explain(stack, tuned, x).merged


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "lokr: expected a rank of at least 1, found 0"),
        (dict(factor=0), "lokr: factor is a positive number, or -1 for the most even cut; found 0"),
        (dict(outer="w3"), "lokr: unknown outer 'w3'; expected one of w1, w2"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        pj.lokr(**options)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="matches b, which is no kernel"):
        pj.lokr(targets="b").init(KEY, {"b": draw(4)})
