"""What the trace says of one value: which entries are virtual rows, and which it knows."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

PROMPT, PREFIX = 1, 2
MOST = 1 << 20  # entries that are known one by one; of larger values, nothing is


@dataclasses.dataclass(frozen=True)
class Marked:
    """A value of a shape. `marks` and `known` (NaN where unknown) have one entry along axes that they do not vary with.

    `low` and `high` bound integers that count places; `soft` says that it is made of exponentials, as the weights of an
    attention are.
    """

    shape: tuple[int, ...]
    marks: Any
    known: Any = None
    low: Any = None
    high: Any = None
    soft: bool = False

    def mapped(self, shape: Any, change: Any) -> "Marked":
        """A view: `change(array)` of both arrays, each with one entry where it does not vary."""
        known = None if self.known is None else small(change(self.known))
        return dataclasses.replace(self, shape=tuple(shape), marks=small(change(self.marks)), known=known)

    def whole(self, axes: Any) -> "Marked":
        """With every entry along these axes."""
        sizes = lambda x: [n if k in axes else m for k, (n, m) in enumerate(zip(self.shape, x.shape))]
        full: Any = lambda x: None if x is None else np.broadcast_to(x, sizes(x))
        return dataclasses.replace(self, marks=full(self.marks), known=full(self.known))

    def reduced(self, axis: int) -> "Marked":
        """One entry of an axis, whichever."""
        shape = tuple(n for k, n in enumerate(self.shape) if k != axis)
        return Marked(shape, small(np.bitwise_or.reduce(self.marks, axis=axis)), None, self.low, self.high, self.soft)

    def stacked(self, size: int) -> "Marked":
        """Along a new first axis."""
        return Marked((size, *self.shape), self.marks[None], None, self.low, self.high, self.soft)

    def same(self, other: "Marked") -> bool:
        """Whether the two say the same."""
        pairs = ((self.marks, other.marks), (self.known, other.known))
        equal = lambda x, y: (
            x is y
            or (
                x is not None
                and y is not None
                and x.shape == y.shape
                and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
            )
        )
        return all(equal(x, y) for x, y in pairs) and (self.low, self.high) == (other.low, other.high)

    def overwritten(self, axis: int, features: Any, ranges: Any, span: Any) -> "Marked":
        """With a prefix's rows at its positions: in all features, or in some."""
        rows = (np.arange(span.length) >= span.prefix_start) & (
            np.arange(span.length) < span.prefix_start + span.prefix
        )
        clear = rows.reshape([-1 if k == axis else 1 for k in range(len(self.shape))])
        if ranges:
            if len(features) != 1 or ranges[-1][1] > self.shape[features[0]]:
                return self
            on = np.zeros(self.shape[features[0]], bool)
            for start, stop in ranges:
                on[start:stop] = True
            clear = clear & on.reshape([-1 if k == features[0] else 1 for k in range(len(self.shape))])
        return dataclasses.replace(self, marks=small(np.where(clear, 0, self.marks).astype(np.uint8)))


def small(x: np.ndarray) -> np.ndarray:
    """The array with one entry along axes that it does not vary with."""
    for axis, size in enumerate(x.shape):
        if size > 1:
            first = x[(slice(None),) * axis + (slice(0, 1),)]
            if np.array_equal(np.broadcast_to(first, x.shape), x, equal_nan=x.dtype.kind == "f"):
                x = first
    return x


def clean(shape: Any) -> Marked:
    """A value without virtual rows, of which nothing is known."""
    return Marked(tuple(shape), np.zeros((1,) * len(shape), np.uint8))


def anything(x: Any) -> Marked:
    """A constant."""
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.extended):
        return clean(x.shape)  # random keys are no numbers
    x = np.asarray(x)
    if x.dtype.kind not in "biuf":
        return clean(x.shape)
    low, high = (float(x.min()), float(x.max())) if x.size and x.dtype.kind in "iu" else (None, None)
    return dataclasses.replace(clean(x.shape), known=small(x.astype(np.float64)), low=low, high=high)


def joined(values: list[Marked]) -> Marked:
    """Any one of these."""
    marks = small(functools.reduce(np.bitwise_or, [x.marks for x in values]))
    known = values[0].known
    for x in values[1:]:
        known = None if known is None or x.known is None else np.where(known == x.known, known, np.nan)
    bound = lambda side, of: (
        None if any(getattr(x, side) is None for x in values) else of(getattr(x, side) for x in values)
    )
    return Marked(values[0].shape, marks, known, bound("low", min), bound("high", max), all(x.soft for x in values))
