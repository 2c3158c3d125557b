"""LoRA and DoRA on models that are not ours: transformers' Flax models, unmodified, and every model of the zoo: nothing is merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import MODELS

import peftjax as pj

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 30}
TEXT = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2])}
LIKE_BERT = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 12}
PAIR = {**TEXT, "decoder_input_ids": np.arange(8).reshape(2, 4)}
BART = {
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 16))},
    "d_model": 16,
    "max_position_embeddings": 12,
    "vocab_size": 30,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 30, "decoder_start_token_id": 0}
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


def away(tuned):
    """The tree with what trains away from where it starts."""
    flat = pj.extract(tuned)
    noise = {k: jax.random.normal(jax.random.key(n), v.shape) * 0.3 for n, (k, v) in enumerate(flat.items())}
    return pj.insert(tuned, {k: v + noise[k] for k, v in flat.items()})


METHODS = {"lora": pj.lora(rank=2, alpha=4), "dora": pj.dora(rank=2, alpha=4)}


@functools.lru_cache
def built(name):
    """A model of transformers, with random parameters, as a function of them and of its inputs."""
    config, options, inputs = CASES[name]
    model = getattr(transformers, f"Flax{name}")(getattr(transformers, config)(**options))
    return lambda params, **inputs: model(**inputs, params=params, train=False)[0], model.params, inputs


@pytest.mark.third_party
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_on_models_of_transformers(name, method, clip_of_old):
    fn, params, inputs = built(name)
    apply, fresh = pj.attach(METHODS[method], fn, params, key=jax.random.key(0), **inputs)
    trainable, frozen = pj.partition(away(fresh))

    @jax.jit
    def step(trainable, frozen):
        def loss(trainable):
            y = apply(pj.combine(trainable, frozen), **inputs)
            return (y**2).sum(), y

        return jax.grad(loss, has_aux=True)(trainable)

    tuned = pj.combine(trainable, frozen)
    run = jax.jit(lambda params: fn(params, **inputs))
    base, want = run(params), run(pj.merge(tuned))
    scale = np.abs(want).max()
    np.testing.assert_allclose(step(*pj.partition(fresh))[1], base, atol=1e-5 * scale)
    grads, found = step(trainable, frozen)
    np.testing.assert_allclose(found, want, atol=1e-5 * scale)
    assert np.abs(want - base).max() > 1e-3 * scale
    events = pj.explain(fn, tuned, **inputs)
    assert not events.merged and all(e.how == "acted" for e in events), events
    assert all(bool(jnp.isfinite(g).all()) and bool(g.any()) for g in jax.tree.leaves(grads))


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
    assert not merges & {"linen_scan_remat", "nnx_scan", "linen_scan_axis_1", "linen_vmap_attention", "fused_qkv_slices"}
