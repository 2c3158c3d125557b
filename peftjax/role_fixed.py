"""How equations of parameters and constants alone act on what `roles` knows of them."""

import dataclasses
import math
import operator
from typing import Any, Callable, Sequence

import numpy as np

from peftjax import views
from peftjax.role_book import Book
from peftjax.role_values import Fixed, Track, Value, tracked
from peftjax.streams import ADDS, FIRST_ONLY

CASTS = ("convert_element_type", "reduce_precision", "copy", "broadcast_in_dim", "reshape", "squeeze")
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj copysign cos cosh digamma div eq "
    "erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min "
    "mul ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n sign sin sinh sqrt square sub tan "
    "tanh xor".split()
)


NUMBERS: dict[str, Callable[[float, float], float]] = {  # counts, less a degree of freedom, and whether any are left
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "gt": operator.gt,
}


def constants(eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """An equation of constants; casts and reshapes leave them what they are, and simple numbers are followed."""
    if eqn.primitive.name in CASTS and isinstance(operands[0], Fixed):
        return [operands[0]]
    for value in operands:
        value.touch()
    numbers = [v.value for v in operands if isinstance(v, Fixed) and v.value is not None]
    if eqn.primitive.name in NUMBERS and len(numbers) == 2:
        return [Fixed(value=float(NUMBERS[eqn.primitive.name](*numbers)))]
    return [Fixed() for _ in eqn.outvars]


def constant(x: Any) -> Fixed:
    """A literal, or an array that the function closes over."""
    if isinstance(x, (int, float, np.number, np.ndarray)) or hasattr(x, "shape") and math.prod(x.shape) == 1:
        try:
            return Fixed(value=_shortest(np.asarray(x).reshape(-1)))
        except (TypeError, ValueError):
            return Fixed()
    return Fixed()


def _shortest(x: np.ndarray) -> float | None:
    """1e-12 rather than the nearest float32 to it, as a double."""
    return float(str(x[0])) if x.size == 1 and np.ndim(x[0]) == 0 else None


def follow(eqn: Any, layout: views.Layout) -> list[views.View] | None:
    """The views that an equation makes; a reshape may transpose first."""
    name, p = eqn.primitive.name, eqn.params
    if name == "reshape" and p.get("dimensions") is not None:
        layout, p = views.transpose(layout, p["dimensions"])[0], {**p, "dimensions": None}
    return views.follow(name, p, layout)


def view_fixed(book: Book, eqn: Any, value: Fixed) -> list[Value]:
    """Views of parameters."""
    name, found = eqn.primitive.name, [follow(eqn, t.layout) for t in value.tracks]
    book.use([t for t, views_ in zip(value.tracks, found) if views_ is None], name)
    outs: list[Value] = []
    for k, _ in enumerate(eqn.outvars):
        moved = [book.edit(t, *v[k]) for t, v in zip(value.tracks, found) if v is not None]
        outs.append(dataclasses.replace(value, tracks=tuple(moved)))
    return outs


def compute(book: Book, eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """An equation of parameters alone: its value keeps the axes of those that have its shape."""
    name, leaves = eqn.primitive.name, tracked(operands)
    for value in leaves:
        book.use(value.tracks, name)
    shape = tuple(eqn.outvars[0].aval.shape)
    keep = _elementwise if name in ELEMENTWISE else JOINS.get(name)
    if keep is None or len(eqn.outvars) != 1:
        return [Fixed() for _ in eqn.outvars]
    made = Fixed(tuple(t for k, v in enumerate(operands) if isinstance(v, Fixed) for t in keep(name, k, v, shape)))
    number = next((v.value for v in operands if isinstance(v, Fixed) and not v.tracks), None)
    if name in ADDS and len(leaves) == 1 and leaves[0].whole and number is not None:
        made = Fixed(tuple(dataclasses.replace(t, plus=number) for t in made.tracks))
    if name in ("mul", "div", *ADDS):
        book.suggest([t for t in made.tracks if t not in made.primary], "bias" if name in ADDS else "scale")
    return [made]


def _elementwise(name: str, k: int, value: Fixed, shape: tuple[int, ...]) -> list[Track]:
    done = name if k == 0 or name not in FIRST_ONLY else f"{name} by"
    fits = [t for t in value.tracks if len(t.layout.dims) == len(shape)]
    layouts = [broadcast(t.layout, shape) for t in fits]
    return [
        dataclasses.replace(t, layout=x, ops=t.ops | {done}, plus=None) for t, x in zip(fits, layouts) if x is not None
    ]


def broadcast(layout: views.Layout, shape: tuple[int, ...]) -> views.Layout | None:
    """The layout of an operand whose dimensions of size 1 an elementwise equation repeats."""
    view = views.broadcast(layout, shape, range(len(shape)))
    return view[0] if view and view[0].shape == shape else None


def _resized(name: str, k: int, value: Fixed, shape: tuple[int, ...]) -> list[Track]:
    """Tracks of which some axes grew, by a concatenation or by padding."""
    out = []
    for track in value.tracks if value.tracks and len(value.tracks[0].layout.dims) == len(shape) else ():
        layout: views.Layout | None = track.layout
        for d, n in enumerate(shape):
            layout = _grown(layout, d, n) if layout else None
        out += [dataclasses.replace(track, layout=layout, ops=track.ops | {name})] if layout else []
    return out


def _grown(layout: views.Layout, d: int, size: int) -> views.Layout | None:
    atom = views.only(layout, d)
    if layout.shape[d] == size:
        return layout
    return None if atom is None else layout.resized(atom, size)


JOINS: dict[str, Callable[[str, int, Fixed, tuple[int, ...]], list[Track]]] = dict.fromkeys(
    ("concatenate", "pad", "all_gather", "all_gather_invariant"), _resized
)
