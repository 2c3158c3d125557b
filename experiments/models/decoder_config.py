"""What a `config.json` of Hugging Face says of a decoder of the Llama family, in the words of transformers 4 or 5."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, Mapping

import jax.numpy as jnp

# What another key would change, and this model does not do.
PLAIN = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
}
TYPES = ("llama", "mistral")  # which are alike but for the window
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The numbers of each kind of rotary positions.
ROPE = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a checkpoint's `config.json` says of the model, in its words."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Any = None  # the numbers of llama3, as pairs
    tie_word_embeddings: bool = False
    remat: str = "layers"  # what is computed again: whole layers, all but "products", or "none"
    dtype: Any = jnp.bfloat16
    block: int = 1024  # how many queries attention takes at a time: of the keys, each block sees those that it may
    stream: Any = None  # where the stream (B, T, D) lies, a NamedSharding; None leaves it to the compiler


def read_config(path: str | Path, **changes: Any) -> Config:
    """The model that a `config.json` of Hugging Face describes.

    Args:
      path: the file, or the folder that holds it.
      **changes: fields of `Config` that are not the file's to say.

    Raises:
      ValueError: it is damaged, lacks a number, has one that is none, or describes what this model does not do.
    """
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        page = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a config.json of the Llama family ({error})") from error
    if not isinstance(page, dict):
        raise ValueError(f"{path}: expected a config.json of the Llama family, found {type(page).__name__}")
    try:
        return Config(**{**_fields(_said(page)), **changes})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _said(page: Mapping[str, Any]) -> dict[str, Any]:
    """A page without its nulls, which stand for what is not said."""
    return {key: value for key, value in page.items() if value is not None}


def _fields(said: Mapping[str, Any]) -> dict[str, Any]:
    if (kind := said.get("model_type", TYPES[0])) not in TYPES:
        raise ValueError(f"model_type is {kind!r}, expected {' or '.join(TYPES)}: this decoder is no other")
    if experts := [key for key in said if re.search("expert", key) and said[key]]:
        raise ValueError(f"{experts[0]} is {said[experts[0]]!r}, expected none: this decoder has no experts")
    for key, value in PLAIN.items():
        if said.get(key, value) != value:
            raise ValueError(f"{key} is {said[key]!r}, expected {value!r}: this decoder has no other")
    if type(tied := said.get("tie_word_embeddings", False)) is not bool:
        raise ValueError(f"tie_word_embeddings is {tied!r}, expected false or true")
    others = {"rms_norm_eps": _number("rms_norm_eps", said["rms_norm_eps"])} if "rms_norm_eps" in said else {}
    return {**_sizes(said), **_rope(said), **others, "tie_word_embeddings": tied}


def _sizes(said: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers, of which those of keys and values and of a head may be left to the others."""
    if lacking := [key for key in SIZES if key not in said]:
        raise ValueError(f"it says nothing of {', '.join(lacking)}; expected a config.json of the Llama family")
    made = {key: _whole(key, said[key]) for key in (*SIZES, "num_key_value_heads", "head_dim") if key in said}
    heads, width = made["num_attention_heads"], made["hidden_size"]
    if heads % made.setdefault("num_key_value_heads", heads):
        found = made["num_key_value_heads"]
        raise ValueError(f"num_key_value_heads is {found}, expected a divisor of num_attention_heads, {heads}")
    if "head_dim" not in made and width % heads:
        raise ValueError(f"num_attention_heads is {heads}, expected a divisor of hidden_size, {width}, or a head_dim")
    if made.setdefault("head_dim", width // heads) % 2:
        raise ValueError(f"head_dim is {made['head_dim']}, expected an even number: its features turn in pairs")
    return made


def _rope(said: Mapping[str, Any]) -> dict[str, Any]:
    """The base and the scaling of rotary positions, of which `rope_parameters` of transformers 5 holds both."""
    found = {key: _positions(key, said[key]) for key in ("rope_scaling", "rope_parameters") if key in said}
    bases = {f"{key}.rope_theta": one.pop("rope_theta") for key, one in found.items() if "rope_theta" in one}
    if "rope_theta" in said:
        bases["rope_theta"] = _number("rope_theta", said["rope_theta"])
    base, one = _agreed(bases), _agreed(found) or {"rope_type": "default"}
    scaling = tuple((key, one[key]) for key in ROPE[one["rope_type"]]) or None
    return {"rope_scaling": scaling, **({} if base is None else {"rope_theta": base})}


def _positions(where: str, page: Any) -> dict[str, Any]:
    """What a page says of rotary positions under one of its keys: their type, and its numbers."""
    if not isinstance(page, dict):
        raise ValueError(f"{where} is {page!r}, expected an object with a rope_type, or null")
    said = _said(page)
    kind = _rope_type(where, said)
    numbers = {key: _number(f"{where}.{key}", said[key]) for key in ("rope_theta", *ROPE[kind]) if key in said}
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        raise ValueError(f"{where}.low_freq_factor is {low}, expected less than high_freq_factor, {high}")
    return {"rope_type": kind, **numbers}


def _rope_type(where: str, said: Mapping[str, Any]) -> str:
    """The type of rotary positions, whose numbers are all there, and no others."""
    kind = _agreed({f"{where}.{key}": said[key] for key in ("rope_type", "type") if key in said})
    kind = "default" if kind is None else kind
    if kind not in tuple(ROPE):
        raise ValueError(f"{where} is {said}, expected that of llama3, or none")
    if lacking := [key for key in ROPE[kind] if key not in said]:
        raise ValueError(f"{where} says nothing of {', '.join(lacking)}; expected {', '.join(ROPE[kind])} for {kind}")
    if said.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where}.partial_rotary_factor is {said['partial_rotary_factor']!r}, expected 1")
    known = ("rope_type", "type", "partial_rotary_factor", "rope_theta", *ROPE[kind])
    if strange := [key for key in said if key not in known]:
        raise ValueError(f"{where}.{strange[0]} is {said[strange[0]]!r}, expected none where rope_type is {kind!r}")
    return kind


def _agreed(said: Mapping[str, Any]) -> Any:
    """The one value that is said under several names; None where there is none."""
    values = list(said.values())
    if any(value != values[0] for value in values):
        found = ", ".join(f"{key} is {value!r}" for key, value in said.items())
        raise ValueError(f"{found}: expected the same, or one of them alone")
    return values[0] if values else None


def _number(key: str, found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < math.inf:
        raise ValueError(f"{key} is {found!r}, expected a number above 0")
    return found


def _whole(key: str, found: Any) -> int:
    if type(found) is not int or found < 1:
        raise ValueError(f"{key} is {found!r}, expected a whole number, 1 at least")
    return found
