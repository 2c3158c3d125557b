"""Virtual tokens in unmodified T5 and BART, against hand-written ones with real keys, values and embeddings."""

import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from covers import covered
from peftjax import token_insert

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

KEY, N, HEADS, SIZE = jax.random.key(3), 3, 4, 4
IDS = np.array([[5, 9, 3, 30, 12, 7, 8], [4, 6, 22, 11, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
DECODER = (np.array([[1, 14, 8, 3, 17], [1, 33, 2, 6, 5]]), np.ones((2, 5), int))
PLACES = np.broadcast_to(np.arange(5), (2, 5))
ENCODER = {"ids": "ids", "mask": "mask"}
SITES = {
    "t5": ("encoder/block/{}/layer/0/SelfAttention", "decoder/block/{}/layer/0/SelfAttention", "decoder/block/{}/layer/1/EncDecAttention"),
    "bart": ("model/encoder/layers/{}/self_attn", "model/decoder/layers/{}/self_attn", "model/decoder/layers/{}/encoder_attn"),
}  # fmt: skip
LAYERS = {"t5": 3, "bart": 2}


# The models by hand: `given` holds a pair of real keys and values for an attention, by its path


def at(params, path):
    for name in path.split("/"):
        params = params[name]
    return params


def linear(p, x):
    return x @ p["kernel"] + (p["bias"] if "bias" in p else 0)


def attend(p, x, y, seen, given, scale=1.0, bias=0.0):
    """Attention from x to y; `seen` (B, Tq, Tk) is of real keys, `bias` of all."""
    q, k, v = (name for name in (("q", "k", "v") if "q" in p else ("q_proj", "k_proj", "v_proj")))
    k, v = linear(p[k], y), linear(p[v], y)
    if given is not None:
        k, v = (jnp.concatenate([jnp.broadcast_to(rows, (2, *rows.shape)), z], 1) for rows, z in zip(given, (k, v)))
        seen = jnp.concatenate([jnp.ones((*seen.shape[:2], N), bool), seen], 2)
    heads = lambda z: z.reshape(2, -1, HEADS, SIZE)
    scores = jnp.einsum("bqhk,bthk->bhqt", heads(linear(p[q], x)), heads(k)) * scale + bias
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e9), -1)
    out = jnp.einsum("bhqt,bthk->bqhk", weights, heads(v)).reshape(2, -1, HEADS * SIZE)
    return linear(p["o" if "o" in p else "out_proj"], out)


def buckets(p, queries, keys, both):
    """T5's bias by distance: 8 buckets up to 12."""
    far = keys[None, :] - queries[:, None]
    start, count = (np.where(far > 0, 4, 0), 4) if both else (0, 8)
    far = np.abs(far) if both else np.maximum(-far, 0)
    half = count // 2
    large = half + np.log(np.maximum(far, 1) / half) / np.log(12 / half) * (count - half)
    bucket = start + np.where(far < half, far, np.minimum(large.astype(int), count - 1))
    return jnp.moveaxis(at(p, "0/layer/0/SelfAttention/relative_attention_bias/embedding")[bucket], 2, 0)[None]


def rms(p, x):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["weight"]


def t5(params, x, mask, ids, given, first=True):
    """Logits from encoder embeddings and decoder ids."""
    get = lambda path: given.get(path)
    n = {w: N if any(w in path and "EncDec" not in path for path in given) else 0 for w in ("encoder", "decoder")}
    seen = jnp.broadcast_to(mask[:, None].astype(bool), (2, x.shape[1], x.shape[1]))
    places = lambda stack, size: (n[stack] + np.arange(size), np.arange(n[stack] + size))
    bias = buckets(params["encoder"]["block"], *places("encoder", x.shape[1]), True)
    for i in range(3):
        block, path = params["encoder"]["block"][str(i)]["layer"], SITES["t5"][0].format(i)
        h = rms(block["0"]["layer_norm"], x)
        x = x + attend(at(params, path), h, h, seen, get(path), bias=bias)
        h = rms(block["1"]["layer_norm"], x)
        x = x + linear(at(block, "1/DenseReluDense/wo"), jax.nn.relu(linear(at(block, "1/DenseReluDense/wi"), h)))
    memory = rms(params["encoder"]["final_layer_norm"], x)
    y, size = params["shared"]["embedding"][ids], ids.shape[1]
    before = jnp.broadcast_to(np.tril(np.ones((size, size), bool)), (2, size, size))
    wide = jnp.broadcast_to(mask[:, None].astype(bool), (2, size, mask.shape[1]))
    bias = buckets(params["decoder"]["block"], *places("decoder", size), False)
    for i in range(3):
        block, paths = params["decoder"]["block"][str(i)]["layer"], [s.format(i) for s in SITES["t5"][1:]]
        h = rms(block["0"]["layer_norm"], y)
        y = y + attend(at(params, paths[0]), h, h, before, get(paths[0]), bias=bias)
        h = rms(block["1"]["layer_norm"], y)
        y = y + attend(at(params, paths[1]), h, memory, wide, get(paths[1]))
        h = rms(block["2"]["layer_norm"], y)
        y = y + linear(at(block, "2/DenseReluDense/wo"), jax.nn.relu(linear(at(block, "2/DenseReluDense/wi"), h)))
    return rms(params["decoder"]["final_layer_norm"], y) * 16**-0.5 @ params["shared"]["embedding"].T


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def bart(params, x, mask, ids, given, first=True):
    """Logits from encoder embeddings and decoder ids; positions of what follows virtual tokens begin at n."""
    p, get = params["model"], given.get
    n = {
        w: N * first if any(f"{w}/" in path and "encoder_attn" not in path for path in given) else 0
        for w in ("encoder", "decoder")
    }
    placed = lambda stack, z: norm(
        p[stack]["layernorm_embedding"],
        z + p[stack]["embed_positions"]["embedding"][2 + n[stack] + np.arange(z.shape[1])],
    )
    feed = lambda layer, z: norm(
        layer["final_layer_norm"], z + linear(layer["fc2"], jax.nn.gelu(linear(layer["fc1"], z), False))
    )
    x = placed("encoder", x)
    seen = jnp.broadcast_to(mask[:, None].astype(bool), (2, x.shape[1], x.shape[1]))
    for i in range(2):
        layer, path = p["encoder"]["layers"][str(i)], SITES["bart"][0].format(i)
        x = norm(layer["self_attn_layer_norm"], x + attend(at(params, path), x, x, seen, get(path), 0.5))
        x = feed(layer, x)
    y, size = placed("decoder", p["shared"]["embedding"][ids]), ids.shape[1]
    before = jnp.broadcast_to(np.tril(np.ones((size, size), bool)), (2, size, size))
    wide = jnp.broadcast_to(mask[:, None].astype(bool), (2, size, mask.shape[1]))
    for i in range(2):
        layer, paths = p["decoder"]["layers"][str(i)], [s.format(i) for s in SITES["bart"][1:]]
        y = norm(layer["self_attn_layer_norm"], y + attend(at(params, paths[0]), y, y, before, get(paths[0]), 0.5))
        y = norm(layer["encoder_attn_layer_norm"], y + attend(at(params, paths[1]), y, x, wide, get(paths[1]), 0.5))
        y = feed(layer, y)
    return y @ p["shared"]["embedding"].T + params["final_logits_bias"]


BY_HAND = {"t5": t5, "bart": bart}


def words(name, params, ids):
    return (params["shared"] if name == "t5" else params["model"]["shared"])["embedding"][ids]


def close(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def drawn(tuned):
    flat = pj.extract(tuned)
    return pj.insert(
        tuned, {k: jax.random.normal(jax.random.fold_in(KEY, i), x.shape) for i, (k, x) in enumerate(flat.items())}
    )


def with_prefix(name, *sites):
    """The model, its parameters, a tree with prefixes on some attentions, and these as pairs by path."""
    fn, params, roles, _, _ = golden.model(name)
    targets = "|".join(site.format(".*") + "/[kv](_proj)?" for site in sites)
    tuned = drawn(pj.prefix(N, targets=targets).init(KEY, params, roles))
    rows = {key.rpartition("/")[0].rpartition("/")[0]: x for key, x in pj.extract(tuned).items()}
    paths = dict.fromkeys(key.rpartition("/")[0] for key in rows)
    last = ("k", "v") if name == "t5" else ("k_proj", "v_proj")
    return fn, params, tuned, {path: [rows[f"{path}/{k}"] for k in last] for path in paths}


def of_decoder(name):
    return dict(ids="decoder_ids", mask="decoder_mask", positions=None if name == "t5" else "decoder_positions")


@pytest.mark.parametrize("name", golden.SEQ2SEQ)
def test_the_models_by_hand_are_the_models(name):
    fn, params, _, _, _ = golden.model(name)
    by_hand = jax.jit(lambda params: BY_HAND[name](params, words(name, params, IDS), MASK, DECODER[0], {}))
    close(jax.jit(lambda params: fn(params, IDS, MASK, *DECODER))(params), by_hand(params))


PROMPTS = {"prompt": pj.prompt(N, targets=".*shared.*"), "p_tuning": pj.p_tuning(N, 4, targets=".*shared.*")}


@pytest.mark.parametrize("name, kind", covered(golden.SEQ2SEQ, list(PROMPTS), at=(0,)))
def test_a_prompt_stands_before_what_the_encoder_reads(name, kind):
    fn, params, roles, _, _ = golden.model(name)
    tuned = drawn(PROMPTS[kind].init(KEY, params, roles))
    rows = next(iter(pj.extract(pj.fold(tuned) if kind == "p_tuning" else tuned).values()))
    rows = jnp.broadcast_to(rows, (2, *rows.shape))
    mask = np.concatenate([np.ones((2, N), int), MASK], 1)
    by_hand = lambda params: BY_HAND[name](params, jnp.concatenate([rows, words(name, params, IDS)], 1), mask, DECODER[0], {})
    apply = pj.wrap_tokens(fn, **ENCODER)
    close(apply(tuned, IDS, MASK, *DECODER), jax.jit(by_hand)(params))
    if name == "t5":  # BART counts its positions itself, from the first virtual one
        plain = jax.jit(lambda params: fn(params, IDS, MASK, *DECODER))
        close(apply(pj.disable(tuned), IDS, MASK, *DECODER), plain(params))


@pytest.mark.parametrize("name", covered(golden.SEQ2SEQ, at=(0,)))
def test_a_prefix_of_the_encoder_and_of_what_reads_it_is_real_keys_and_values(name, monkeypatch):
    fn, params, tuned, given = with_prefix(name, SITES[name][0], SITES[name][2])
    assert len(given) == 2 * LAYERS[name]
    for side in ("auto", "last") if name == "bart" else ("auto",):
        apply = pj.wrap_tokens(fn, **ENCODER, side=side)
        got = apply(tuned, IDS, MASK, *DECODER)
        by_hand = lambda params: BY_HAND[name](params, words(name, params, IDS), MASK, DECODER[0], given, side == "auto")
        close(got, jax.jit(by_hand)(params))
        wide = [np.pad(x, ((0, 0), (0, 2))) for x in (IDS, MASK)]
        close(apply(tuned, *wide, *DECODER), got)
        monkeypatch.setattr(token_insert, "FILLER", 6)
        np.testing.assert_array_equal(pj.wrap_tokens(fn, **ENCODER, side=side)(tuned, IDS, MASK, *DECODER), got)


@pytest.mark.parametrize("name", covered(golden.SEQ2SEQ, at=(0,)))
def test_a_prefix_of_the_decoder_is_real_keys_and_values(name):
    fn, params, tuned, given = with_prefix(name, SITES[name][1])
    apply = pj.wrap_tokens(fn, **of_decoder(name))
    more = () if name == "t5" else (PLACES,)
    by_hand = lambda params: BY_HAND[name](params, words(name, params, IDS), MASK, DECODER[0], given)
    close(apply(tuned, IDS, MASK, *DECODER, *more), jax.jit(by_hand)(params))
    plain = jax.jit(lambda params: fn(params, IDS, MASK, *DECODER, *more))
    close(apply(pj.disable(tuned), IDS, MASK, *DECODER, *more), plain(params))


@pytest.mark.parametrize("name", covered(golden.SEQ2SEQ, at=(0,)))
@pytest.mark.parametrize(
    "sites, options, message",
    [
        ((0,), "encoder", "depend on what stands at virtual positions.*(EncDecAttention|encoder_attn).*prefix on every attention"),
        ((2,), "encoder", "depend on what stands at virtual positions.*(SelfAttention|self_attn).*prefix on every attention"),
        ((1,), "encoder", r"Prefix at (model/)?decoder/.* acts on tokens, and no axis of its layer's output"),
        ((0, 1, 2), "encoder", r"Prefix at (model/)?decoder/.* acts on tokens, and no axis of its layer's output"),
        ((2,), "decoder", r"Prefix at (model/)?decoder/.* acts on tokens, and no axis of its layer's output"),
        ((0,), "decoder", r"Prefix at (model/)?encoder/.* acts on tokens, and no axis of its layer's output"),
    ],
)  # fmt: skip
def test_prefixes_on_some_attentions_only_raise(name, sites, options, message):
    fn, _, tuned, _ = with_prefix(name, *(SITES[name][k] for k in sites))
    options = ENCODER if options == "encoder" else of_decoder(name)
    with pytest.raises(ValueError, match=message):
        pj.wrap_tokens(fn, **options)(tuned, IDS, MASK, *DECODER, *(() if name == "t5" else (PLACES,)))


@pytest.mark.parametrize("name", golden.SEQ2SEQ)
def test_virtual_tokens_after_a_decoders_own_would_not_be_seen(name):
    fn, params, roles, _, _ = golden.model(name)
    tuned = pj.prompt(N, targets=".*shared.*").init(KEY, params, roles)
    with pytest.raises(ValueError, match="virtual tokens last: the model is causal, so no token would see them"):
        pj.wrap_tokens(fn, side="last", **of_decoder(name))(
            tuned, IDS, MASK, *DECODER, *(() if name == "t5" else (PLACES,))
        )


@pytest.mark.ci
def test_after_padding_t5_would_read_distances_to_virtual_tokens():
    fn, _, tuned, _ = with_prefix("t5", SITES["t5"][0], SITES["t5"][2])
    with pytest.raises(ValueError, match="virtual tokens last: the model reads how far apart tokens are"):
        pj.wrap_tokens(fn, side="last", **ENCODER)(tuned, IDS, MASK, *DECODER)
    short, long = (
        pj.wrap_tokens(fn, side="last", check=False, **ENCODER)(tuned, np.pad(IDS, ((0, 0), (0, n))), np.pad(MASK, ((0, 0), (0, n))), *DECODER)
        for n in (0, 2)
    )  # fmt: skip
    assert np.abs(short - long).max() > 1e-3


@pytest.mark.ci
def test_a_decoders_labels_stay_beside_ids_of_the_encoder():
    fn, params, roles, _, _ = golden.model("t5")

    def loss(params, input_ids, attention_mask, decoder_input_ids, labels):
        logits = fn(params, input_ids, attention_mask, decoder_input_ids)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()

    tuned = drawn(pj.prompt(N, targets=".*shared.*").init(KEY, params, roles))
    ids, labels = IDS[:, :5], DECODER[0]  # as many of one as of the other
    logits = pj.wrap_tokens(fn, **ENCODER)(tuned, ids, MASK[:, :5], DECODER[0])
    want = -np.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()
    np.testing.assert_allclose(pj.wrap_tokens(loss)(tuned, ids, MASK[:, :5], DECODER[0], labels), want, rtol=1e-5)
