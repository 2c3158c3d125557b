"""Reading and writing files of tensors, strictly: every fault is a ValueError that says what and where."""

import json
from pathlib import Path
from typing import Any, Mapping

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


def read_folder(folder: Path, tensors: str, pickle: str, pickles: bool) -> tuple[Path, dict[str, np.ndarray]]:
    """The tensors in a folder, and the file they are in: that of safetensors, or a pickle where that is asked for.

    Raises:
      ValueError: there is neither, only a pickle that was not asked for, or the file is damaged.
    """
    if (folder / tensors).is_file() or not (folder / pickle).is_file():
        return folder / tensors, read_tensors(folder / tensors)
    if not pickles:
        raise ValueError(
            f"{folder} has no {tensors}, but a {pickle}: a pickle, which is a program. `pickles=True` reads it without "
            "running it, and admits tensors alone"
        )
    return folder / pickle, read_pickle(folder / pickle)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.safetensors` file.

    Raises:
      ValueError: the file is missing, damaged, or holds a type of number that NumPy and JAX do not have.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    data = path.read_bytes()
    try:
        _check_header(data)
        found = deserialize(data)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None
    return {name: _array(path, name, view) for name, view in found}


def _check_header(data: bytes) -> None:
    """What the reader of safetensors lets pass: a name that stands twice, the later one hiding the earlier."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"its header would be {size} bytes long, and the file has {len(data)}")
    unique_json(data[8 : 8 + size].decode())


def unique_json(text: str) -> Any:
    """Parses JSON in which no key stands twice in one object.

    Raises:
      ValueError: it is no JSON, or a key stands twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
            raise ValueError(f"keys that stand there twice: {', '.join(twice)}")
        return made

    return json.loads(text, object_pairs_hook=once)


def _array(path: Path, name: str, view: Mapping[str, Any]) -> np.ndarray:
    if view["dtype"] not in DTYPES:
        raise ValueError(f"{path}: {name} is of type {view['dtype']}; expected one of {', '.join(DTYPES)}")
    return np.frombuffer(view["data"], DTYPES[view["dtype"]]).reshape(view["shape"])


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file as torch's libraries mark it."""
    save_file({name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}, path, metadata={"format": "pt"})
