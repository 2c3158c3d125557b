"""How a field of an overlay lies in torch's tensors: torch puts outputs first, and flattens what a kernel splits."""

import dataclasses
import math
from typing import Any, Sequence

import numpy as np

from peftjax.interop.names import Spot


@dataclasses.dataclass(frozen=True)
class Layout:
    """One parameter of torch inside one array of the tree.

    Attributes:
      index: of every axis of the array, the number this parameter has along it, or None.
      groups: for each axis of the tensor, the array's axes it is made of, among those without a number; none for 1.
      shape: the tensor's shape.
      ranks: the axis of the tensor that holds a part of the array's, and which part; None where it holds all.
    """

    index: tuple[int | None, ...]
    groups: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    ranks: tuple[int, tuple[int, ...]] | None = None

    def read(self, array: Any) -> np.ndarray:
        """The tensor, from the array."""
        part = np.asarray(array)[self._where].transpose(self._order)
        return np.ascontiguousarray(part[self._ranks].reshape(self.shape))

    def write(self, array: np.ndarray, tensor: np.ndarray) -> None:
        """Puts the tensor in its place in the array."""
        part = array[self._where].transpose(self._order)
        part[self._ranks] = tensor.reshape(part[self._ranks].shape)

    @property
    def _where(self) -> tuple[Any, ...]:
        return tuple(slice(None) if n is None else n for n in self.index) or (...,)

    @property
    def _ranks(self) -> tuple[Any, ...]:
        if self.ranks is None:
            return (...,)
        axis, chosen = self.ranks
        return (*(slice(None) for group in self.groups[:axis] for _ in group), list(chosen))

    @property
    def _order(self) -> list[int]:
        return [k for group in self.groups for k in group]


def layout(
    spot: Spot,
    labels: Sequence[Any],
    shape: Sequence[int],
    order: Sequence[Any],
    ranks: Sequence[int] | None = None,
) -> Layout:
    """How an array beside a leaf lies in a tensor.

    Args:
      spot: the leaf, and the place along its stacked axes.
      labels: the array's axes: `(k,)` is axis k of the leaf, a word is an axis of its own.
      shape: the array's shape.
      order: the tensor's axes: "i", "o" for all input and output axes of the leaf, "c" for a convolution's input
        channels and "x" for the rest of its window, each an axis; 1 for an axis of size 1; any other word for itself; a
        list of words for one axis of all of theirs.
      ranks: which entries of the axis "rank" the tensor holds, in their order; None for all.
    """
    numbers = dict(zip((k for k, letter in enumerate(spot.role.axes) if letter in "sb"), spot.index))
    index = [numbers.get(label[0]) if isinstance(label, tuple) else None for label in labels]
    kept = [label for label, n in zip(labels, index) if n is None]
    sizes = [n for n, at in zip(shape, index) if at is None]
    at = lambda axes: tuple(kept.index((k,)) for k in axes if (k,) in kept)
    sides = {"i": inputs(spot), "o": outputs(spot), "c": inputs(spot)[:1]}

    def axes(word: Any) -> list[tuple[int, ...]]:
        if isinstance(word, list):
            return [tuple(k for w in word for group in axes(w) for k in group)]
        if word == "x":
            return [at((k,)) for k in window(spot)]
        return [() if word == 1 else at(sides[word]) if word in sides else (kept.index(word),)]

    groups = [group for word in order for group in axes(word)]
    if sorted(k for group in groups for k in group) != list(range(len(kept))):
        raise ValueError(f"{spot.path} ({spot.role.axes}): an array of axes {labels} does not make a tensor of {order}")
    whole = tuple(math.prod(sizes[k] for k in group) for group in groups)
    if ranks is None:
        return Layout(tuple(index), tuple(groups), whole)
    axis = groups.index((kept.index("rank"),))
    cut = (*whole[:axis], len(ranks), *whole[axis + 1 :])
    return Layout(tuple(index), tuple(groups), cut, (axis, tuple(ranks)))


def inputs(spot: Spot) -> list[int]:
    """The leaf's input axes as torch has them: of a convolution, the channels before the window."""
    axes = [k for k, letter in enumerate(spot.role.axes) if letter == "i"]
    return [*(k for k in axes if k not in spot.role.window), *window(spot)]


def outputs(spot: Spot) -> list[int]:
    """The leaf's output axes."""
    return [k for k, letter in enumerate(spot.role.axes) if letter == "o"]


def window(spot: Spot) -> list[int]:
    """The axes of a convolution's window."""
    return list(spot.role.window)


def whole(spot: Spot) -> tuple[Any, ...]:
    """The order of axes in which torch holds the parameter itself; the axes of a bias are one.

    A transposed kernel is how Flax models hold the kernel of GPT-2's `Conv1D`, which torch holds as (in, out); a
    `weight`, as Equinox calls it, lies as in torch.
    """
    role, last = spot.role, spot.path.rpartition("/")[2]
    if role.op == "bias" and set(role.axes) & {"o"} and not set(role.axes) - set("osb"):
        return ("o",)
    if not spot.is_kernel:
        return tuple((k,) for k, letter in enumerate(role.axes) if letter not in "sb")
    if role.op == "conv":
        return ("o", "c", "x")
    turned = role.axes.index("o") < role.axes.index("i")
    return ("i", "o") if role.op == "embedding" or (turned and last != "weight") else ("o", "i")


def is_conv1d(spot: Spot) -> bool:
    """Whether this is the kernel of a `Conv1D`: a linear layer that torch holds as (in, out)."""
    return spot.is_kernel and spot.role.op == "linear" and whole(spot) == ("i", "o")
