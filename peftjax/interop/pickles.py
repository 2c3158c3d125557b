"""Tensors in torch's `.bin` files, read without running them: an interpreter that knows dictionaries and tensors alone.

A pickle is a program, and the usual reader calls whatever it names. This one follows the few instructions that
`torch.save` writes for a dictionary of tensors, calls nothing, and refuses every other instruction and name.
"""

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

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
ADMITTED = {DICTIONARY, TENSOR, PARAMETER, *(("torch", name) for name in STORAGES)}
LIMIT = 1_000_000  # instructions; a state of a thousand tensors takes some thirty thousand
VALUES = {"BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(NamedTuple):
    """A name that the program may use; it stands for itself and is never looked up."""

    module: str
    name: str


class Mark:
    """Where a run of items begins on the stack."""


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.bin` file that `torch.save` wrote: a flat dictionary of tensors.

    Raises:
      ValueError: the file is missing, damaged, of the format before torch 1.6, or holds anything but tensors; what it
        asks for is named, and never run.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no zip file: truncated, or written before torch 1.6; save it anew with safetensors"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _tensors(archive)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _tensors(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    programs = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"it has {len(programs)} entries called data.pkl, expected one")
    root = programs[0].removesuffix("data.pkl")
    order = root + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are not little-endian")
    found = Program(archive, root).run(_entry(archive, programs[0]))
    if not isinstance(found, dict) or not all(isinstance(x, np.ndarray) for x in found.values()):
        raise ValueError("it holds no flat dictionary of tensors")
    if bad := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"its tensors have names that are no strings: {bad[:3]}")
    return found


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed, which torch never does")
    return archive.read(name)


class Program:
    """The machine: a stack, a memory, and the file's other entries for the numbers of tensors."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self.archive, self.root = archive, root
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def run(self, code: bytes) -> Any:
        """What the program leaves on the stack."""
        for count, (op, argument, _) in enumerate(pickletools.genops(code)):
            if count > LIMIT:
                raise ValueError(f"more than {LIMIT} instructions")
            if op.name == "STOP":
                if len(self.stack) != 1:
                    raise ValueError(f"it ends with {len(self.stack)} values, expected one")
                return self.stack.pop()
            self._step(op.name, argument)
        raise ValueError("it does not end")

    def _step(self, op: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        if op in VALUES:
            push(argument)
        elif op in CONSTANTS:
            push(CONSTANTS[op])
        elif op in ("PROTO", "FRAME"):
            pass
        elif op == "MARK":
            push(Mark)
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            push({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[op])
        elif op in TUPLES or op == "TUPLE":
            push(tuple(reversed([pop() for _ in range(TUPLES[op])])) if op in TUPLES else tuple(self._run()))
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memory[len(self.memory) if argument is None else argument] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            push(self.memory[argument])
        elif op == "GLOBAL":
            push(_admitted(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = pop(), pop()
            push(_admitted(module, name))
        elif op in ("SETITEM", "SETITEMS"):
            items = self._run() if op == "SETITEMS" else list(reversed([pop(), pop()]))
            self._of(dict).update(zip(items[::2], items[1::2], strict=True))
        elif op in ("APPEND", "APPENDS"):
            items = self._run() if op == "APPENDS" else [pop()]
            self._of(list).extend(items)
        elif op == "BINPERSID":
            push(self._storage(pop()))
        elif op == "REDUCE":
            arguments, name = pop(), pop()
            push(_made(name, arguments))
        elif op == "BUILD":
            pop()  # the versions of modules that a state dictionary carries
            self._of(dict)
        else:
            raise ValueError(f"it uses the instruction {op}, which no dictionary of tensors needs")

    def _run(self) -> list[Any]:
        start = max(k for k, x in enumerate(self.stack) if x is Mark)  # by identity: tensors compare by element
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def _of(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"it fills a {type(self.stack[-1]).__name__}, expected a {kind.__name__}")
        return self.stack[-1]

    def _storage(self, reference: Any) -> np.ndarray:
        kind, name, key, _, count = reference
        if kind != "storage" or not isinstance(name, Name) or name.name not in STORAGES or not str(key).isalnum():
            raise ValueError(f"it refers to {reference!r}, expected numbers of a tensor")
        data = _entry(self.archive, f"{self.root}data/{key}")
        numbers = np.frombuffer(data, STORAGES[name.name])
        if numbers.size != count:
            raise ValueError(f"data/{key} holds {numbers.size} numbers, expected {count}")
        return numbers


def _admitted(module: Any, name: Any) -> Name:
    if (module, name) not in ADMITTED:
        raise ValueError(f"it asks for {module}.{name}, which is not run; only tensors are read")
    return Name(module, name)


def _made(name: Any, arguments: Any) -> Any:
    if name == DICTIONARY and arguments == ():
        return {}
    if name == PARAMETER and isinstance(arguments[0], np.ndarray):
        return arguments[0]
    if name != TENSOR or not isinstance(arguments[0], np.ndarray):
        raise ValueError(f"it makes something of {name!r}, expected a tensor")
    numbers, offset, size, stride = arguments[:4]
    if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError(f"a tensor has size {size}, stride {stride} and offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) and (last >= numbers.size or math.prod(size) > numbers.size):
        raise ValueError(f"a tensor of size {size} and stride {stride} does not lie in {numbers.size} numbers")
    steps = [step * numbers.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(numbers[offset:], size, steps, writeable=False).copy()
