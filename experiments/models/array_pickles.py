"""Numpy arrays in a pickle, read without running it: dictionaries and lists of arrays, and nothing else."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.interop.pickle_machine import Name, Program

MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before numpy 2, and since
KINDS = ("f2", "f4", "f8", "i4", "i8", "u1")


@dataclasses.dataclass
class Kind:
    """A dtype, whose byte order comes after it."""

    name: str
    order: str = ""


@dataclasses.dataclass
class Held:
    """An array, whose numbers come after it."""

    array: np.ndarray | None = None


class Arrays:
    """The format: numpy's names stand for `Kind` and `Held`."""

    admitted = {*((m, "_reconstruct") for m in MODULES), ("numpy", "ndarray"), ("numpy", "dtype")}

    def persistent(self, reference: Any) -> Any:
        """Nothing: all that such a file holds is in its program."""
        raise ValueError(f"it refers to {reference!r} outside")

    def made(self, name: Any, arguments: Any) -> Any:
        """A dtype or an array, both still empty."""
        if name == ("numpy", "dtype") and arguments[0] in KINDS:
            return Kind(arguments[0])
        if isinstance(name, Name) and name.name == "_reconstruct" and arguments[0] == ("numpy", "ndarray"):
            return Held()
        raise ValueError(f"it makes something of {name!r} and {arguments!r}, expected an array of {', '.join(KINDS)}")

    def built(self, value: Any, state: Any) -> Any:
        """The same value, filled."""
        if isinstance(value, Kind) and state[1] in ("<", "|"):
            value.order = state[1]
        elif isinstance(value, Held) and value.array is None:
            value.array = _array(*state[1:])
        else:
            raise ValueError(f"it fills {value!r}, expected an array, once, or a little-endian dtype")
        return value


def _array(shape: Any, kind: Any, fortran: Any, data: Any) -> np.ndarray:
    if not isinstance(kind, Kind) or not isinstance(data, bytes) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array has shape {shape}, dtype {kind!r} and numbers of {type(data).__name__}")
    numbers = np.frombuffer(data, kind.order + kind.name)
    if numbers.size != math.prod(shape):
        raise ValueError(f"an array of shape {shape} has {numbers.size} numbers")
    return numbers.reshape(shape, order="F" if fortran else "C")


def read_arrays(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle: arrays by name, or lists of them.

    Raises:
      ValueError: the file is missing, damaged, or holds anything but arrays; what it asks for is named, and never run.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        found = _plain(Program(Arrays()).run(path.read_bytes()))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or holds more than arrays: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds no dictionary of arrays by name")
    return found


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, list):
        return [_plain(value) for value in x]
    if isinstance(x, Held) and x.array is not None:
        return x.array
    raise ValueError(f"it holds {type(x).__name__}, expected arrays")
