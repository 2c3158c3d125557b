"""Virtual tokens: HF peft's files on unmodified Flax models, what the wrapper inserts, takes out, and refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import GOLDEN, built
from safetensors.numpy import load_file

import peftjax as pj

KEY = jax.random.key(3)


# HF peft's files


def close(got, want, mask=1.0):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert (np.abs(got - want) * mask).max() <= 1e-5 * np.abs(want).max()


def golden(name):
    """The model of transformers, its parameters, and the base's ids and masks."""
    pytest.importorskip("transformers")
    return *built(name), np.load(GOLDEN / name / "base/ref.npz")


@pytest.fixture(scope="module")
def bert():
    return golden("bert")


@pytest.fixture(scope="module")
def llama():
    return golden("llama")


def with_values(tuned, values):
    """The tree with these trained values."""
    flat = pj.extract(tuned)
    assert set(values) == set(flat)
    return pj.insert(tuned, {k: jnp.asarray(x, jnp.float32) for k, x in values.items()})


MASKS = ("full", "rightpad", "leftpad")


@pytest.mark.third_party
@pytest.mark.parametrize("kind", ["prompt", "ptuning", "prefix"])
def test_bert_equals_hf_peft(bert, kind):
    model, params, base = bert
    saved, ref = load_file(GOLDEN / f"bert/{kind}/adapter_model.safetensors"), np.load(GOLDEN / f"bert/{kind}/ref.npz")
    n = json.loads((GOLDEN / f"bert/{kind}/adapter_config.json").read_text())["num_virtual_tokens"]
    params = {
        **params,
        "classifier": {"kernel": saved["base_model.classifier.weight"].T, "bias": saved["base_model.classifier.bias"]},
    }
    ids = base["input_ids"]

    def fn(params, input_ids, attention_mask, position_ids):
        return model(input_ids, attention_mask=attention_mask, position_ids=position_ids, params=params).logits

    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    args = (ids, base["mask_full"], places)
    if kind == "prefix":
        tuned = pj.prefix(n).init(KEY, params, pj.roles(fn, params, *args))
        kv = saved["prompt_embeddings"].reshape(n, 4, -1)
        site = "bert/encoder/layer/{}/attention/self/{}/bias/prefix"
        rows = {site.format(i, name): kv[:, 2 * i + j] for i in range(2) for j, name in enumerate(("key", "value"))}
        apply = pj.wrap_tokens(fn, shift=True)
    else:
        method = pj.prompt(n, targets=("word_embeddings",))
        tuned = method.init(KEY, params, pj.roles(fn, params, *args))
        rows = {"bert/embeddings/word_embeddings/embedding/prompt": saved["prompt_embeddings"]}
        apply = pj.wrap_tokens(fn, side="first", check=False)
        with pytest.raises(ValueError, match="virtual"):
            pj.wrap_tokens(fn, side="first")(tuned, *args)
    tuned = with_values(tuned, rows)
    for name in MASKS:
        close(apply(tuned, ids, base[f"mask_{name}"], places), ref[f"logits_{name}"])


def unrotated(keys, theta):
    """Keys (n, heads, size) turned back from the rotary positions 0, 1, ..."""
    n, _, size = keys.shape
    angles = np.arange(n)[:, None] / theta ** (np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    half = np.concatenate([-keys[..., size // 2 :], keys[..., : size // 2]], -1)
    return keys * cos - half * sin


@pytest.mark.third_party
@pytest.mark.parametrize("kind", ["prompt", "ptuning", "prefix"])
def test_llama_equals_hf_peft(llama, kind):
    model, params, base = llama
    saved, ref = (
        load_file(GOLDEN / f"llama/{kind}/adapter_model.safetensors"),
        np.load(GOLDEN / f"llama/{kind}/ref.npz"),
    )
    n = json.loads((GOLDEN / f"llama/{kind}/adapter_config.json").read_text())["num_virtual_tokens"]
    ids, config = base["input_ids"], model.config

    def fn(params, input_ids, attention_mask, position_ids):
        return model(input_ids, attention_mask=attention_mask, position_ids=position_ids, params=params).logits

    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    roles = pj.roles(fn, params, ids, base["mask_full"], places)
    if kind == "prefix":
        tuned = pj.prefix(n).init(KEY, params, roles)
        size = config.hidden_size // config.num_attention_heads
        kv = saved["prompt_embeddings"].reshape(n, 2 * config.num_hidden_layers, config.num_key_value_heads, size)
        rows = {}
        for i in range(config.num_hidden_layers):
            keys, values = unrotated(kv[:, 2 * i], config.rope_theta), kv[:, 2 * i + 1]
            for name, x in (("k_proj", keys), ("v_proj", values)):
                rows[f"model/layers/{i}/self_attn/{name}/kernel/prefix"] = x.reshape(n, -1)
    else:
        tuned = pj.prompt(n).init(KEY, params, roles)
        rows = {"model/embed_tokens/embedding/prompt": saved["prompt_embeddings"]}
    tuned = with_values(tuned, rows)
    apply = pj.wrap_tokens(fn)
    for name in MASKS:
        mask, want = base[f"mask_{name}"], ref[f"logits_{name}"]
        close(apply(tuned, ids, mask, places), want[:, want.shape[1] - ids.shape[1] :], mask[..., None])
        bare = fn(params, ids, mask, places)
        close(apply(pj.disable(tuned), ids, mask, places), bare, mask[..., None])
