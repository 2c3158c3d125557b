"""LoRA and DoRA on models that are not ours: transformers' Flax models, unmodified, and every model of the zoo: nothing is merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import unfreeze
from zoo import MODELS

import peftjax as pj
from covers import covered
from trees import away
from peftjax.paths import flatten, path_of

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 30}
TEXT = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2])}
LIKE_BERT = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 12}
PAIR = {**TEXT, "decoder_input_ids": np.arange(8).reshape(2, 4)}
BART = {
    **{
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 16))
    },
    "d_model": 16,
    "max_position_embeddings": 12,
    "vocab_size": 30,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}
T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 30,
    "decoder_start_token_id": 0,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 30, "n_positions": 12}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
IMAGE = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
CASES = {
    "BertForSequenceClassification": ("BertConfig", LIKE_BERT, TEXT),
    "LlamaForCausalLM": ("LlamaConfig", {**LIKE_BERT, "num_key_value_heads": 2}, TEXT),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, TEXT),
    "T5ForConditionalGeneration": ("T5Config", T5, PAIR),
    "BartForConditionalGeneration": ("BartConfig", BART, PAIR),
    "ViTForImageClassification": ("ViTConfig", {**LIKE_BERT, "image_size": 32, "patch_size": 8}, IMAGE),
    "ResNetForImageClassification": ("ResNetConfig", RESNET, IMAGE),
}


@pytest.fixture
def clip_of_old(monkeypatch):
    """T5's code still calls `jnp.clip` by the names that JAX has since given up."""
    clip = jnp.clip
    old = lambda x, a_min=None, a_max=None, **new: clip(x, **(new or {"min": a_min, "max": a_max}))
    monkeypatch.setattr(jnp, "clip", functools.wraps(clip)(old))


METHODS = {"lora": pj.lora(rank=2, alpha=4), "dora": pj.dora(rank=2, alpha=4)}
LANGUAGE = ("BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM")
OTHERS = ("T5ForConditionalGeneration", "BartForConditionalGeneration", "ViTForImageClassification", "ResNetForImageClassification")  # fmt: skip
IA3 = dict(
    zip(
        OTHERS,
        (
            pj.ia3(("k", "v"), ("wo",)),
            pj.ia3(("k_proj", "v_proj"), ("fc2",)),
            pj.ia3(("key", "value"), "vit/encoder/layer/./output/dense"),
            pj.ia3(".*/layer_0/convolution", ".*/layer_1/convolution"),
        ),
    )
)
LINEAR_ADAPTER = pj.adapter("houlsby", bottleneck=2, activation="identity", scale=0.5)  # which weights can stand for


def without_constants(tuned):
    """The tree with the adapters' biases at zero: layers without a bias have nowhere to keep a constant."""
    flat = pj.extract(tuned)
    return pj.insert(tuned, {k: v * 0 if k.endswith(("down_bias", "up_bias")) else v for k, v in flat.items()})


def as_weights(tuned):
    """The plain tree that does what linear adapters after layers do: `h (I + M) + c` of `h = x W + b`, or of its norm.

    A batch normalisation between the two is `h = (y - mean) s + b`; M goes before it as `S M / S`.
    """
    plain = dict(flatten(pj.strip(tuned)))
    for path, x in flatten(tuned):
        if not isinstance(x, pj.Overlay):
            continue
        m = 0.5 * x.down @ x.up
        c = 0.5 * (x.down_bias @ x.up + x.up_bias)
        if x.kernel is not None:
            plain[path] = plain[path] + plain[path] @ m + c
        kernel, s = x.kernel or path, 1.0
        if x.kernel is None and "convolution" in path:
            scale, bias = (path.replace("convolution/kernel", f"normalization/{name}") for name in ("scale", "bias"))
            mean, var = (scale.replace("params", "batch_stats", 1).replace("scale", n) for n in ("mean", "var"))
            s = plain[scale] / jnp.sqrt(plain[var] + 1e-5)
            moved = plain[bias] - plain[mean] * s
            plain[bias] = moved + moved @ m + c + plain[mean] * s
        plain[kernel] = plain[kernel] + (plain[kernel] * s) @ m / s
    values = iter(plain.values())
    return jax.tree.map(lambda _: next(values), tuned, is_leaf=lambda x: isinstance(x, pj.Overlay))


@functools.lru_cache
def built(name):
    """A model of transformers, with random parameters, as a function of them and of its inputs."""
    config, options, inputs = CASES[name]
    model = getattr(transformers, f"Flax{name}")(getattr(transformers, config)(**options), _do_init=False)
    rng = np.random.default_rng(0)
    made = lambda keys, x: drawn(path_of(keys).rpartition("/")[2], x.shape, rng)
    params = jax.tree_util.tree_map_with_path(made, unfreeze(model.params_shape_tree))
    return lambda params, **inputs: model(**inputs, params=params, train=False)[0], params, inputs


NEUTRAL = {"scale": 1, "weight": 1, "var": 1, "bias": 0, "mean": 0}


def drawn(name, shape, rng):
    """Random numbers for a leaf of this name, made by numpy, where a model would compile a program for every shape."""
    if name in NEUTRAL:
        return jax.device_put(np.full(shape, NEUTRAL[name], np.float32))
    x = rng.standard_normal(shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)
    return jax.device_put(x.astype(np.float32))


def stepping(apply, inputs):
    """`step(trainable, frozen)`, compiled: the gradients of the squared outputs, and the outputs."""

    @jax.jit
    def step(trainable, frozen):
        def loss(trainable):
            y = apply(pj.combine(trainable, frozen), **inputs)
            return (y**2).sum(), y

        return jax.grad(loss, has_aux=True)(trainable)

    return step


@pytest.mark.third_party
@pytest.mark.parametrize(
    "name, method",
    [*covered(LANGUAGE, list(METHODS), at=(0, 2)), *covered(OTHERS, (*METHODS, "ia3", "adapter"), at=(2,))],
)
def test_on_models_of_transformers(name, method, clip_of_old):
    """Values are those of the merged tree, or for an adapter, of the weights that do what it does; all of it trains."""
    fn, params, inputs = built(name)
    made = {**METHODS, "ia3": IA3.get(name), "adapter": LINEAR_ADAPTER}[method]
    apply, fresh = pj.attach(made, fn, params, key=jax.random.key(0), **inputs)
    trainable, frozen = pj.partition(without_constants(away(fresh)) if name[:2] == "T5" else away(fresh))

    step = stepping(apply, inputs)
    tuned = pj.combine(trainable, frozen)
    run = jax.jit(lambda params: fn(params, **inputs))
    base, want = run(params), run(as_weights(tuned) if method == "adapter" else pj.merge(tuned))
    scale = np.abs(want).max()
    np.testing.assert_allclose(step(*pj.partition(fresh))[1], base, atol=1e-5 * scale)
    grads, found = step(trainable, frozen)
    np.testing.assert_allclose(found, want, atol=1e-5 * scale)
    assert np.abs(want - base).max() > 1e-3 * scale
    events = pj.explain(fn, tuned, **inputs)
    assert all(e.how in ("acted", "met the residual") for e in events if e not in events.merged), events
    assert all(method == "ia3" and e.path.endswith("/bias") for e in events.merged), events  # a vector is formed there
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads))


REFUSED = [
    ("ResNet", pj.prefix(2), "prefix: no projection is called key, value"),
    ("ResNet", pj.adapter("parallel", targets=".*/layer_0/convolution"), "layer_0/convolution/kernel is not added to a residual"),
    ("ResNet", pj.lora(targets=".*normalization"), "normalization/mean, .* which is no kernel; expected a kernel; closest"),
    ("ViT", pj.ia3((), "vit/embeddings/cls_token"), "cls_token, which is no kernel"),
    ("ViT", pj.prompt(2), "prompt: rows are looked up in no leaf; name the table of words"),
    ("ViT", pj.adapter(targets="classifier"), "output of classifier/kernel is not added to a residual stream; expected one of"),
    ("T5", pj.ia3((), ("shared",)), "shared/embedding is looked up, and reads no features"),
    ("T5", pj.dora(rank=2, targets=("SelfAttention/g",)), "'SelfAttention/g' matches no leaf.*SelfAttention"),
    ("Bart", pj.lora(rank=99), "rank 99 at .*expected 1 to"),
    ("Bart", pj.adapter(targets=("k_proj",)), "k_proj/kernel is not added to a residual stream"),
]  # fmt: skip


@pytest.mark.third_party
@pytest.mark.parametrize("name, method, said", REFUSED)
def test_what_cannot_be_on_models_of_transformers(name, method, said, clip_of_old):
    fn, params, inputs = built(next(n for n in OTHERS if n.startswith(name)))
    with pytest.raises(ValueError, match=said):
        method.init(jax.random.key(0), params, pj.roles(fn, params, **inputs))


@pytest.mark.third_party
def test_what_cannot_run_or_merge_on_models_of_transformers(clip_of_old):
    fn, params, inputs = built(OTHERS[2])
    apply, tuned = pj.attach(pj.reft(2, positions="l1"), fn, params, key=jax.random.key(0), **inputs)
    with pytest.raises(ValueError, match="LoReFT.*acts on the tokens of a sequence.*expected `peftjax.wrap_tokens"):
        apply(tuned, **inputs)
    with pytest.raises(ValueError, match="layer/0/output/dense/bias .LoReFT.*wrap.fn."):
        pj.merge(tuned)
    fn, params, inputs = built(OTHERS[1])
    looked_up = pj.lora(rank=2, targets="model/shared", uses=("gather",))
    tuned = pj.attach(looked_up, fn, params, key=jax.random.key(0), **inputs)[1]
    with pytest.raises(ValueError, match="model/shared/embedding .LoRA"):
        pj.merge(tuned)


def test_only_the_models_that_leave_no_choice_merge():
    """Merging is for weights that a model changes before it uses them, and for borders that operators cannot cross."""
    merges = set()
    for name, model in MODELS.items():
        fn, params, args = model.make()
        roles = pj.roles(fn, params, *args)
        tuned = pj.lora(rank=1, targets=model.targets).init(jax.random.key(0), params, roles)
        if pj.explain(fn, tuned, *args).merged:
            merges.add(name)
    assert merges <= {name for name, model in MODELS.items() if "merges" in model.tags or name == "bf16_times_float"}
    assert {"weight_norm", "inside_custom_vjp", "carried_by_while", "inside_shard_map"} <= merges
    assert not merges & {
        "linen_scan_remat",
        "nnx_scan",
        "linen_scan_axis_1",
        "linen_vmap_attention",
        "fused_qkv_slices",
    }
