"""Reading and writing files of tensors, strictly: every fault is a ValueError that says what and where."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from peftjax.interop.pickles import read_pickle

DTYPES = {
    **{"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64, "BOOL": np.bool_},
    **{
        f"{kind}{bits}": np.dtype(f"{name}{bits}")
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}


class Tensors(NamedTuple):
    """The tensors of a file, and by name what is wrong with those that cannot be had, or are there twice."""

    file: Path
    found: Mapping[str, np.ndarray]
    faults: Mapping[str, str]


def read_folder(folder: Path, tensors: str, pickle: str, pickles: bool) -> Tensors:
    """The tensors in a folder: from its file of safetensors, or from a pickle where that is asked for.

    Raises:
      ValueError: there is neither, only a pickle that was not asked for, or the file is damaged.
    """
    if (folder / tensors).is_file() or not (folder / pickle).is_file():
        return read_tensors(folder / tensors)
    if not pickles:
        raise ValueError(
            f"{folder} has no {tensors}, but a {pickle}: a pickle, which is a program. `pickles=True` reads it without "
            "running it, and admits tensors alone"
        )
    return Tensors(folder / pickle, read_pickle(folder / pickle), {})


def read_tensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file.

    Raises:
      ValueError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        views, twice = _views(path.read_bytes())
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None
    odd = {name: view["dtype"] for name, view in views.items() if view["dtype"] not in DTYPES}
    faults = {name: f"type: {name} is {kind}, expected one of {', '.join(DTYPES)}" for name, kind in odd.items()}
    faults |= {name: f"twice: {name} stands in the file more than once" for name in twice}
    return Tensors(path, {name: _array(view) for name, view in views.items() if name not in odd}, faults)


def _views(data: bytes) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The tensors of a file, and the names that stand twice, which safetensors itself lets pass, or calls damage."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"its header would be {size} bytes long, and the file has {len(data)}")
    header = json.loads(data[8 : 8 + size].decode(), object_pairs_hook=_Pairs)
    twice = header.twice if isinstance(header, _Pairs) else []
    for inner in header.values() if isinstance(header, _Pairs) else ():
        _once(inner)
    try:
        return dict(deserialize(data)), twice
    except SafetensorError:
        if not twice:
            raise
        apart = {f"{name}\0{k}" if name in twice else name: x for k, (name, x) in enumerate(header.pairs)}
        text = json.dumps(apart).encode()
        found = deserialize(len(text).to_bytes(8, "little") + text + data[8 + size :])
        return {name.partition("\0")[0]: view for name, view in found}, twice


class _Pairs(dict[str, Any]):
    """An object of JSON, with all of its pairs, and the keys that stand twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs
        self.twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)


def _once(x: Any) -> Any:
    if isinstance(x, _Pairs) and x.twice:
        raise ValueError(f"keys that stand there twice: {', '.join(x.twice)}")
    return x


def unique_json(text: str) -> Any:
    """Parses JSON in which no key stands twice in one object.

    Raises:
      ValueError: it is no JSON, or a key stands twice.
    """
    return json.loads(text, object_pairs_hook=lambda pairs: _once(_Pairs(pairs)))


def _array(view: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(view["data"], DTYPES[view["dtype"]]).reshape(view["shape"])


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file as torch's libraries mark it."""
    save_file({name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}, path, metadata={"format": "pt"})
