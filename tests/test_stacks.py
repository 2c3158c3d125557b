"""Several overlays of outputs on one leaf: the order in which they act, at the output and at the residual add, by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import USUAL
from covers import some

import peftjax as pj
from peftjax.methods.reft import orthonormal


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), jnp.float32) for n, s in shapes.items()}


X = drawn({"x": (3, 5, 8)}, 1)["x"]
SHAPES = {"up": (8, 6), "down": (6, 8), "bias": (8,)}
PARAMS = {"first": drawn(SHAPES, 2), "second": drawn(SHAPES, 3), "g": drawn({"g": (8,)}, 4)["g"] + 1}
ENDS = {"first": "first/down", "second": "second/bias"}


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["g"][None, None]


def model(p, x, post, join=lambda end, h, r: h + r):
    """Two layers, the second one with a bias and something linear after it; the norm after each sum, or before."""
    x = jnp.sin(x)
    for end in ("first", "second"):
        h = jnp.tanh((x if post else norm(p, x)) @ p[end]["up"]) @ p[end]["down"]
        h = h + p[end]["bias"][None, None] if end == "second" else h
        s = join(end, h, x)
        x = norm(p, s) if post else s
    return x


def away(tuned, seed=0):
    rng = np.random.default_rng(seed)
    return pj.insert(
        tuned, {k: v + 0.3 * rng.standard_normal(v.shape).astype(np.float32) for k, v in pj.extract(tuned).items()}
    )


# What each does, by hand: `h` of the output, or `h` and the stream `r`, give a new h.


def bottleneck(z, f):
    if "rule" in f:
        dense = lambda l, r: sum(jnp.kron(f["rule"][i], l[i] @ r[i]) for i in range(2))
        inner = jax.nn.gelu(z @ dense(f["down_left"], f["down_right"]) + f["down_bias"], approximate=False)
        return 1.5 * (inner @ dense(f["up_left"], f["up_right"]) + f["up_bias"])
    return 1.5 * f.get("gate", 1.0) * (jnp.maximum(z @ f["down"] + f["down_bias"], 0) @ f["up"] + f["up_bias"])


def edit(z, f):
    basis = orthonormal(f["free"])
    return (z @ f["weight"] + f["bias"] - z @ basis) @ basis.T


def adapter(kind):
    return pj.adapter(kind, bottleneck=3, scale=1.5, targets=".*down")


COMPACTER = pj.compacter("compacter++", bottleneck=4, terms=2, scale=1.5, targets=".*down")
METHODS = {
    "houlsby": (adapter("houlsby"), lambda h, r, f, after: h + bottleneck(h, f)),
    "pfeiffer": (adapter("pfeiffer"), lambda h, r, f, after: h + bottleneck(after(h + r), f)),
    "parallel": (adapter("parallel"), lambda h, r, f, after: h + bottleneck(r, f)),
    "scaled_parallel": (adapter("scaled_parallel"), lambda h, r, f, after: h + bottleneck(r, f)),
    "compacter": (COMPACTER, lambda h, r, f, after: h + bottleneck(after(h + r), f)),
    "reft": (pj.reft(2, targets=".*down"), lambda h, r, f, after: h + edit(h + r, f)),
    "reft_output": (pj.reft(2, where="output", targets=".*down"), lambda h, r, f, after: h + edit(h, f)),
}


def fields(flat, path):
    """The fields of the overlays on a leaf, the innermost first."""
    depth = max(k.count("/base") for k in flat) + 1
    at = ["/".join([path, *["base"] * k]) for k in reversed(range(depth))]
    own = [{k.rpartition("/")[2]: v for k, v in flat.items() if k.rpartition("/")[0] == place} for place in at]
    rules = ["/".join([ENDS["first"], *["base"] * k, "rule"]) for k in reversed(range(depth))]
    return [{**f, "rule": flat[rule]} if rule in flat else f for f, rule in zip(own, rules)]


def twin(names, flat, post, x=X):
    """The model with the overlays written into it: those of the output first, then those of the sum."""

    def join(end, h, r):
        found = list(zip(names, fields(flat, ENDS[end]), strict=True))
        after = (lambda s: norm(PARAMS, s)) if post else (lambda s: s)
        for name, f in sorted(found, key=lambda pair: pair[0] != "reft_output"):
            h = METHODS[name][1](h, r, f, after)
        return h + r

    with jax.numpy_rank_promotion("allow"):
        return model(PARAMS, x, post, join)


def close(got, want, what="", top=0.0):
    np.testing.assert_allclose(got, want, atol=1e-5 * max(np.abs(want).max(), top), rtol=0, err_msg=what)


PAIRS = [
    *((("pfeiffer", x)) for x in ("pfeiffer", "houlsby", "parallel", "reft", "reft_output")),
    *(((x, "pfeiffer")) for x in ("houlsby", "scaled_parallel", "reft", "reft_output")),
    ("compacter", "compacter"),
    ("reft_output", "houlsby"),
    ("parallel", "reft"),
]


@pytest.mark.parametrize("names, post", some([(names, post) for names in PAIRS for post in (False, True)], 13))
def test_one_over_another(names, post):
    """Values and the gradients of both; under a lock those of the upper one alone, and nothing else changes."""
    fn = lambda p, x: model(p, x, post)
    method = pj.chain(*(METHODS[name][0] for name in names))
    apply, fresh = pj.attach(method, fn, PARAMS, X, key=jax.random.key(0))
    tuned = away(fresh)
    flat = pj.extract(tuned)
    step = jax.jit(pj.value_and_grad(lambda t: (jnp.sin(y := apply(t, X)).sum(), y), has_aux=True))
    theirs = jax.jit(jax.value_and_grad(lambda flat: (jnp.sin(y := twin(names, flat, post)).sum(), y), has_aux=True))
    (_, got), grads = step(tuned)
    (_, want), want_grads = theirs(flat)
    close(got, want)
    found = pj.extract(grads)
    assert set(found) == set(want_grads)
    top = max(np.abs(g).max() for g in want_grads.values())
    for key, g in want_grads.items():
        close(found[key], g, key, top / 10)
    locked = pj.lock(tuned)
    assert not pj.extract(locked)
    upper = METHODS[names[1]][0].init(jax.random.key(1), pj.lock(METHODS[names[0]][0].init(
        jax.random.key(0), PARAMS, roles := pj.roles(fn, PARAMS, X))), roles)  # fmt: skip
    assert set(pj.extract(upper)) == {k for k in flat if "/base/" not in k}


@pytest.mark.ci
def test_three_in_order():
    """Each order of three is its own function, and what is explained names all of them."""
    fn = lambda p, x: model(p, x, True)
    found = []
    for names in itertools.permutations(("pfeiffer", "houlsby", "reft")):
        method = pj.chain(*(METHODS[name][0] for name in names))
        apply, fresh = pj.attach(method, fn, PARAMS, X, key=jax.random.key(0))
        tuned = away(fresh)
        found.append(apply(tuned, X))
        close(found[-1], twin(names, pj.extract(tuned), True))
    assert all(np.abs(x - y).max() > 1e-3 for x, y in itertools.combinations(found, 2))
    events = [(e.path, e.overlay, e.how) for e in pj.explain(fn, tuned, X)]
    kinds = [{"pfeiffer": "Adapter", "houlsby": "Adapter", "reft": "LoReFT"}[name] for name in names]
    assert events == [(p, k, how) for p in ENDS.values() for how in ("acted", "met the residual") for k in kinds]


def test_a_trained_adapter_under_a_new_one():
    """The new one starts where the trained one ended, trains alone, and both are switched by their scales."""
    fn = lambda p, x: model(p, x, True)
    roles = pj.roles(fn, PARAMS, X)
    first = away(METHODS["pfeiffer"][0].init(jax.random.key(0), PARAMS, roles))
    traces = []
    apply = pj.wrap(lambda p, x: traces.append(None) or fn(p, x))
    run = jax.jit(apply, compiler_options=USUAL)
    before = run(first, X)
    tuned = METHODS["pfeiffer"][0].init(jax.random.key(1), pj.lock(first), roles)
    np.testing.assert_array_equal(run(tuned, X), before)
    n = len(traces)
    trained = away(tuned)
    assert set(pj.extract(trained)) == {k for k in pj.extract(first)}
    names = ("pfeiffer", "pfeiffer")
    both = {**pj.extract(trained), **{k.replace("down/", "down/base/").replace("bias/", "bias/base/", 1): v
                                     for k, v in pj.extract(first).items()}}  # fmt: skip
    close(run(trained, X), twin(names, both, True))
    close(run(pj.disable(trained), X), fn(PARAMS, X))
    half = {k: v * 0.5 if k.rpartition("/")[2] in ("up", "up_bias") else v for k, v in both.items()}
    close(run(pj.scale(trained, 0.5), X), twin(names, half, True))
    assert len(traces) == n


def test_virtual_rows_and_changes_of_the_output_act_in_turn():
    """A prefix over an edit of the same output overwrites it at the virtual positions; the other way it is edited too."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {n: jax.random.normal(k, (4, 4), jnp.float32) for n, k in zip(("key", "value", "table"), keys)}

    def fn(p, ids):
        x = p["table"][ids]
        weights = jax.nn.softmax(x @ jnp.swapaxes(x @ p["key"], -1, -2))
        return weights @ (x @ p["value"])

    ids = jnp.array([[0, 1, 3], [2, 2, 1]])
    roles = pj.roles(fn, params, ids)
    reft, prefix = pj.reft(2, where="output", targets="value"), pj.prefix(2, targets=("key", "value"))
    run = pj.wrap_tokens(fn, ids="ids", mask=None, side="last")
    for order in ((reft, prefix), (prefix, reft)):
        tuned = away(pj.chain(*order).init(jax.random.key(0), params, roles))
        flat = {k.replace("base/", ""): v for k, v in pj.extract(tuned).items()}
        f = {k.partition("/")[2]: v for k, v in flat.items() if k.startswith("value")}
        with jax.numpy_rank_promotion("allow"):
            x = params["table"][ids]
            rows = [jnp.broadcast_to(flat[f"{name}/prefix"], (2, 2, 4)) for name in ("key", "value")]
            k = jnp.concatenate([x @ params["key"], rows[0]], 1)
            changed = lambda z: z + edit(z, f)
            own = changed(x @ params["value"])
            v = jnp.concatenate([own, changed(rows[1]) if order[1] is reft else rows[1]], 1)
            close(run(tuned, ids), jax.nn.softmax(x @ jnp.swapaxes(k, -1, -2)) @ v)
