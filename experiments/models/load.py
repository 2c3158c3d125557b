"""Reads a Hugging Face checkpoint of BERT, strictly: a `config.json` and a `model.safetensors`."""

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.flax import load_file

from experiments.models.bert import Bert, Config, read_config

KNOWN = "minilm"  # the model that has this name is fetched, whatever folder has it, too
FILES = ("config.json", "model.safetensors", "tokenizer.json")
# What a checkpoint may hold beside the encoder: an index that newer versions compute, and the heads of other tasks.
IGNORED = re.compile(r"(embeddings\.position_ids|(cls|classifier|qa_outputs)\..*)")


def is_folder(model: str) -> bool:
    """Whether a model's name is that of a folder."""
    return model != KNOWN and Path(model).is_dir()


def folder_of(model: str) -> Path:
    """The folder of a checkpoint: a local one, or one of the Hugging Face hub, by its id.

    Raises:
      ValueError: the folder lacks a file, or the hub cannot be reached.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ValueError(f"model {model!r} is no folder, nor can it be the id of a model on the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except Exception as error:
        raise ValueError(
            f"model {model!r} is no folder, and could not be had from the Hugging Face hub ({type(error).__name__}). "
            "Without a network, give a folder with config.json, model.safetensors and tokenizer.json, or leave the "
            "default model"
        ) from error


def identity(model: str) -> dict[str, str]:
    """What, beside its name, tells a local checkpoint from what its folder held before; nothing of one of the hub."""
    if not is_folder(model):
        return {}
    whole = hashlib.sha256()
    for name in FILES:
        if (path := Path(model) / name).is_file():
            whole.update(name.encode() + _digest(path, path.stat().st_size, path.stat().st_mtime_ns))
    return {"model_digest": whole.hexdigest()}


@functools.lru_cache
def _digest(path: Path, size: int, changed: int) -> bytes:
    """That of a file, read once for as long as it keeps its size and the time of its last change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def load(folder: str | Path, pool: str = "mean") -> tuple[Config, dict[str, Any]]:
    """The encoder in a folder.

    Args:
      folder: holds `config.json` and `model.safetensors`.
      pool: as `Bert` has it; the pooler's weights are read for "first" alone.

    Returns:
      Its configuration and its parameters, float32, as `Bert(config, pool)` takes them.

    Raises:
      ValueError: a file is missing or damaged, or the tensors are not those of the configuration: lists every one that
        is missing, left over or of another shape.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}; found {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}"
            )
    config = read_config(folder / "config.json")
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged: {error}") from error
    return config, _strict(tensors, config, pool, folder)


def _strict(tensors: dict[str, jax.Array], config: Config, pool: str, folder: Path) -> dict[str, Any]:
    found = {n.removeprefix("bert."): x for n, x in tensors.items()}
    found = {path_of(n): x.T if _is_kernel(n) else x for n, x in found.items() if not IGNORED.fullmatch(n)}
    if pool != "first":
        found = {path: x for path, x in found.items() if not path.startswith("pooler/")}
    expected = shapes(config, pool)
    faults = [f"missing: {path} {expected[path]}" for path in expected if path not in found]
    faults += [f"not in the model: {path} {x.shape}" for path, x in found.items() if path not in expected]
    both = [path for path in expected if path in found]
    faults += [f"{p}: found {found[p].shape}, expected {expected[p]}" for p in both if found[p].shape != expected[p]]
    if faults:
        raise ValueError(f"{folder}: the tensors are not those that config.json describes:\n  " + "\n  ".join(faults))
    return unflatten_dict({path: found[path].astype(jnp.float32) for path in expected}, sep="/")


def shapes(config: Config, pool: str) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    ids = jnp.zeros((1, 2), jnp.int32)
    tree = jax.eval_shape(Bert(config, pool).init, jax.random.key(0), ids, ids)["params"]
    return {path: x.shape for path, x in flatten_dict(tree, sep="/").items()}


def _is_kernel(name: str) -> bool:
    return name.endswith(".weight") and "LayerNorm" not in name and "_embeddings" not in name


def path_of(name: str) -> str:
    """The path of a tensor: `encoder.layer.0.output.dense.weight` is `encoder/layer/0/output/dense/kernel`."""
    module, _, last = name.rpartition(".")
    weight = "scale" if "LayerNorm" in name else "embedding" if "_embeddings" in name else "kernel"
    # LayerNorm's "gamma" and "beta" are the names of the first checkpoints.
    return "/".join([*module.split("."), {"weight": weight, "gamma": "scale", "beta": "bias"}.get(last, last)])
