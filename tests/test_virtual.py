"""Virtual tokens against attention with real keys and values, in every kind of model; and what the wrapper refuses."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covers import covered, some
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from zoo import MODELS

import peftjax as pj
from peftjax import token_insert
from peftjax.overlay import layers
from peftjax.paths import flatten

KEY, VOCAB, D, DEPTH, N = jax.random.key(0), 11, 8, 2, 3
IDS = np.array([[1, 4, 2, 9, 3], [7, 7, 5, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
NAMES = ("query", "key", "value", "out")


def weights(bias=False):
    """Parameters of a small model: words, and layers with or without biases."""
    keys = iter(jax.random.split(jax.random.key(1), 99))
    draw = lambda *shape: 0.5 * jax.random.normal(next(keys), shape, jnp.float32)
    module = lambda: {"kernel": draw(D, D), **({"bias": draw(D)} if bias else {})}
    blocks = {f"layers_{i}": {name: module() for name in NAMES} for i in range(DEPTH)}
    return {"words": draw(VOCAB, D), **blocks}


def attend(q, k, v, mask, causal):
    """Masked attention; queries stand at the end of the keys."""
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / np.sqrt(D).astype(np.float32)
    seen = mask[:, None].astype(bool)
    if causal:
        places = jnp.arange(k.shape[1])[None] <= jnp.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        seen = seen & places[None]
    return jax.nn.softmax(jnp.where(seen, scores, -1e9), -1) @ v


def linear(p, x):
    y = x @ p["kernel"]
    return y + p["bias"][None, None] if "bias" in p else y


def block(p, x, mask, causal):
    q, k, v = (linear(p[name], x) for name in NAMES[:3])
    return x + linear(p["out"], attend(q, k, v, mask, causal))


def reference(params, ids, mask, causal, rows=None, prefixes=None):
    """The same model with real keys and values, or real embeddings, before the tokens."""
    x = params["words"][ids]
    wide = jnp.concatenate([jnp.ones((len(ids), N), mask.dtype), mask], 1)
    if rows is not None:
        x, mask = jnp.concatenate([jnp.broadcast_to(rows, (len(ids), *rows.shape)), x], 1), wide
    for i in range(DEPTH):
        p = params[f"layers_{i}"]
        q, k, v = (linear(p[name], x) for name in NAMES[:3])
        if prefixes is not None:
            k, v = (jnp.concatenate([jnp.broadcast_to(y, (len(ids), N, D)), z], 1) for y, z in zip(prefixes[i], (k, v)))
        x = x + linear(p["out"], attend(q, k, v, mask if prefixes is None else wide, causal))
    return x if rows is None else x[:, N:]


def plain(causal, bias=False):
    def fn(params, input_ids, attention_mask):
        x = params["words"][input_ids]
        for i in range(DEPTH):
            x = block(params[f"layers_{i}"], x, attention_mask, causal)
        return x

    return fn, weights(bias)


def stacked(params):
    return {
        "words": params["words"],
        "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *(params[f"layers_{i}"] for i in range(DEPTH))),
    }


def scanned(causal, bias=False, remat=False):
    def fn(params, input_ids, attention_mask):
        step = lambda x, p: (block(p, x, attention_mask, causal), None)
        return jax.lax.scan(jax.checkpoint(step) if remat else step, params["words"][input_ids], params["layers"])[0]

    return fn, stacked(weights(bias))


class Block(nn.Module):
    causal: bool

    @nn.compact
    def __call__(self, x, mask):
        q, k, v = (nn.Dense(D, use_bias=False, name=name)(x) for name in NAMES[:3])
        return x + nn.Dense(D, use_bias=False, name="out")(attend(q, k, v, mask, self.causal))


class Model(nn.Module):
    causal: bool
    lift: str = ""

    @nn.compact
    def __call__(self, ids, mask):
        x = self.param("words", nn.initializers.normal(), (VOCAB, D))[ids]
        if self.lift == "scan":
            body = lambda module, x, _: (module(x, mask), None)
            return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)(
                Block(self.causal, name="layers"), x, None
            )[0]
        for i in range(DEPTH):
            lifted = {"remat": nn.remat, "jit": nn.jit}.get(self.lift, lambda module: module)
            x = lifted(Block)(self.causal, name=f"layers_{i}")(x, mask)
        return x


def linen(causal, lift=""):
    model, params = Model(causal, lift), weights()
    fn = lambda params, input_ids, attention_mask: model.apply({"params": params}, input_ids, attention_mask)
    return fn, stacked(params) if lift == "scan" else params


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.query, self.key, self.value, self.out = (nnx.Linear(D, D, use_bias=False, rngs=rngs) for _ in NAMES)

    def __call__(self, x, mask, causal):
        return x + self.out(attend(self.query(x), self.key(x), self.value(x), mask, causal))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.words = nnx.Param(jnp.zeros((VOCAB, D), jnp.float32))
        self.layers_0, self.layers_1 = NNXBlock(rngs), NNXBlock(rngs)


def of_nnx(causal):
    graph, state = nnx.split(NNXModel(nnx.Rngs(0)))
    values = {path: x for path, x in flatten(weights())}
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    state = jax.tree.unflatten(tree, [values[pj.paths.path_of(where)] for where, _ in leaves])

    def fn(state, input_ids, attention_mask):
        model = nnx.merge(graph, state)
        x = model.words[...][input_ids]
        for layer in (model.layers_0, model.layers_1):
            x = layer(x, attention_mask, causal)
        return x

    return fn, state


BUILDERS = {
    "plain": plain,
    "bias": functools.partial(plain, bias=True),
    "scan": scanned,
    "scan_bias": functools.partial(scanned, bias=True),
    "scan_remat": functools.partial(scanned, remat=True),
    "linen": linen,
    "linen_scan": functools.partial(linen, lift="scan"),
    "linen_remat": functools.partial(linen, lift="remat"),
    "linen_jit": functools.partial(linen, lift="jit"),
    "nnx": of_nnx,
}


def drawn(tuned, seed=5):
    """The tree with large trained values."""
    rng = np.random.default_rng(seed)
    return pj.insert(tuned, {k: rng.standard_normal(x.shape).astype(np.float32) for k, x in pj.extract(tuned).items()})


def prefixes_of(tuned, bias):
    """What a tree's prefixes are, for each layer."""
    flat, leaf = pj.extract(tuned), "bias" if bias else "kernel"
    if f"layers/key/{leaf}/prefix" in flat:
        return [[flat[f"layers/{name}/{leaf}/prefix"][i] for name in ("key", "value")] for i in range(DEPTH)]
    return [[flat[f"layers_{i}/{name}/{leaf}/prefix"] for name in ("key", "value")] for i in range(DEPTH)]


def close(got, want, mask=MASK):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    mask = np.asarray(mask).reshape(*mask.shape, *(1,) * (got.ndim - mask.ndim))
    assert (np.abs(got - want) * mask).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name, placed", covered(list(BUILDERS), [(False, "first"), (True, "first"), (False, "last")], at=(0, 4, 8)))
def test_a_prefix_is_real_keys_and_values_whatever_ids_stand_there(name, placed, monkeypatch):
    """A causal model cannot see what comes last."""
    causal, side = placed
    fn, params = BUILDERS[name](causal)
    apply, tuned = pj.attach(pj.prefix(N), fn, params, IDS, MASK, key=KEY, tokens={"side": side})
    tuned = drawn(tuned)
    want = reference(weights("bias" in name), IDS, MASK, causal, prefixes=prefixes_of(tuned, "bias" in name))
    close(apply(tuned, IDS, MASK), want)
    monkeypatch.setattr(token_insert, "FILLER", 6)
    np.testing.assert_array_equal(pj.wrap_tokens(fn, side=side)(tuned, IDS, MASK), apply(tuned, IDS, MASK))
    close(apply(pj.disable(tuned), IDS, MASK), fn(params, IDS, MASK))


@pytest.mark.parametrize("name, causal", covered(list(BUILDERS), [False, True], at=range(0, 10, 3)))
def test_a_prompt_is_real_embeddings(name, causal):
    fn, params = BUILDERS[name](causal)
    apply, tuned = pj.attach(pj.prompt(N), fn, params, IDS, MASK, key=KEY, tokens={})
    tuned = drawn(tuned)
    close(
        apply(tuned, IDS, MASK),
        reference(weights("bias" in name), IDS, MASK, causal, rows=pj.extract(tuned)["words/prompt"]),
    )
    close(apply(pj.disable(tuned), IDS, MASK), fn(params, IDS, MASK))
    close(pj.wrap(fn)(pj.settle(tuned), IDS, MASK), fn(params, IDS, MASK))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_one_function_serves_sequences_of_any_length(kind):
    fn, params = plain(True)
    apply, tuned = pj.attach(METHODS[kind], fn, params, IDS, MASK, key=KEY, tokens={})
    tuned = drawn(tuned)
    for n in (5, 7, 3):
        ids, mask = (np.resize(x, (2, n)) for x in (IDS, np.ones_like(MASK)))
        close(apply(tuned, ids, mask), pj.wrap_tokens(fn)(tuned, ids, mask), mask)


def test_the_side_follows_the_mask_of_the_model():
    for causal in (False, True):
        fn, params = plain(causal)
        tuned = drawn(pj.prefix(N).init(KEY, params, pj.roles(fn, params, IDS, MASK)))
        both = [pj.wrap_tokens(fn, side=side)(tuned, IDS, MASK) for side in ("auto", "first" if causal else "last")]
        np.testing.assert_array_equal(*both)


METHODS = {
    "prompt": pj.prompt(N),
    "p_tuning": pj.p_tuning(N, 4),
    "prefix": pj.prefix(N),
    "deep_prefix": pj.prefix(N, hidden=4),
}


LIFTED = ("plain", "linen_scan", "nnx", "scan_remat", "scan_bias", "linen", "linen_remat", "linen_jit")


def tuned_plain(kind, causal=True, name="plain"):
    fn, params = BUILDERS[name](causal)
    apply, tuned = pj.attach(METHODS[kind], fn, params, IDS, MASK, key=KEY, tokens={})
    return fn, params, apply, tuned


@pytest.mark.parametrize("kind, name", covered(list(METHODS), LIFTED, at=range(4)))
def test_the_laws_of_trees(kind, name, tmp_path):
    """Stripping, the flat and the saved form, one trace, what moves, merging, and folding."""
    fn, params, _, fresh = tuned_plain(kind, name=name)
    tuned = drawn(fresh)
    assert all(x is y for x, y in zip(jax.tree.leaves(pj.strip(tuned)), jax.tree.leaves(params), strict=True))
    traces = []
    apply = pj.wrap_tokens(lambda *args, **kwargs: traces.append(None) or fn(*args, **kwargs), side="first")
    run = jax.jit(lambda tuned: apply(tuned, input_ids=IDS, attention_mask=MASK))
    outs, before = [run(tuned)], len(traces)
    outs += [run(t) for t in (drawn(fresh, 6), pj.scale(tuned, 0.5), pj.disable(tuned))]
    assert len(traces) == before and all((outs[0] != out).any() for out in outs[1:])
    trainable, frozen = pj.partition(tuned)
    total = lambda t: (apply(pj.combine(t, frozen), input_ids=IDS, attention_mask=MASK) ** 2).sum()
    grads = jax.jit(jax.grad(total))(trainable)
    assert all(bool(g.any()) for g in jax.tree.leaves(grads))
    tx = pj.train_only(optax.sgd(0.1), tuned)
    everywhere = pj.combine(grads, jax.tree.map(jnp.ones_like, frozen))
    after = optax.apply_updates(tuned, tx.update(everywhere, tx.init(tuned), tuned)[0])
    kept = zip(jax.tree.leaves(pj.partition(after)[1]), jax.tree.leaves(frozen), strict=True)
    assert all((np.asarray(x) == y).all() for x, y in kept)
    pj.save(tmp_path / "adapter", tuned, METHODS[kind], pj.roles(fn, params, IDS, MASK))
    loaded = pj.load(tmp_path / "adapter", params)
    np.testing.assert_array_equal(run(loaded), outs[0])
    with pytest.raises(ValueError, match=f"{'key/(kernel|bias)' if 'prefix' in kind else 'words'} .*settle"):
        pj.merge(tuned)
    if kind in ("p_tuning", "deep_prefix"):
        folded = pj.fold(tuned)
        close(run(folded), outs[0])
        assert len(pj.extract(folded)) == (1 if kind == "p_tuning" else 2 if "scan" in name else 2 * DEPTH)
    else:
        with pytest.raises(ValueError, match="no overlay has a network"):
            pj.fold(tuned)


@pytest.mark.parametrize("name, kind", covered(LIFTED, ["prompt", "prefix"], at=(0, 3, 7)))
def test_gradients_are_those_of_real_rows(name, kind):
    fn, params, apply, tuned = tuned_plain(kind, name=name)
    trainable, frozen = pj.partition(drawn(tuned))
    weigh = np.random.default_rng(0).standard_normal((2, 5, D)).astype(np.float32) * MASK[..., None]
    got = jax.jit(jax.grad(lambda t: (apply(pj.combine(t, frozen), IDS, MASK) * weigh).sum()))(trainable)

    def loss(flat):
        tree = pj.insert(drawn(tuned), flat)
        given = {"prefixes": prefixes_of(tree, "bias" in name)} if kind == "prefix" else {"rows": flat["words/prompt"]}
        return (reference(weights("bias" in name), IDS, MASK, True, **given) * weigh).sum()

    want = jax.grad(loss)(pj.extract(drawn(tuned)))
    top = max(float(jnp.abs(x).max()) for x in want.values())
    for key, x in pj.extract(pj.combine(got, frozen)).items():
        np.testing.assert_allclose(x, want[key], atol=1e-5 * top, err_msg=key)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", some(list(LIFTED), len(LIFTED)))
def test_many_adapters_in_one_batch_and_eight_devices(kind, name):
    fn, params, apply, fresh = tuned_plain(kind, name=name)
    trees = [drawn(fresh, seed) for seed in (1, 2)]
    frozen = pj.partition(fresh)[1]
    both = jax.tree.map(lambda *xs: jnp.stack(xs), *(pj.partition(t)[0] for t in trees))
    run = jax.jit(jax.vmap(lambda t, ids, mask: apply(pj.combine(t, frozen), ids[None], mask[None])[0]))
    got = run(both, IDS, MASK)
    for k, tree in enumerate(trees):
        close(got[k][None], apply(tree, IDS[k : k + 1], MASK[k : k + 1]), MASK[k : k + 1])
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    split = jax.tree.map(lambda x: place(x, *(None,) * (x.ndim - 1), "model"), params)
    tuned = METHODS[kind].init(KEY, split, pj.roles(fn, params, IDS, MASK))
    close(jax.jit(apply)(drawn(tuned), place(IDS, "data"), place(MASK, "data")), apply(drawn(fresh), IDS, MASK))
    for path, x in flatten(tuned):
        for overlay in layers(x):
            for field in {"prompt", "prefix", "w3"} & set(overlay.kinds):
                if field != "prefix" or "prefix" in overlay.trained_fields:
                    assert getattr(overlay, field).sharding.spec[-1] == "model", (path, field)


# Pooling


def pooled(pool):
    body, params = plain(False)

    def fn(params, input_ids, attention_mask, pool_mask=None, labels=None):
        return pool(body(params, input_ids, attention_mask), input_ids, attention_mask, pool_mask, labels)

    return fn, params


def mean(x, mask):
    mask = mask[..., None].astype(x.dtype)
    return (x * mask).sum(1) / mask.sum(1)


POOLS = {
    "mean": lambda x, i, m, p, y: mean(x, m),
    "einsum": lambda x, i, m, p, y: jnp.einsum("btd,bt->bd", x, m.astype(x.dtype)),
    "max": lambda x, i, m, p, y: x.max(1),
    "first": lambda x, i, m, p, y: x[:, 0],
    "last": lambda x, i, m, p, y: x[:, -1],
    "index": lambda x, i, m, p, y: jnp.take_along_axis(x, (m.sum(1) - 1)[:, None, None], 1)[:, 0],
    "last_id": lambda x, i, m, p, y: jnp.where((i == 3).any(1, keepdims=True), x[:, 1], x[:, 2]),
}
SEEN = {"mean": "reduce_sum", "einsum": "dot_general", "max": "reduce_max", "index": "gather.*index"}


@pytest.mark.parametrize("pool, placed", covered(list(POOLS), list(itertools.product(["prompt", "prefix"], ["first", "last"]))))
def test_pooling_that_would_see_virtual_rows_raises(pool, placed):
    kind, side = placed
    fn, params = pooled(POOLS[pool])
    tuned = drawn(METHODS[kind].init(KEY, params, pj.roles(fn, params, IDS, MASK)))
    run = lambda **options: pj.wrap_tokens(fn, side=side, **options)(tuned, IDS, MASK)
    if pool == {"first": "last", "last": "first"}[side]:
        assert run().shape == (2, D)
        return
    with pytest.raises(ValueError, match=f"depend on (what stands|virtual).*{SEEN.get(pool, '')}"):
        run()
    assert run(check=False).shape == (2, D)


@pytest.mark.parametrize("pool", ["mean", "einsum", "where"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_mask_without_virtual_rows_pools_real_ones(pool, kind):
    pools = {
        "mean": lambda x, i, m, p, y: mean(x, p),
        "einsum": lambda x, i, m, p, y: jnp.einsum("btd,bt->bd", x, p.astype(x.dtype)),
        "where": lambda x, i, m, p, y: jnp.where(p[..., None] > 0, x, -1e9).max(1),
    }
    fn, params = pooled(pools[pool])
    tuned = drawn(METHODS[kind].init(KEY, params, pj.roles(fn, params, IDS, MASK, MASK)))
    got = pj.wrap_tokens(fn, side="last", pool_mask="pool_mask")(tuned, IDS, MASK, MASK)
    rows = pj.wrap_tokens(plain(False)[0], side="last")(tuned, IDS, MASK)
    np.testing.assert_allclose(got, pools[pool](rows, IDS, MASK, MASK, None), rtol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_loss_masked_by_labels_counts_real_rows(kind):
    def loss(x, ids, mask, pool_mask, labels):
        logits, real = x @ jnp.ones((D, 4), jnp.float32), labels != -100
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, labels, 0))
        return (losses * real.astype(jnp.float32)).sum() / real.sum().astype(jnp.float32)

    fn, params = pooled(loss)
    labels = np.where(MASK, IDS % 4, -100)
    tuned = drawn(METHODS[kind].init(KEY, params, pj.roles(fn, params, IDS, MASK, None, labels)))
    got = pj.wrap_tokens(fn)(tuned, IDS, MASK, labels=labels)
    rows = pj.wrap_tokens(plain(False)[0])(tuned, IDS, MASK)
    np.testing.assert_allclose(got, loss(rows, IDS, MASK, None, labels), rtol=1e-5)


def test_a_loss_that_shifts_labels_needs_to_drop_the_first():
    body, params = plain(True)

    def fn(params, input_ids, attention_mask, labels):
        x, labels = body(params, input_ids, attention_mask)[:, :-1], labels[:, 1:]
        return ((x**2).sum(-1) * (labels != -100).astype(x.dtype)).sum()

    labels = np.where(MASK, IDS, -100)
    tuned = drawn(pj.prefix(N).init(KEY, params, pj.roles(fn, params, IDS, MASK, labels)))
    with pytest.raises(ValueError, match="depend on what stands"):
        pj.wrap_tokens(fn)(tuned, IDS, MASK, labels)
    got = pj.wrap_tokens(fn, drop_first_label=True)(tuned, IDS, MASK, labels)
    x = pj.wrap_tokens(body)(tuned, IDS, MASK)
    np.testing.assert_allclose(
        got, ((x[:, :-1] ** 2).sum(-1) * (labels[:, 1:] != -100).astype(np.float32)).sum(), rtol=1e-5
    )


def test_layers_without_a_prefix_raise():
    fn, params = plain(False)
    tuned = pj.prefix(N, targets="layers_0/(key|value)").init(KEY, params, pj.roles(fn, params, IDS, MASK))
    with pytest.raises(ValueError, match="depend on what stands at virtual positions.*every attention"):
        pj.wrap_tokens(fn)(tuned, IDS, MASK)


# What raises, and what arguments may look like


def test_a_plain_wrap_names_the_wrapper():
    fn, params, _, tuned = tuned_plain("prefix")
    with pytest.raises(ValueError, match="layers_0/key/kernel holds Prefix.*wrap_tokens"):
        pj.wrap(fn)(tuned, IDS, MASK)
    assert {e.how for e in pj.explain(pj.wrap_tokens(fn), tuned, IDS, MASK)} == {"acted"}


@pytest.mark.parametrize(
    "options, args, message",
    [
        ({"mask": "padding"}, (IDS, MASK), "mask='padding'.*found none.*mask=None"),
        ({"ids": "inputs"}, (IDS, MASK), "ids='inputs'.*found none; closest: input_ids"),
        ({"side": "left"}, (IDS, MASK), "side='left'; expected"),
        ({}, (IDS.astype(np.float32), MASK), "input_ids is float32.*expected integers"),
        ({}, (IDS, MASK[:, :3]), r"attention_mask has shape \(2, 3\); expected 5"),
        ({}, (IDS, 2 * MASK), "attention_mask holds .*expected 1 where"),
        ({}, ([1, 2], MASK), "input_ids'?.*expected"),
    ],
)
def test_arguments_that_do_not_fit_raise(options, args, message):
    fn, _, _, tuned = tuned_plain("prompt")
    with pytest.raises(ValueError, match=message):
        pj.wrap_tokens(fn, **options)(tuned, *args)


def placed(table, **extra):
    body, params = plain(True)

    def fn(params, input_ids, attention_mask, position_ids=None, **kwargs):
        places = jnp.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        rows = jnp.take(params["places"], places, axis=0, mode="clip")
        return body(params, input_ids, attention_mask) + rows

    return fn, {**params, "places": jnp.ones((table, D), jnp.float32)}


def test_positions_go_on_and_short_tables_raise():
    places = np.broadcast_to(np.arange(5), (2, 5))
    for table, given in ((7, None), (7, places), (8, None), (8, places)):
        fn, params = placed(table)
        roles = pj.roles(fn, params, IDS, MASK, given)
        with pytest.raises(ValueError, match="words.*places|places.*words"):
            pj.prompt(N).init(KEY, params, roles)
        tuned = pj.prompt(N, targets="words").init(KEY, params, roles)
        if table == 8:
            assert pj.wrap_tokens(fn)(tuned, IDS, MASK, given).shape == (2, 5, D)
            continue
        with pytest.raises(ValueError, match="position 7 is looked up in a table of 7"):
            pj.wrap_tokens(fn)(tuned, IDS, MASK, given)


@pytest.mark.parametrize("begin", [0, 2])
def test_virtual_positions_begin_where_the_real_ones_did(begin):
    """At 0, or at 2 as RoBERTa's; and virtual tokens have the type 0. By sums over a row."""
    rng = np.random.default_rng(0)
    table, places, kinds = (rng.standard_normal((n, D)).astype(np.float32) for n in (10, 20, 2))
    params, n = {"words": table, "places": places, "kinds": kinds}, 3
    masks = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    # One position for all padding, as decoders and RoBERTa have it.
    positions = np.where(masks == 1, np.cumsum(masks, 1) - 1 + begin, 1)
    types = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])

    def fn(params, input_ids, attention_mask, position_ids, token_type_ids):
        x = params["words"][input_ids] + params["places"][position_ids] + params["kinds"][token_type_ids]
        return jnp.cumsum(x * attention_mask[..., None].astype(x.dtype), 1)

    tuned = pj.prompt(n, targets="words").init(KEY, params, pj.roles(fn, params, IDS, masks, positions, types))
    got = pj.wrap_tokens(fn, side="first", types="token_type_ids")(tuned, IDS, masks, positions, types)
    virtual = np.asarray(tuned["words"].prompt) + places[begin : begin + n] + kinds[:1]
    real = table[IDS] + places[positions + n] + kinds[types]
    close(got, virtual.sum(0) + np.cumsum(real * masks[..., None], 1), masks)


@pytest.mark.parametrize("side, shift", [("first", False), ("last", True)])
def test_positions_that_the_model_makes_itself_are_not_shifted_in_silence(side, shift):
    fn, params = placed(20)
    tuned = pj.prefix(N).init(KEY, params, pj.roles(fn, params, IDS, MASK))
    with pytest.raises(ValueError, match=f"shift={shift} with virtual tokens {side} needs the tokens' positions"):
        pj.wrap_tokens(fn, side=side, shift=shift)(tuned, IDS, MASK)
    assert pj.wrap_tokens(fn, side=side, shift=not shift, check=False)(tuned, IDS, MASK).shape == (2, 5, D)


def test_a_table_that_other_ids_read_raises():
    fn, params = placed(9)
    tuned = pj.prompt(N, targets="places").init(KEY, params, pj.roles(fn, params, IDS, MASK))
    with pytest.raises(ValueError, match="places is looked up by something else"):
        pj.wrap_tokens(fn)(tuned, IDS, MASK)


def test_a_table_may_be_looked_up_by_other_ids_too():
    fn, params = plain(True)
    tuned = drawn(pj.prompt(N).init(KEY, params, pj.roles(fn, params, IDS, MASK)))
    beside = lambda params, input_ids, attention_mask: (
        fn(params, input_ids, attention_mask) + params["words"][np.array([[3]])] + params["words"][input_ids]
    )
    want = fn(params, IDS, MASK) + params["words"][np.array([[3]])] + params["words"][IDS]
    close(pj.wrap_tokens(beside)(pj.disable(tuned), IDS, MASK), want)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_rows_are_followed_through_stacks_and_tiles(kind):
    fn, params = plain(True)

    def stacked(params, input_ids, attention_mask):
        x = jnp.stack([fn(params, input_ids, attention_mask)] * 2, -1)
        wide = jnp.tile(attention_mask[..., None], (1, 1, 4 * D))
        return jnp.tile(x.reshape(*x.shape[:2], -1), (1, 1, 2)) + wide.astype(x.dtype)

    tuned = drawn(METHODS[kind].init(KEY, params, pj.roles(fn, params, IDS, MASK)))
    want = np.tile(np.repeat(pj.wrap_tokens(fn)(tuned, IDS, MASK), 2, -1), (1, 1, 2)) + MASK[..., None]
    close(pj.wrap_tokens(stacked)(tuned, IDS, MASK), want)
    pooled = lambda params, input_ids, attention_mask: jnp.stack(
        [stacked(params, input_ids, attention_mask).max(1)] * 2
    )
    with pytest.raises(ValueError, match="depend on .*virtual.*reduce_max"):
        pj.wrap_tokens(pooled)(tuned, IDS, MASK)


def test_packed_sequences_raise():
    fn, params = placed(20)
    tuned = pj.prompt(N, targets="words").init(KEY, params, pj.roles(fn, params, IDS, MASK))
    with pytest.raises(ValueError, match="position_ids restarts"):
        pj.wrap_tokens(fn)(tuned, IDS, MASK, np.array([[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]))
    with pytest.raises(ValueError, match="segment_ids says that sequences are packed"):
        pj.wrap_tokens(fn)(tuned, IDS, MASK, segment_ids=IDS)


ROWS = np.broadcast_to(np.arange(5), (2, 5))
PACKED = {
    "positions restart": ({"position_ids": np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])}, [1]),
    "positions stand still": ({"position_ids": np.array([[0, 1, 2, 2, 3], [0, 1, 2, 3, 4]])}, [0]),
    "numbers of segments": ({"attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 2]])}, [1]),
    "what is added": ({"attention_mask": np.where(MASK, 0, -1e9).astype(np.float32)}, [1]),
    "both": ({"attention_mask": 3 * MASK, "position_ids": 0 * ROWS}, [0, 1]),
    "positions of all": ({"position_ids": np.array([[0, 1, 0, 1, 2]])}, [0, 1]),
}


def of_positions(kind):
    fn, params = placed(20)
    call = {"input_ids": IDS, "attention_mask": np.ones_like(MASK), "position_ids": ROWS}
    method = pj.prompt(N, targets="words") if kind == "prompt" else METHODS[kind]
    tuned = drawn(method.init(KEY, params, pj.roles(fn, params, **call)))
    return fn, tuned, call


@pytest.mark.parametrize("said, kind", covered(list(PACKED), ["prompt", "prefix"], at=(0, 3, 4)))
def test_packed_rows_are_nan_where_values_are_traced(said, kind):
    """And their gradients; other rows stay as they are."""
    fn, tuned, call = of_positions(kind)
    changes, rows = PACKED[said]
    apply, given = pj.wrap_tokens(fn), {**call, **changes}
    with pytest.raises(ValueError, match="restarts or stands still|expected 1 where"):
        apply(tuned, **given)
    got, bad = jax.jit(apply)(tuned, **given), np.isin(np.arange(2), rows)
    assert np.isnan(got[bad]).all()
    if not bad.all():
        close(got[~bad], apply(tuned, **{k: x[~bad] for k, x in given.items()}), call["attention_mask"][~bad])
    trainable, frozen = pj.partition(tuned)
    run = lambda t, given: jnp.where(bad[:, None, None], 0, apply(pj.combine(t, frozen), **given)).sum()
    grads = jax.jit(jax.grad(run))(trainable, given)
    assert all(np.isnan(g).all() for g in jax.tree.leaves(grads))


def test_outputs_without_examples_are_nan_as_a_whole():
    """Scalars, features, and lengths that are no examples; whole numbers and parameters that come back are left."""
    body, tuned, call = of_positions("prompt")

    def fn(params, **call):
        x = body(params, **call)
        real = call["labels"][..., None] != -100
        some = jnp.where(real, x, jnp.zeros_like(x))
        each = {"mean": some.mean(1), "top": some.max((1, 2))}
        return some.sum(), some.sum((0, 1)), x.argmax(-1), params["places"], each

    given = {**call, **PACKED["positions restart"][0], "labels": IDS}
    total, features, top, places, each = jax.jit(pj.wrap_tokens(fn))(tuned, **given)
    assert np.isnan(total) and np.isnan(features).all()
    assert top.dtype == np.int32 and (places == 1).all()
    assert all(np.isfinite(y[0]).all() and np.isnan(y[1]).all() for y in each.values())


LEGAL = {
    "left padding": ([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], [[0, 1, 2, 3, 4], [1, 1, 0, 1, 2]]),
    "right padding": ([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]),
    "holes": ([[1, 0, 1, 0, 1], [1, 1, 0, 0, 1]], [[0, 0, 1, 0, 2], [5, 7, 7, 7, 9]]),
    "an empty row": ([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], [[0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]),
    "one row of positions": ([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], [[0, 1, 2, 3, 4]]),
    "no axis of examples": ([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize("said", covered(list(LEGAL), at=(0, 2, 5)))
def test_padding_is_no_packing(said):
    body, tuned, call = of_positions("prefix")
    mask, places = map(np.array, LEGAL[said])

    def fn(params, input_ids, attention_mask, position_ids):
        return body(params, input_ids, attention_mask.reshape(2, -1), jnp.broadcast_to(position_ids, input_ids.shape))

    apply = pj.wrap_tokens(fn)
    want = apply(tuned, IDS, mask, places)
    for given in (mask, mask.astype(bool), mask.astype(np.float32), mask[:, None, None]):
        for run in (apply, jax.jit(apply)):
            close(run(tuned, IDS, given, places.astype(np.uint8)), want, mask)
    assert np.isfinite(want).all()


def test_tokens_first_and_one_example_at_a_time():
    """Where tokens are the first axis, the rows are the second; under `jax.vmap`, each example is a call."""
    body, tuned, call = of_positions("prefix")
    given = {**call, **PACKED["positions restart"][0]}
    turned = lambda params, **call: jnp.swapaxes(body(params, **{k: x.T for k, x in call.items()}), 0, 1)
    got = jax.jit(pj.wrap_tokens(turned, axis=0))(tuned, **{k: x.T for k, x in given.items()})
    alone = lambda given: pj.wrap_tokens(body)(tuned, **{k: x[None] for k, x in given.items()})[0]
    for rows in (jnp.swapaxes(got, 0, 1), jax.jit(jax.vmap(alone))(given)):
        assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all()


def test_packed_rows_on_several_devices():
    """Under explicit axes; and inside `shard_map`, where a sum over all devices is NaN on each."""
    body, tuned, call = of_positions("prefix")
    given, apply = {**call, **PACKED["positions restart"][0]}, pj.wrap_tokens(body, side="first")
    mesh, split = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,)), PartitionSpec("data")

    def looked_up(params, input_ids, attention_mask, position_ids):
        ids = {"words": input_ids, "places": position_ids}
        x = sum(params[name].at[at].get(out_sharding=split) for name, at in ids.items())
        for i in range(DEPTH):
            x = block(params[f"layers_{i}"], x, attention_mask, True)
        return x, x.sum((1, 2))

    with jax.set_mesh(mesh):
        lies = {k: jax.device_put(x, NamedSharding(mesh, split)) for k, x in given.items()}
        whole = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec())), tuned)
        for got in jax.jit(pj.wrap_tokens(looked_up, side="first", check=False))(whole, **lies):
            assert got.sharding.spec[0] == "data"
            assert np.isfinite(np.asarray(got)[0]).all() and np.isnan(np.asarray(got)[1]).all()

    summed = lambda params, **call: jax.lax.psum(body(params, **call)[:, -1].sum(), "data")
    both = (apply, pj.wrap_tokens(summed, side="first", check=False))
    local = lambda tuned, given: [run(tuned, **given) for run in both]
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=[split, PartitionSpec()])
    rows, total = jax.jit(mapped)(tuned, given)
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all() and np.isnan(total)


def test_a_train_step_leaves_a_packed_batch_out():
    body, tuned, call = of_positions("prefix")
    apply, tx = pj.wrap_tokens(lambda params, batch: body(params, **batch)), optax.sgd(0.1)
    step = pj.make_train_step(apply, lambda y, batch: ((y[:1] ** 2).mean(), {}), tx)
    state = pj.train_state(tuned, tx)
    with jax.numpy_dtype_promotion("standard"):
        for changes, skipped in (({}, 0), (PACKED["positions restart"][0], 1), ({}, 1)):
            before = [np.array(x) for x in jax.tree.leaves(state.trainable)]
            state, metrics = step(state, {**call, **changes})
            moved = [bool((x != y).any()) for x, y in zip(jax.tree.leaves(state.trainable), before)]
            assert int(metrics["skipped"]) == skipped and all(moved) == (not changes) and any(moved) == (not changes)


@pytest.mark.parametrize("kind, made", covered(["prompt", "prefix"], ["outside", "inside"]))
def test_a_model_may_hold_random_keys(kind, made):
    """Typed keys, as constants of the trace and made in it."""
    fn, params, _, tuned = tuned_plain(kind)
    held, tuned = KEY, drawn(tuned)

    def noisy(params, input_ids, attention_mask):
        x = fn(params, input_ids, attention_mask)
        key = held if made == "outside" else jax.random.key(0)
        kept = jax.random.bernoulli(jax.random.split(key)[1], 0.5, x.shape)
        return x + 0 * kept.astype(x.dtype)

    apply, want = pj.wrap_tokens(noisy), pj.wrap_tokens(fn)(tuned, IDS, MASK)
    close(apply(tuned, IDS, MASK), want)
    close(jax.jit(apply)(tuned, IDS, MASK), want)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_parameters_that_a_model_returns_come_back_as_they_are(kind):
    """As a loop over an NNX state returns it, overlays and all."""
    fn, params, apply, tuned = tuned_plain(kind)
    both = pj.wrap_tokens(lambda params, input_ids, attention_mask: (fn(params, input_ids, attention_mask), params))
    out, state = both(tuned, IDS, MASK)
    close(out, apply(tuned, IDS, MASK))
    pairs = zip(flatten(state), flatten(tuned), strict=True)
    assert all(x is y if layers(y) else (x == y).all() for (_, x), (_, y) in pairs)


def test_narrow_ids_raise():
    fn = lambda params, input_ids, attention_mask: params["words"][input_ids.astype(jnp.int32)]
    params = {"words": jnp.ones((255, 2), jnp.float32)}
    tuned = pj.prompt(2, targets="words").init(KEY, params)
    with pytest.raises(ValueError, match="uint8, which cannot name 255 \\+ 2 rows"):
        pj.wrap_tokens(fn, side="first")(tuned, IDS.astype(np.uint8), MASK)


def test_dicts_time_major_and_caches():
    fn, params = plain(True)
    nested = lambda params, batch: {
        "rows": jnp.swapaxes(fn(params, batch["ids"].T, batch["mask"].T), 0, 1),
        "cache": batch["ids"],
    }
    tuned = drawn(pj.prefix(N).init(KEY, params, pj.roles(fn, params, IDS, MASK)))
    apply = pj.wrap_tokens(nested, ids="ids", mask="batch/mask", axis=0, keep=("cache",), check=False)
    out = apply(tuned, {"ids": IDS.T, "mask": MASK.T})
    close(jnp.swapaxes(out["rows"], 0, 1), pj.wrap_tokens(fn)(tuned, IDS, MASK))
    assert out["cache"].shape == (5 + N, 2)


def test_one_token_and_a_folded_batch():
    fn, params = plain(True)
    tuned = drawn(pj.prefix(N).init(KEY, params, pj.roles(fn, params, IDS, MASK)))
    close(pj.wrap_tokens(fn)(tuned, IDS[:, :1], MASK[:, :1]), pj.wrap_tokens(fn)(tuned, IDS, MASK)[:, :1], MASK[:, :1])

    def folded(params, input_ids, attention_mask):
        x = params["words"][input_ids].reshape(-1, D)
        k, v = (linear(params["layers_0"][name], x[None])[0].reshape(*input_ids.shape, D) for name in ("key", "value"))
        return attend(k, k, v, attention_mask, False)

    tuned = pj.prefix(N, targets="layers_0/(key|value)").init(KEY, params, pj.roles(folded, params, IDS, MASK))
    with pytest.raises(
        ValueError, match="the Prefix at layers_0/key/kernel.*8 tokens are folded into axis 1 of its layer's output"
    ):
        pj.wrap_tokens(folded)(tuned, IDS, MASK)


@pytest.mark.parametrize("hidden", [None, 4])
def test_a_fused_kernel_takes_a_prefix_in_some_features(hidden):
    params = weights()
    fuse = lambda p: {
        "fused": {"kernel": jnp.concatenate([p[name]["kernel"] for name in NAMES[:3]], 1)},
        "out": p["out"],
    }
    fused = {"words": params["words"], **{f"layers_{i}": fuse(params[f"layers_{i}"]) for i in range(DEPTH)}}

    def fn(params, input_ids, attention_mask):
        x = params["words"][input_ids]
        for i in range(DEPTH):
            q, k, v = jnp.split(linear(params[f"layers_{i}"]["fused"], x), 3, axis=-1)
            x = x + linear(params[f"layers_{i}"]["out"], attend(q, k, v, attention_mask, True))
        return x

    method = pj.prefix(N, hidden=hidden, targets=("fused",), features=((D, 3 * D),))
    tuned = drawn(method.init(KEY, fused, pj.roles(fn, fused, IDS, MASK)))
    rows = [pj.extract(pj.fold(tuned) if hidden else tuned)[f"layers_{i}/fused/kernel/prefix"] for i in range(DEPTH)]
    want = reference(params, IDS, MASK, True, prefixes=[jnp.split(x, 2, 1) for x in rows])
    close(pj.wrap_tokens(fn)(tuned, IDS, MASK), want)


@pytest.mark.parametrize(
    "name, kind",
    covered([name for name, model in MODELS.items() if "tokens" in model.tags], ["prompt", "prefix"], at=(0, 1)),
)
def test_models_of_the_zoo(name, kind, monkeypatch):
    fn, params, args = MODELS[name].make()
    options = dict(ids="tokens", mask="mask", positions="positions")
    call = lambda params, tokens, mask, positions: fn(params, tokens, mask, positions)
    method = pj.prompt(N, targets="(words|embed)/embedding") if kind == "prompt" else pj.prefix(N)
    apply, tuned = pj.attach(method, call, params, *args, key=KEY, tokens=options)
    tuned = drawn(tuned)
    got = apply(tuned, *args)
    bare = jax.jit(call)(params, *args)
    assert got.shape == bare.shape and bool((got != bare).any())
    np.testing.assert_allclose(apply(pj.disable(tuned), *args), bare, atol=1e-5)
    if kind == "prefix":
        monkeypatch.setattr(token_insert, "FILLER", 6)
        np.testing.assert_array_equal(pj.wrap_tokens(call, **options)(tuned, *args), got)
