"""Prompts and prefixes in an unmodified RoBERTa, whose positions begin at 2, against real embeddings, keys and values."""

import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from covers import covered

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

KEY, N, HEADS, EPS = jax.random.key(5), 3, 4, 1e-12
NAMES = {"ids": "ids", "mask": "mask"}
PLACED = {**NAMES, "positions": "positions"}


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPS) * p["scale"] + p["bias"]


def attend(p, x, seen, given):
    """Self-attention; the keys and values that are given come before x's own."""
    k, v = linear(p["key"], x), linear(p["value"], x)
    k, v = (jnp.concatenate([jnp.broadcast_to(rows, (len(x), *rows.shape)), y], 1) for rows, y in zip(given, (k, v)))
    heads = lambda y: y.reshape(*y.shape[:2], HEADS, -1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads(linear(p["query"], x)), heads(k)) / np.sqrt(x.shape[-1] // HEADS)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e9), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, heads(v)).reshape(x.shape)


def by_hand(params, x, mask, places, given):
    """Logits from word embeddings, the positions of these, and pairs of keys and values for each layer."""
    p, n = params["roberta"], given[0][0].shape[0]
    tables = p["embeddings"]
    x = x + tables["position_embeddings"]["embedding"][places] + tables["token_type_embeddings"]["embedding"][0]
    x, seen = norm(tables["LayerNorm"], x), jnp.concatenate([jnp.ones((len(x), n), bool), mask == 1], 1)
    for i, pair in enumerate(given):
        layer = p["encoder"]["layer"][str(i)]
        out, attention = layer["attention"]["output"], attend(layer["attention"]["self"], x, seen, pair)
        x = norm(out["LayerNorm"], x + linear(out["dense"], attention))
        h = jax.nn.gelu(linear(layer["intermediate"]["dense"], x), False)
        x = norm(layer["output"]["LayerNorm"], x + linear(layer["output"]["dense"], h))
    head = params["classifier"]
    return linear(head["out_proj"], jnp.tanh(linear(head["dense"], x[:, 0])))


def placed(mask):
    """RoBERTa's positions: 2, 3, ... at real tokens, and 1 at padding."""
    return np.where(mask == 1, np.cumsum(mask, 1) + 1, 1)


def drawn(method):
    _, params, roles, _, _ = golden.model("roberta")
    tuned = method.init(KEY, params, roles)
    flat = pj.extract(tuned)
    keys = jax.random.split(KEY, len(flat))
    return pj.insert(tuned, {path: jax.random.normal(key, x.shape) for key, (path, x) in zip(keys, flat.items())})


def words(params, ids):
    return params["roberta"]["embeddings"]["word_embeddings"]["embedding"][ids]


def close(got, want):
    assert got.shape == want.shape and np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


NOTHING = [[np.zeros((0, 16), np.float32)] * 2] * 2


@pytest.mark.parametrize("kind", golden.MASKS)
def test_the_model_by_hand_is_the_model(kind):
    fn, params, _, ids, masks = golden.model("roberta")
    mask = np.asarray(masks[kind])
    close(by_hand(params, words(params, ids), mask, placed(mask), NOTHING), fn(params, ids, mask, placed(mask)))


@pytest.mark.parametrize("kind, shift", covered(list(golden.MASKS), [None, True], at=(0, 1)))
def test_a_prefix_is_real_keys_and_values(kind, shift):
    """Positions stay by default; with `shift=True` they begin at 2 + N."""
    fn, params, _, ids, masks = golden.model("roberta")
    mask, tuned = np.asarray(masks[kind]), drawn(pj.prefix(N))
    run, flat = pj.wrap_tokens(fn, shift=shift, **PLACED), pj.extract(tuned)
    site = "roberta/encoder/layer/{}/attention/self/{}/bias/prefix"
    given = [[flat[site.format(i, name)] for name in ("key", "value")] for i in range(2)]
    assert len(flat) == 4
    want = by_hand(params, words(params, ids), mask, placed(mask) + (N if shift else 0), given)
    for apply in (run, jax.jit(run)):
        close(apply(tuned, ids, mask, placed(mask)), want)
    if kind == "full" and not shift:
        close(pj.wrap_tokens(fn, **NAMES)(tuned, ids, mask), want)  # with positions that the model makes itself


@pytest.mark.parametrize("kind, side", covered(list(golden.MASKS), ["first", "last"], at=(0, 1)))
def test_a_prompt_is_real_embeddings(kind, side):
    """First, its positions are 2, 3, ... and x's follow; last, x's stay, and its own go on from the last of them."""
    fn, params, _, ids, masks = golden.model("roberta")
    mask, tuned = np.asarray(masks[kind]), drawn(pj.prompt(N, targets=".*word_embeddings.*"))
    x, places, ones = words(params, ids), placed(mask), np.ones((2, N), int)
    (rows,) = pj.extract(tuned).values()
    rows, count = jnp.broadcast_to(rows, (2, *rows.shape)), np.arange(N)[None]
    if side == "first":
        parts = [(rows, x), (ones, mask), (2 + count * ones, places + N)]
    else:
        parts = [(x, rows), (mask, ones), (places, places.max(1, keepdims=True) + 1 + count)]
    want = by_hand(params, *(jnp.concatenate(pair, 1) for pair in parts), NOTHING)
    run = pj.wrap_tokens(fn, side=side, check=side == "last", **PLACED)  # the head reads the first row, as peft's does
    for apply in (run, jax.jit(run)):
        close(apply(tuned, ids, mask, places), want)
    if kind == "full":
        close(pj.wrap_tokens(fn, side=side, check=side == "last", **NAMES)(tuned, ids, mask), want)
    if side == "first":
        with pytest.raises(ValueError, match="would depend on virtual rows"):
            pj.wrap_tokens(fn, side="first", **PLACED)(tuned, ids, mask, places)
