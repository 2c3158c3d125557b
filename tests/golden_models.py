"""The golden adapters: files that other libraries saved, and the logits that their models gave with them."""

import contextlib
import functools
import json
import pathlib
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

import peftjax as pj

GOLDEN = pathlib.Path(__file__).parent / "golden"
MASKS = ("full", "rightpad", "leftpad")
SOFT = ("prompt", "ptuning", "prefix")  # with virtual tokens


def adapters(model):
    """The names of the adapters that HF peft saved for a model."""
    return sorted(p.name for p in (GOLDEN / model).iterdir() if p.is_dir() and p.name != "base")


LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def flax_tree(tensors, tree):
    """Torch's tensors as the parameters, or the variables, of an unmodified Flax model."""
    made = {}
    for path in flatten_dict(tree):
        if path[0] == "lm_head" and "lm_head.weight" not in tensors:
            continue  # it is the table
        modules = [re.sub(r"^layer_(?=\d)", "", name) for name in path[:-1] if name not in ("params", "batch_stats")]
        tensor = tensors[".".join((*modules, LAST.get(path[-1], path[-1])))]
        turned = (2, 3, 1, 0) if tensor.ndim == 4 else (1, 0)
        made[path] = jax.device_put(tensor.transpose(turned) if path[-1] == "kernel" else tensor)
    return unflatten_dict(made)


KINDS = {
    "bert": ("BertConfig", "FlaxBertForSequenceClassification"),
    "roberta": ("RobertaConfig", "FlaxRobertaForSequenceClassification"),
    "llama": ("LlamaConfig", "FlaxLlamaForCausalLM"),
    "tied": ("LlamaConfig", "FlaxLlamaForCausalLM"),
    "gpt2": ("GPT2Config", "FlaxGPT2LMHeadModel"),
    "t5": ("T5Config", "FlaxT5ForConditionalGeneration"),
    "bart": ("BartConfig", "FlaxBartForConditionalGeneration"),
    "resnet": ("ResNetConfig", "FlaxResNetForImageClassification"),
}
SEQ2SEQ = ("t5", "bart")
KEY_HEADS = {"bert": 4, "llama": 2, "gpt2": 4}


@contextlib.contextmanager
def usual():
    """JAX as transformers' models expect it: its usual promotions, and the names that `clip` had."""
    clip, renamed = jnp.clip, {"a_min": "min", "a_max": "max"}
    jnp.clip = lambda x, *args, **kwargs: clip(x, *args, **{renamed.get(k, k): v for k, v in kwargs.items()})
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        jnp.clip = clip


@functools.lru_cache
def built(name):
    """An unmodified Flax model of transformers, and the parameters that its adapters are for."""
    import transformers

    config, kind = (getattr(transformers, n) for n in KINDS[name])
    folder = GOLDEN / name / "base"
    with warnings.catch_warnings(), usual():
        warnings.simplefilter("ignore")
        made = kind(config.from_json_file(folder / "config.json"), _do_init=False)
    return made, flax_tree(load_file(folder / "model.safetensors"), made.params_shape_tree)


@functools.lru_cache
def model(name):
    """Such a model as a function of parameters, ids and mask; its parameters, roles, ids, and the masks.

    One of images has these in the place of ids, and a mask that it does not look at.
    """
    made, params = built(name)
    given = np.load(GOLDEN / name / "base" / "ref.npz")
    if "pixel_values" in given:
        fn, pixels = lambda params, pixels, mask: of_images(made, params, pixels), jnp.asarray(given["pixel_values"])
        return fn, params, pj.roles(fn, params, pixels, None), pixels, {"full": None}
    ids, masks = jnp.asarray(given["input_ids"]), {k: jnp.asarray(given[f"mask_{k}"]) for k in MASKS}

    def fn(params, ids, mask, positions=None):
        if name == "tied":
            params = {**params, "lm_head": {"kernel": params["model"]["embed_tokens"]["embedding"].T}}
        with usual():
            return made(ids, attention_mask=mask, position_ids=positions, params=params).logits

    def of_two(params, ids, mask, decoder_ids=None, decoder_mask=None, decoder_positions=None):
        more = {"decoder_input_ids": given["decoder_input_ids"] if decoder_ids is None else decoder_ids}
        more |= {"decoder_attention_mask": decoder_mask}
        more |= {} if name == "t5" else {"decoder_position_ids": decoder_positions}
        with usual():
            return made(ids, attention_mask=mask, params=params, **more).logits

    fn = of_two if name in SEQ2SEQ else fn
    return fn, params, pj.roles(fn, params, ids, masks["full"]), ids, masks


def of_images(made, params, pixels):
    """The logits of a Flax model of images."""
    with usual():
        return made(pixels, params=params).logits


def repaged(name, adapter, folder, **changes):
    """A copy of an adapter, in a folder, whose page says otherwise; `...` takes a key out."""
    shutil.copytree(GOLDEN / name / adapter, folder)
    page = {**json.loads((folder / "adapter_config.json").read_text()), **changes}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in page.items() if v is not ...}))


def known(name, adapter):
    """What a reader and a writer have to know: of rotary positions, and of names that Flax changed."""
    rotary = {"rope": 10000.0} if (name, adapter) == ("llama", "prefix") else {}
    return rotary | ({"names": {r"(.*)/layer_(\d+/.*)": r"\1/\2", "(.*)": r"\1"}} if name == "resnet" else {})


def wrapped(name, adapter):
    """The model that runs a tree with an adapter, as peft runs it: `apply(tuned, ids, mask)`."""
    fn, _, _, ids, _ = model(name)
    if adapter not in SOFT:
        return jax.jit(pj.wrap(fn))
    if name in SEQ2SEQ and adapter == "prefix":
        decoder_ids = jnp.asarray(np.load(GOLDEN / name / "base" / "ref.npz")["decoder_input_ids"])
        more = (decoder_ids, jnp.ones_like(decoder_ids))
        more += () if name == "t5" else (np.broadcast_to(np.arange(decoder_ids.shape[1]), decoder_ids.shape),)
        positions = "decoder_positions" if len(more) > 2 else None
        run = pj.wrap_tokens(fn, ids="decoder_ids", mask="decoder_mask", positions=positions)
        return jax.jit(lambda tuned, ids, mask: run(tuned, ids, mask, *more))
    if name in SEQ2SEQ:
        return jax.jit(pj.wrap_tokens(fn, ids="ids", mask="mask", side="first"))
    first = name == "bert" and adapter != "prefix"
    options = {"side": "first", "check": False} if first else {"shift": True}
    run = pj.wrap_tokens(fn, ids="ids", mask="mask", positions="positions", **options)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return jax.jit(lambda tuned, ids, mask: run(tuned, ids, mask, positions))


def errors(name, folder, apply, tuned):
    """max|difference| / max|reference| of the logits of real tokens, under each mask."""
    _, _, _, ids, masks = model(name)
    reference, found = np.load(folder / "ref.npz"), {}
    for kind, mask in masks.items():
        want = reference[f"logits_{kind}"]
        got = np.asarray(apply(tuned, ids, mask))
        real = np.asarray(mask)[:, :, None] if want.ndim == 3 and name not in SEQ2SEQ else 1
        if name not in SEQ2SEQ and want.ndim == 3:  # peft keeps the rows of prompts
            want = want[:, want.shape[1] - ids.shape[1] :]
        found[kind] = float(np.abs((got - want) * real).max() / np.abs(want).max())
    return found
