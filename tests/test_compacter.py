"""Compacter: the equation with numpy's Kronecker products, one rule for all layers, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import peftjax as pj
from trees import away
from peftjax.methods.compacter import kronecker
from peftjax.paths import flatten


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), jnp.float32) for n, s in shapes.items()}


X = drawn({"x": (3, 5, 8)}, 1)["x"]
SHAPES = {"up": (8, 6), "down": (6, 8), "bias": (8,)}


def blocks(p, x, join=lambda end, h, r: h + r):
    for end in ("first", "second"):
        h = jnp.tanh(x @ p[end]["up"]) @ p[end]["down"] + p[end]["bias"][None, None]
        x = join(end, h, x)
    return x


PARAMS = {"first": drawn(SHAPES, 2), "second": drawn(SHAPES, 3)}


def hand(z, rule, f):
    """A(z), a term and a row of blocks at a time."""
    dense = lambda l, r: sum(jnp.kron(rule[i], l[i] @ r[i]) for i in range(len(rule)))
    inner = jax.nn.gelu(z @ dense(f["down_left"], f["down_right"]) + f["down_bias"], approximate=False)
    return 1.5 * (inner @ dense(f["up_left"], f["up_right"]) + f["up_bias"])


def test_a_sum_of_kronecker_products():
    rng = np.random.default_rng(0)
    rule, left, right = (rng.standard_normal(s).astype(np.float32) for s in ((2, 2, 2), (2, 3, 2), (2, 2, 5)))
    want = sum(np.kron(rule[i], left[i] @ right[i]) for i in (0, 1))
    np.testing.assert_allclose(kronecker(rule, left, right), want, rtol=1e-5)


@pytest.mark.parametrize("kind", ["compacter", "compacter++"])
def test_the_equation_and_the_one_gradient_of_the_rule(kind):
    """The models' second layer refers to the first one's rule, whose gradient is the sum over both."""
    targets = ("first/down", "second/down")
    method = pj.compacter(kind, bottleneck=4, rank=2, scale=1.5, targets=targets)
    fn = lambda p, x: blocks(p, jnp.sin(x))
    apply, fresh = pj.attach(method, fn, PARAMS, X, key=jax.random.key(0))
    assert fresh["second"]["bias"].rule == pj.Ref("first/bias", "rule", 0)
    tuned = away(fresh)
    flat = pj.extract(tuned)
    assert [k for k in flat if k.endswith("rule")] == ["first/bias/rule"]

    def join(flat):
        def joined(end, h, r):
            f = {k.rpartition("/")[2]: v for k, v in flat.items() if k.startswith(end)}
            a = lambda z: hand(z, flat["first/bias/rule"], f)
            return h + a(h) + r if kind == "compacter" else h + r + a(h + r)

        return joined

    twin = lambda flat: blocks(PARAMS, jnp.sin(X), join(flat))
    with jax.numpy_rank_promotion("allow"):
        want, want_grads = jax.jit(lambda flat: (twin(flat), jax.grad(lambda flat: jnp.sin(twin(flat)).sum())(flat)))(flat)
    np.testing.assert_allclose(apply(tuned, X), want, atol=1e-5 * np.abs(want).max())
    grads = pj.extract(jax.jit(pj.value_and_grad(lambda t: jnp.sin(apply(t, X)).sum()))(tuned)[1])
    assert set(grads) == set(want_grads)
    for key, g in want_grads.items():
        np.testing.assert_allclose(grads[key], g, atol=1e-5 * np.abs(g).max(), err_msg=key)
    np.testing.assert_allclose(apply(pj.disable(tuned), X), fn(PARAMS, X), rtol=1e-6)


def test_stacked_layers_share_the_rule():
    fn, params, args = zoo.MODELS["linen_scan"].make()
    apply, fresh = pj.attach(pj.compacter(bottleneck=4), fn, params, *args, key=jax.random.key(0))
    held = {path: x for path, x in flatten(fresh) if pj.Overlay in type(x).__mro__}
    assert sorted(held) == ["layers/block/attention/out/bias", "layers/block/down/bias"]
    first, second = (held[path] for path in sorted(held))
    assert first.rule.shape == (4, 4, 4) and isinstance(second.rule, pj.Ref)
    assert first.down_left.shape == (3, 4, 4, 1) and not np.array_equal(first.down_left[0], first.down_left[1])
    tuned = away(fresh)
    one = apply(tuned, *args)

    def unrolled(x):  # the same layers, one after the other
        for k in range(3):
            cut = lambda tree: jax.tree.map(lambda w: w[k : k + 1] if w.shape[0] == 3 else w, tree)
            layer = zoo.stack(zoo.Block, layers=1)
            run = pj.wrap(lambda p, x: layer.apply({"params": p}, x))
            x = run(cut(tuned), x)
        return x

    np.testing.assert_allclose(one, unrolled(*args), rtol=1e-5, atol=1e-5)


def test_how_it_starts():
    params = drawn({"up": (768, 8), "down": (8, 768)})
    fn = lambda p, x: jnp.sin(x) + jnp.tanh(jnp.sin(x) @ p["up"]) @ p["down"]
    x = drawn({"x": (2, 768)})["x"]
    apply, tuned = pj.attach(pj.compacter(targets="down"), fn, params, x, key=jax.random.key(0))
    it = tuned["down"]
    assert it.down_left.shape == (4, 192, 1) and it.down_right.shape == (4, 1, 6) and it.down_bias.shape == (24,)
    assert np.abs(it.down_left).max() <= np.sqrt(6 / 193) and not it.up_bias.any() and not it.down_bias.any()
    np.testing.assert_allclose(it.rule.std(), 1e-4, rtol=0.3)
    np.testing.assert_allclose(apply(tuned, x), fn(params, x), atol=1e-6)
    assert pj.count(tuned).trainable == 64 + 4 * (192 + 6) * 2 + 24 + 768


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": "compactor"}, ("kind 'compactor'", "compacter, compacter++")),
        ({"activation": "relu6"}, ("activation 'relu6'",)),
        ({"terms": 0}, ("terms, rank >= 1",)),
        ({"terms": 3}, ("3 terms at first/bias, of 8 features", "multiples of 3")),
        ({"bottleneck": 6}, ("a bottleneck of 6", "multiples of 4")),
        ({"targets": "first/up"}, ("output of first/up is not added to a residual stream",)),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ValueError) as caught:
        kind = {"kind": "compacter++"} if "targets" in options else {}
        fn = lambda p, x: blocks(p, jnp.sin(x))
        pj.attach(pj.compacter(**{"targets": ".*down", **kind, **options}), fn, PARAMS, X, key=jax.random.key(0))
    assert all(word in str(caught.value) for word in words)


def test_it_does_not_merge():
    fn = lambda p, x: blocks(p, jnp.sin(x))
    tuned = pj.attach(pj.compacter(bottleneck=4), fn, PARAMS, X, key=jax.random.key(0))[1]
    with pytest.raises(ValueError, match=r"first/bias \(Compacter\), second/bias \(Compacter\)"):
        pj.merge(tuned)
