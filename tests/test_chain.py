"""Methods in combination: each chain against the model written out with all its parts, on Linen and NNX blocks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covers import some
from flax import nnx

import peftjax as pj
from trees import away
from peftjax.paths import flatten

LAYERS, D, HEADS, VOCABULARY = 2, 8, 2, 11
IDS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 0]])
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])
DENSE = {"query": (D, D), "key": (D, D), "value": (D, D), "out": (D, D), "up": (D, 12), "down": (12, D)}


def attention(q, k, v, mask):
    """Of (batch, tokens, D) arrays, in heads; `mask` (batch, keys)."""
    q, k, v = (x.reshape(*x.shape[:2], HEADS, D // HEADS) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(D // HEADS).astype(np.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None] > 0, scores, -1e9), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], D)


def block(layers, norms, x, mask, post):
    """One block, of functions by name."""
    before, after = (lambda n, x: x, lambda n, x: norms[n](x)) if post else (lambda n, x: norms[n](x), lambda n, x: x)
    y = before("norm_1", x)
    h = layers["out"](attention(layers["query"](y), layers["key"](y), layers["value"](y), mask))
    x = after("norm_1", x + h)
    h = layers["down"](jnp.tanh(layers["up"](before("norm_2", x))))
    return after("norm_2", x + h)


class LinenBlock(nn.Module):
    post: bool

    @nn.compact
    def __call__(self, x, mask):
        layers = {name: nn.Dense(shape[1], name=name) for name, shape in DENSE.items()}
        norms = {name: nn.LayerNorm(name=name) for name in ("norm_1", "norm_2")}
        return block(layers, norms, x, mask, self.post), None


class LinenModel(nn.Module):
    post: bool
    scanned: bool

    @nn.compact
    def __call__(self, input_ids, attention_mask):
        x = nn.Embed(VOCABULARY, D, name="embed")(input_ids)
        if self.scanned:
            scan = nn.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=LAYERS)
            x = scan(self.post, name="layers")(x, attention_mask)[0]
        else:
            for k in range(LAYERS):
                x = LinenBlock(self.post, name=f"layers_{k}")(x, attention_mask)[0]
        return nn.Dense(VOCABULARY, name="head")(x)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        for name, shape in DENSE.items():
            setattr(self, name, nnx.Linear(*shape, rngs=rngs))
        self.norm_1, self.norm_2 = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, x, mask, post):
        norms = {"norm_1": self.norm_1, "norm_2": self.norm_2}
        return block({name: getattr(self, name) for name in DENSE}, norms, x, mask, post)


class NNXModel(nnx.Module):
    def __init__(self, post, rngs):
        self.post = post
        self.embed, self.head = nnx.Embed(VOCABULARY, D, rngs=rngs), nnx.Linear(D, VOCABULARY, rngs=rngs)
        self.layers = nnx.List([NNXBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, ids, mask):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask, self.post)
        return self.head(x)


@functools.cache
def built(model):
    """A model as a function of its parameters, its parameters with biases that are not zero, and its roles."""
    post = "post" in model
    if "nnx" in model:
        graphdef, params = nnx.split(NNXModel(post, nnx.Rngs(0)))
        fn = lambda p, input_ids, attention_mask: nnx.merge(graphdef, p)(input_ids, attention_mask)
    else:
        module = LinenModel(post, "scan" in model)
        params = module.init(jax.random.key(0), IDS, MASK)["params"]
        fn = lambda p, input_ids, attention_mask: module.apply({"params": p}, input_ids, attention_mask)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), params)
    return fn, params, pj.roles(fn, params, IDS, MASK)


def place(model, name, k):
    """The path of a leaf of layer k, and its index in the leaf."""
    if "scan" in model:
        return f"layers/{name}", k
    return (f"layers/{k}/{name}" if "nnx" in model else f"layers_{k}/{name}"), None


# By hand: what each overlay makes of an array, in one layer; `f` is by how much everything is switched on


def fields(flat, path, k):
    """The trained fields of the overlays on a leaf, the innermost first, each in layer k."""
    places = [path + "/base" * n for n in range(3)][::-1]
    cut = lambda x: x if k is None else x[k]
    return [
        {key.rpartition("/")[2]: cut(x) for key, x in flat.items() if key.rpartition("/")[0] == at} for at in places
    ]


def dense(w, f, by):
    """A weight: LoRA of rank 2 and alpha 6, DoRA likewise, IA3 of its outputs or its inputs, or a copy."""
    if "m" in by:
        before, v = jnp.linalg.norm(w, axis=0), w + 3 * f * by["a"] @ by["b"]
        return (before + f * (by["m"] - before)) * v / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
    if "a" in by:
        return w + 3 * f * by["a"] @ by["b"]
    if "vector" in by:
        vector = by["vector"] if len(by["vector"]) == w.shape[-1] else by["vector"][:, None]
        return w * (1 + f * (vector - 1))
    return f * by["value"] + (1 - f) * w if "value" in by else w


def bottleneck(z, by, f):
    return f * by["scale"] * (jnp.maximum(z @ by["down"] + by["down_bias"], 0) @ by["up"] + by["up_bias"])


def twin(model, adapter, params, flat, f, ids, mask):
    """The logits of the model with all that a chain trains written into it; `adapter` is the kind, if there is one."""
    leaves, post = dict(flatten(params)), "post" in model

    def get(path, k=None):
        w = leaves[path] if k is None else leaves[path][k]
        kernel = path.removesuffix("bias") + "kernel"
        for by in fields(flat, path, k):
            w = dense(w, f, by)
        for by in fields(flat, kernel, k) if path.endswith(("key/bias", "value/bias")) else ():
            w = dense(w, f, {n: x for n, x in by.items() if n == "vector"})
        return w

    def of(name, k):
        return lambda x: x @ get(*place(model, f"{name}/kernel", k)) + get(*place(model, f"{name}/bias", k))

    def norm(name, k):
        def run(x):
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
            return x * get(*place(model, f"{name}/scale", k)) + get(*place(model, f"{name}/bias", k))

        return run

    def changed(name, k, h, r, after):
        by = next((by for by in fields(flat, *place(model, f"{name}/bias", k)) if "down" in by), None)
        if by is None:
            return h
        by["scale"] = 4.0 if adapter == "parallel" else 1.0
        return h + bottleneck({"houlsby": h, "pfeiffer": after(h + r), "parallel": r}[adapter], by, f)

    def with_prefix(name, k, y):
        by = next((by for by in fields(flat, *place(model, f"{name}/bias", k)) if "prefix" in by), None)
        rows = None if by is None else jnp.broadcast_to(f * by["prefix"], (len(y), *by["prefix"].shape))
        return y if rows is None else jnp.concatenate([y, rows], 1)

    x, prompt = get("embed/embedding")[ids], flat.get("embed/embedding/prompt")
    if prompt is not None:
        x = jnp.concatenate([x, jnp.broadcast_to(f * prompt, (len(x), *prompt.shape))], 1)
    for k in range(LAYERS):
        first, second = norm("norm_1", k), norm("norm_2", k)
        before, after = ((lambda n, x: x), (lambda n, x: n(x))) if post else ((lambda n, x: n(x)), (lambda n, x: x))
        y = before(first, x)
        keys, values = (with_prefix(name, k, of(name, k)(y)) for name in ("key", "value"))
        seen = jnp.concatenate([mask, jnp.full((len(mask), keys.shape[1] - mask.shape[1]), jnp.where(f > 0, 1, 0))], 1)
        h = of("out", k)(attention(of("query", k)(y), keys, values, seen))
        x = after(first, x + changed("out", k, h, x, lambda s: after(first, s)))
        h = of("down", k)(jnp.tanh(of("up", k)(before(second, x))))
        x = after(second, x + changed("down", k, h, x, lambda s: after(second, s)))
    return x[:, : ids.shape[1]] @ get("head/kernel") + get("head/bias")


lora = lambda *targets: pj.lora(rank=2, alpha=6, targets=targets or "all-linear")
dora = lambda *targets: pj.dora(rank=2, alpha=6, targets=targets)
KEYS = ("key", "value")
CHAINS = {  # the methods, and the kind of adapter among them
    "pfeiffer_lora": ((pj.adapter("pfeiffer", bottleneck=3), lora("query", "value")), "pfeiffer"),
    "lora_houlsby": ((lora(), pj.adapter("houlsby", bottleneck=3)), "houlsby"),
    "mix_and_match": ((pj.prefix(2), pj.adapter("parallel", bottleneck=3)), "parallel"),
    "lora_biases_head": ((lora("query", "up"), pj.bitfit(), pj.head()), None),
    "ia3_lora": ((pj.ia3(KEYS, ("down",)), lora("query", "value", "down")), None),
    "lora_ia3": ((lora("query", "value", "down"), pj.ia3(KEYS, ("down",))), None),
    "lora_dora": ((lora("up", "value"), dora("up", "query")), None),
    "prompt_lora": ((pj.prompt(2, targets="embed"), lora("value", "up")), None),
    "biases_pfeiffer": ((pj.bitfit(), pj.adapter("pfeiffer", bottleneck=3)), "pfeiffer"),
}
MODELS = ("linen_post", "linen_pre_scan", "nnx_post", "linen_pre", "linen_post_scan")
CASES = some([(chain, MODELS[n % 5]) for n, chain in enumerate(CHAINS)], 3, others=pytest.mark.ci)
MORE = [pytest.param(chain, MODELS[(n + 2) % 5], marks=pytest.mark.full) for n, chain in enumerate(CHAINS)]


def wrapped(fn, traces):
    def counted(params, input_ids, attention_mask):
        traces.append(None)
        return fn(params, input_ids, attention_mask)

    return pj.wrap_tokens(counted)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def close(got, want, what="", top=0.0):
    np.testing.assert_allclose(got, want, atol=2e-5 * max(np.abs(want).max(), top), rtol=0, err_msg=what)


@pytest.mark.parametrize("chain, model", CASES + MORE)
def test_a_chain_is_all_its_parts(chain, model, tmp_path):
    (methods, adapter), (fn, params, roles) = CHAINS[chain], built(model)
    method, traces = pj.chain(*methods), []
    tuned = away(method.init(jax.random.key(0), params, roles), by=0.1)  # far away, f32 gradients hang on the order of sums
    flat, apply = pj.extract(tuned), wrapped(fn, traces)
    loss = lambda y: ((jnp.sin(y) * jnp.arange(VOCABULARY, dtype=jnp.float32)[None, None]).sum(), y)
    step = jax.jit(lambda t, f: jax.value_and_grad(lambda t: loss(apply(pj.combine(t, f), IDS, MASK)), has_aux=True)(t))
    run = lambda tuned: step(*pj.partition(tuned))

    @jax.jit
    def by_hand(flat, f):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            of = lambda flat: loss(twin(model, adapter, params, flat, f, IDS, MASK))
            return jax.value_and_grad(of, has_aux=True)(flat)

    (_, got), grads = run(tuned)
    (_, want), want_grads = by_hand(flat, 1.0)
    close(got, want)
    found, top = pj.extract(grads), max(np.abs(g).max() for g in want_grads.values())
    assert set(found) == set(want_grads) == set(flat)
    for key, g in want_grads.items():
        close(found[key], g, key, top / 10)
        assert np.abs(g).max() > 0 or key.endswith("key/bias/value"), key  # which softmax does not see
    before = len(traces)
    close(run(pj.scale(tuned, 0.5))[0][1], by_hand(flat, 0.5)[0][1])
    close(run(pj.disable(tuned))[0][1], fn(params, IDS, MASK))
    pj.save(tmp_path / "adapter", tuned, method, roles)
    loaded = pj.load(tmp_path / "adapter", params, method=method)
    assert jax.tree.structure(loaded) == jax.tree.structure(tuned) and same(loaded, tuned)
    run(away(loaded, seed=1))
    assert len(traces) == before


LOCKED = ("pfeiffer_lora", "lora_houlsby", "mix_and_match", "ia3_lora", "lora_dora", "prompt_lora")


@pytest.mark.parametrize("chain", some(list(LOCKED), 2))
def test_what_is_trained_is_locked_under_what_is_new(chain, tmp_path):
    """The second method starts where the first one ended, and trains alone; a folder keeps which is which."""
    model = MODELS[list(CHAINS).index(chain) % 5]
    ((first, second), adapter), (fn, params, roles) = CHAINS[chain], built(model)
    old = away(first.init(jax.random.key(0), params, roles))
    apply = jax.jit(wrapped(fn, []))
    fresh = second.init(jax.random.key(1), pj.lock(old), roles)
    close(apply(fresh, IDS, MASK), apply(old, IDS, MASK))
    tuned, whole = away(fresh, seed=1), pj.chain(first, second).init(jax.random.key(0), params, roles)
    assert not pj.extract(pj.lock(old)) and set(pj.extract(tuned)) < set(pj.extract(whole))
    # The same arrays in a tree where all train, so that they have names.
    named = pj.extract(jax.tree.unflatten(jax.tree.structure(whole), jax.tree.leaves(tuned)))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        close(apply(tuned, IDS, MASK), twin(model, adapter, params, named, 1.0, IDS, MASK))
    pj.save(tmp_path / "adapter", tuned, pj.chain(first, second), roles)
    loaded = pj.load(tmp_path / "adapter", params)
    assert jax.tree.structure(loaded) == jax.tree.structure(tuned) and same(loaded, tuned)


def test_a_folder_of_what_took_locked_leaves_too(tmp_path):
    """Every linear kernel, those with a locked LoRA too: in a chain where both trained, the second would have left them."""
    _, params, roles = built("linen_pre")
    for first, second in ((lora("query"), lora()), (lora("query"), pj.chain(pj.bitfit(), lora()))):
        below = pj.lock(away(first.init(jax.random.key(0), params, roles)))
        over = away(second.init(jax.random.key(1), below, roles))
        both = away(pj.chain(first, second).init(jax.random.key(0), params, roles))
        assert "layers_0/query/kernel/a" in pj.extract(over) and "layers_0/query/kernel/base/a" not in pj.extract(both)
        for n, tuned in enumerate((over, both, pj.lock(both), pj.lock(over))):
            pj.save(tmp_path / str(n), tuned, pj.chain(first, second), roles)
            loaded = pj.load(tmp_path / str(n), params)
            assert jax.tree.structure(loaded) == jax.tree.structure(tuned) and same(loaded, tuned)
