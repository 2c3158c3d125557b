"""Tensors in the files that `torch.save` writes, read without torch and without running them.

There are two: since torch 1.6 a zip file of the program and of one entry per storage, before that one stream of
programs with the storages behind them.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import IO, Any, Callable, Collection, NamedTuple

import jax.numpy as jnp
import numpy as np

from peftjax.interop.pickle_machine import Name, Program

STORAGES = {
    **{
        "FloatStorage": np.float32,
        "DoubleStorage": np.float64,
        "HalfStorage": np.float16,
        "BFloat16Storage": jnp.bfloat16,
    },
    **{"LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8},
    **{"ByteStorage": np.uint8, "BoolStorage": np.bool_},
}
DICTIONARY, TENSOR = ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")
PARAMETER = ("torch._utils", "_rebuild_parameter")
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what a file before torch 1.6 begins with


class Storage(NamedTuple):
    """Numbers of tensors that lie elsewhere in the file: their kind, what they are called there, how many."""

    kind: Any
    key: str
    length: int


class View(NamedTuple):
    """A tensor: a part of the numbers of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor, of the storage's numbers."""
        steps = [step * numbers.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.size, steps, writeable=False).copy()


class Tensors:
    """The format of a dictionary of tensors: torch's names stand for `Storage` and `View`."""

    admitted: Collection[tuple[str, str]] = {DICTIONARY, TENSOR, PARAMETER, *(("torch", name) for name in STORAGES)}

    def persistent(self, reference: Any) -> Storage:
        """A storage."""
        kind, name, key, _, count, *rest = reference
        known = isinstance(name, Name) and name.name in STORAGES
        if kind != "storage" or not known or not str(key).isalnum() or type(count) is not int or any(rest):
            raise ValueError(f"it refers to {reference!r}, expected numbers of a tensor")
        return Storage(STORAGES[name.name], str(key), count)

    def made(self, name: Any, arguments: Any) -> Any:
        """A tensor, or the dictionary that holds them."""
        if name == DICTIONARY and arguments == ():
            return {}
        if name == PARAMETER and isinstance(arguments[0], View):
            return arguments[0]
        if name != TENSOR or not isinstance(arguments[0], Storage):
            raise ValueError(f"it makes something of {name!r}, expected a tensor")
        storage, offset, size, stride = arguments[:4]
        if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
            raise ValueError(f"a tensor has size {size}, stride {stride} and offset {offset}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        if math.prod(size) and (last >= storage.length or math.prod(size) > storage.length):
            raise ValueError(f"a tensor of size {size} and stride {stride} does not lie in {storage.length} numbers")
        return View(storage, offset, tuple(size), tuple(stride))

    def built(self, value: Any, state: Any) -> Any:
        """A state dictionary, without the versions of modules that it carries."""
        if type(value) is not dict:
            raise ValueError(f"it fills a {type(value).__name__}, expected a dict")
        return value


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save` wrote: a flat dictionary of tensors.

    Raises:
      ValueError: the file is missing, damaged, or holds anything but tensors; what it asks for is named, and never run.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _from_zip(archive)
        return _from_stream(path.read_bytes())
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _from_zip(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    programs = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"it has {len(programs)} entries called data.pkl, expected one")
    root = programs[0].removesuffix("data.pkl")
    order = root + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are not little-endian")
    found = _dictionary(io.BytesIO(_entry(archive, programs[0])))
    return _filled(found, lambda key: _entry(archive, f"{root}data/{key}"))


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed, which torch never does")
    return archive.read(name)


def _from_stream(data: bytes) -> dict[str, np.ndarray]:
    file, read = io.BytesIO(data), lambda: Program(Tensors()).run(file)
    if not data.startswith(b"\x80") or read() != MAGIC or read() != PROTOCOL:
        raise ValueError("it is no zip file, nor does it begin as those before torch 1.6 do")
    if not read()["little_endian"]:
        raise ValueError("its numbers are not little-endian")
    found, keys = _dictionary(file), read()
    storages = {view.storage.key: view.storage for view in found.values()}
    lying: dict[str, bytes] = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        size = count * np.dtype(storages[key].kind).itemsize if key in storages else -1
        if not 0 <= size <= len(data) - file.tell() or key in lying:
            raise ValueError(f"the storage {key} is cut off, there twice, or of no tensor")
        lying[key] = file.read(size)
    if file.read(1):
        raise ValueError("it goes on behind its last storage")
    return _filled(found, lying.__getitem__)


def _dictionary(file: IO[bytes]) -> dict[str, View]:
    found = Program(Tensors()).run(file)
    if not isinstance(found, dict) or not all(isinstance(x, View) for x in found.values()):
        raise ValueError("it holds no flat dictionary of tensors")
    if bad := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"its tensors have names that are no strings: {bad[:3]}")
    return found


def _filled(found: dict[str, View], read: Callable[[str], bytes]) -> dict[str, np.ndarray]:
    return {name: view.of(_numbers(view.storage, read(view.storage.key))) for name, view in found.items()}


def _numbers(storage: Storage, data: bytes) -> np.ndarray:
    numbers = np.frombuffer(data, storage.kind)
    if numbers.size != storage.length:
        raise ValueError(f"data/{storage.key} holds {numbers.size} numbers, expected {storage.length}")
    return numbers
