"""The golden adapters: files that other libraries saved, and the logits that their models gave with them."""

import functools
import pathlib
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


def flax_tree(tensors, tree):
    """Torch's tensors as the parameters of an unmodified Flax model."""
    made = {}
    for path in flatten_dict(tree):
        tensor = tensors[".".join((*path[:-1], "bias" if path[-1] == "bias" else "weight"))]
        made[path] = jnp.asarray(tensor.T if path[-1] == "kernel" else tensor)
    return unflatten_dict(made)


@functools.lru_cache
def built(name):
    """An unmodified Flax model of transformers, and the parameters that its adapters are for."""
    import transformers

    kinds = {
        "bert": ("BertConfig", "FlaxBertForSequenceClassification"),
        "llama": ("LlamaConfig", "FlaxLlamaForCausalLM"),
    }
    config, kind = (getattr(transformers, n) for n in kinds[name])
    folder = GOLDEN / name / "base"
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        made = kind(config.from_json_file(folder / "config.json"))
    return made, flax_tree(load_file(folder / "model.safetensors"), made.params)


@functools.lru_cache
def model(name):
    """Such a model as a function of parameters, ids and mask; its parameters, roles, ids, and the masks."""
    made, params = built(name)
    given = np.load(GOLDEN / name / "base" / "ref.npz")
    ids, masks = jnp.asarray(given["input_ids"]), {k: jnp.asarray(given[f"mask_{k}"]) for k in MASKS}

    def fn(params, ids, mask, positions=None):
        return made(ids, attention_mask=mask, position_ids=positions, params=params).logits

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        roles = pj.roles(fn, params, ids, masks["full"])
    return fn, params, roles, ids, masks


def wrapped(name, adapter):
    """The model that runs a tree with an adapter, as peft runs it: `apply(tuned, ids, mask)`."""
    fn, _, _, ids, _ = model(name)
    if adapter not in SOFT:
        return jax.jit(pj.wrap(fn))
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
        real = np.asarray(mask)[:, :, None] if want.ndim == 3 else 1
        want = want if want.ndim < 3 else want[:, want.shape[1] - ids.shape[1] :]  # peft keeps the rows of prompts
        found[kind] = float(np.abs((got - want) * real).max() / np.abs(want).max())
    return found
