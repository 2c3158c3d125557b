"""The tensors of an adapter: where each lies in the tuned tree, and filling them in, all or none."""

import math
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

import numpy as np

from peftjax.flat import near, replaced
from peftjax.interop.base import Base
from peftjax.interop.layout import Layout, layout
from peftjax.interop.names import Spot
from peftjax.interop.tensors import Tensors
from peftjax.overlay import Overlay, layers
from peftjax.paths import flatten
from peftjax.tree import entries

FLOATING = ("float32", "float16", "bfloat16")


class Block(NamedTuple):
    """The `place`-th of `of` equal parts of a tensor, cut along an axis."""

    axis: int
    place: int
    of: int

    def cut(self, tensor: Any) -> Any:
        """That part."""
        size = tensor.shape[self.axis] // self.of
        part = slice(self.place * size, (self.place + 1) * size)
        return tensor[(slice(None),) * self.axis + (part,)]


class Slot(NamedTuple):
    """A tensor of a file, or a part: its name, the tree's array it is part of (`path/field`), how it lies there."""

    name: str
    key: str
    layout: Layout
    block: Block | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        if self.block is None:
            return self.layout.shape
        return tuple(n * self.block.of if k == self.block.axis else n for k, n in enumerate(self.layout.shape))

    def cut(self, tensor: Any) -> Any:
        """What the slot is of that tensor."""
        return tensor if self.block is None else self.block.cut(tensor)


class Part(NamedTuple):
    """One field of an overlay as a tensor: the field, the tensor's name, and the order of its axes (see `layout`).

    A tensor that belongs to no module has a prefix of its own; one that holds some of the ranks says which.
    """

    field: str
    name: str
    order: Sequence[Any]
    prefix: str | None = None
    ranks: Sequence[int] | None = None


Parts = Callable[[Any, Spot], Iterable[Part]]


def slots(tuned: Any, base: Base, parts: Mapping[type, Parts], prefix: str) -> list[Slot]:
    """The tensors that hold the overlays of a tree.

    Args:
      tuned: the tree.
      base: its parameters by torch name.
      parts: by type of overlay, its fields as tensors; overlays of other types are passed over.
      prefix: what stands before every tensor's name.
    """
    made = []
    for path, leaf in flatten(tuned):
        for depth, x in enumerate(layers(leaf)):
            key = path + "/base" * depth
            made += [
                _slot(x, spot, part, key, prefix)
                for spot in _spots(x, path, base, parts)
                for part in _of(x, spot, parts)
            ]
    return made


def _spots(x: Overlay, path: str, base: Base, parts: Mapping[type, Parts]) -> list[Spot]:
    return base.at(path) if type(x) in parts else []


def _of(x: Overlay, spot: Spot, parts: Mapping[type, Parts]) -> Iterable[Part]:
    return parts[type(x)](x, spot)


def _slot(x: Overlay, spot: Spot, part: Part, key: str, prefix: str) -> Slot:
    value = getattr(x, part.field)
    place = layout(spot, x.labels()[part.field], np.shape(value), part.order, part.ranks)
    return Slot((prefix if part.prefix is None else part.prefix) + part.name, f"{key}/{part.field}", place)


def read_slots(tuned: Any, wanted: Iterable[Slot]) -> dict[str, np.ndarray]:
    """The tensors, from the tree."""
    values, made = {e.key: e.value for e in entries(tuned)}, {}
    for slot in wanted:
        part = slot.layout.read(values[slot.key])
        if slot.block is None:
            made[slot.name] = part
        else:
            slot.cut(made.setdefault(slot.name, np.zeros(slot.shape, part.dtype)))[...] = part
    return made


def fill(tuned: Any, wanted: Sequence[Slot], held: Tensors, beside: Mapping[str, Any]) -> Any:
    """The tree with a file's tensors in its fields.

    Args:
      tuned: a tree that a method has just initialised.
      wanted: the tensors that fill it; together they hold everything that trains.
      held: what the file holds.
      beside: further names the file may hold: an array that must be equal, or None where the value does not count.

    Raises:
      ValueError: lists every tensor that is missing, unknown, there twice, of another shape or type, not finite, or not
        equal.
    """
    tensors, expected = held.found, {slot.name: slot.shape for slot in wanted}
    faults = _misfits(expected, held, beside) or _unequal(wanted, tensors)
    if faults:
        raise ValueError(f"{held.file} does not fit this model:\n  " + "\n  ".join(faults))
    keys = {slot.key for slot in wanted}
    flat = {e.key: np.array(e.value) for e in entries(tuned) if e.key in keys}
    for slot in wanted:
        slot.layout.write(flat[slot.key], slot.cut(tensors[slot.name]).astype(np.float32))
    return replaced(tuned, keys, flat)


def _misfits(expected: Mapping[str, tuple[int, ...]], held: Tensors, beside: Mapping[str, Any]) -> list[str]:
    tensors = held.found
    lost = [n for n in expected if n not in tensors and n not in held.faults]
    faults = [f"missing: {n} {_shape(expected[n])} (nearest: {near(n, tensors)})" for n in lost]
    faults += held.faults.values()
    for name, tensor in tensors.items():
        if name in expected:
            faults += _faults(name, tensor, expected[name])
        elif name not in beside:
            faults.append(f"unknown: {name} {_shape(tensor.shape)} (nearest: {near(name, expected)})")
        elif beside[name] is not None and not np.array_equal(tensor, beside[name]):
            faults.append(f"other base: {name} {_shape(tensor.shape)} is not what the parameters hold")
    return faults


def unfit_anywhere(held: Tensors) -> list[str]:
    """What is wrong with a file's tensors in any model: those there twice, of a wrong type, or not finite."""
    return [*held.faults.values(), *(x for n, tensor in held.found.items() for x in _faults(n, tensor, tensor.shape))]


def _unequal(wanted: Sequence[Slot], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Tensors that are one array of the tree, and differ."""
    first: dict[Any, Slot] = {}
    pairs = [(first.setdefault((slot.key, slot.layout, slot.block), slot).name, slot.name) for slot in wanted]
    return [
        f"not equal: {one} and {other}, which this model has as one array"
        for one, other in pairs
        if not np.array_equal(tensors[one], tensors[other])
    ]


def _faults(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    if str(tensor.dtype) not in FLOATING:
        return [f"type: {name} is {tensor.dtype}, expected one of {', '.join(FLOATING)}"]
    if tensor.shape != shape:
        return [f"shape: {name} is {_shape(tensor.shape)}, expected {_shape(shape)}"]
    return [] if np.isfinite(tensor.astype(np.float32)).all() else [f"not finite: {name}"]


def _shape(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def constant(values: Iterable[Any], what: str) -> Any:
    """The one value of several that must be the same.

    Raises:
      ValueError: they are not.
    """
    found = list(values)
    first = found[0]
    if any(x != first and not (isinstance(x, float) and math.isclose(x, first)) for x in found):
        raise ValueError(f"{what} differ: {sorted(set(map(str, found)))}")
    return first
