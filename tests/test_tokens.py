"""Virtual tokens: HF peft's files on unmodified Flax models, what the wrapper inserts, takes out, and refuses."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

import peftjax as pj

GOLDEN = pathlib.Path(__file__).parent / "golden"
KEY = jax.random.key(3)


# HF peft's files


def flax_tree(tensors, like):
    """A checkpoint's tensors in a Flax tree: kernels turned to (in, out)."""
    named = {}
    for path in flatten_dict(like):
        x = tensors[".".join(path[:-1]) + (".bias" if path[-1] == "bias" else ".weight")]
        named[path] = jnp.asarray(x.T if path[-1] == "kernel" else x)
    return unflatten_dict(named)


def golden(name, config, model):
    """The model of transformers, its parameters, and the base's ids and masks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = model(config.from_json_file(GOLDEN / name / "base/config.json"))
    params = flax_tree(load_file(GOLDEN / name / "base/model.safetensors"), made.params)
    return made, params, np.load(GOLDEN / name / "base/ref.npz")


def close(got, want, mask=1.0):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert (np.abs(got - want) * mask).max() <= 1e-5 * np.abs(want).max()


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    return golden("bert", transformers.BertConfig, transformers.FlaxBertForSequenceClassification)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    return golden("llama", transformers.LlamaConfig, transformers.FlaxLlamaForCausalLM)


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
