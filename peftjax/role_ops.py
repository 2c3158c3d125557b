"""What an equation says of the parameters that it uses, for `roles`."""

import dataclasses
import math
from typing import Any, Callable, Sequence

import numpy as np

from peftjax import views
from peftjax.role_book import Book
from peftjax.role_norm import derive
from peftjax.role_products import PRODUCTS
from peftjax.role_values import Act, Fixed, Pending, Source, Track, Value, acts, heads, tracked

CASTS = ("convert_element_type", "reduce_precision", "copy", "broadcast_in_dim", "reshape", "squeeze")
PARTS = ("slice", "dynamic_slice", "split", "rev")  # views that are another array
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj copysign cos cosh digamma div eq erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg "
    "nextafter not or pow real reduce_precision rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor".split()
)
ADDS = ("add", "add_any")
LINEAR = frozenset(
    "add add_any sub neg mul select_n div reduce_sum concatenate pad dynamic_update_slice gather cumsum real "
    "reduce_window_sum dot_general slice dynamic_slice split rev psum psum_invariant all_gather all_gather_invariant "
    "reduce_scatter all_to_all ppermute reduce_precision scatter-add scatter_add optimization_barrier".split()
)
FIRST_ONLY = ("div", "gather", "dynamic_slice", "dynamic_update_slice")


def read(book: Book, eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """The values of an equation's outputs."""
    name = eqn.primitive.name
    if name.startswith("debug_"):
        return [Fixed() for _ in eqn.outvars]
    if not acts(operands) and not tracked(operands):
        for value in operands if name not in views.VIEWS else ():
            value.touch()
        return [Fixed(value=_constant(name, operands)) for _ in eqn.outvars]
    first = operands[0]
    if name in views.VIEWS and (isinstance(first, Act) or first.tracks):
        return view_act(eqn, operands) if isinstance(first, Act) else view_fixed(book, eqn, first)
    outs = PRODUCTS[name](book, eqn, operands) if name in PRODUCTS else None
    if outs is not None:
        return outs
    return meet(book, eqn, operands) if acts(operands) else compute(book, eqn, operands)


def _constant(name: str, operands: Sequence[Value]) -> float | None:
    first = operands[0] if operands else None
    return first.value if name in CASTS and isinstance(first, Fixed) else None


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


def view_act(eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """Views of an activation."""
    name, first = eqn.primitive.name, operands[0]
    assert isinstance(first, Act)
    for v in operands if name in PARTS else operands[1:]:
        v.touch()
    followed = follow(eqn, first.pending.layout) if first.pending and first.pending.layout else None
    outs: list[Value] = []
    for k, _ in enumerate(eqn.outvars):
        pending = first.pending and first.pending._replace(layout=followed[k][0] if followed else None)
        changes = dict(pending=pending) if name not in PARTS else dict(pending=pending, source=Source(), derived=None)
        outs.append(dataclasses.replace(first, **changes))
    return outs


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
    if name in ("mul", "div", *ADDS):
        book.suggest([t for t in made.tracks if t not in made.primary], "bias" if name in ADDS else "scale")
    return [made]


def _elementwise(name: str, k: int, value: Fixed, shape: tuple[int, ...]) -> list[Track]:
    done = name if k == 0 or name not in FIRST_ONLY else f"{name} by"
    fits = [t for t in value.tracks if len(t.layout.dims) == len(shape)]
    layouts = [broadcast(t.layout, shape) for t in fits]
    return [dataclasses.replace(t, layout=x, ops=t.ops | {done}) for t, x in zip(fits, layouts) if x is not None]


def broadcast(layout: views.Layout, shape: tuple[int, ...]) -> views.Layout | None:
    """The layout of an operand whose dimensions of size 1 an elementwise equation repeats."""
    view = views.broadcast(layout, shape, range(len(shape)))
    return view[0] if view and view[0].shape == shape else None


def _resized(name: str, k: int, value: Fixed, shape: tuple[int, ...]) -> list[Track]:
    """Tracks of which some axes grew, by a concatenation or by padding."""
    out = []
    for track in value.tracks:
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


JOINS: dict[str, Callable[[str, int, Fixed, tuple[int, ...]], list[Track]]] = {"concatenate": _resized, "pad": _resized}


def meet(book: Book, eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """Any other equation with an activation."""
    name = eqn.primitive.name
    residual = is_residual(book, eqn, operands)
    biased = False if residual else _meetings(book, name, operands)
    derived = derive(name, operands) if len(eqn.outvars) == 1 else None
    pending = None if residual else carried(name, eqn, operands, biased)
    outs = [Act(pending=pending, heads=heads(operands), derived=derived) for _ in eqn.outvars]
    if residual:
        product, stream = residual
        product.total, product.stream, product.alive = outs[0].source, stream.source, False
    for value in operands:
        value.touch(derived)
    return list(outs)


def is_residual(book: Book, eqn: Any, operands: Sequence[Value]) -> Any:
    """The pending product and the stream, where an equation adds the two."""
    if eqn.primitive.name not in ADDS or operands[0] is operands[1]:
        return None
    if eqn.invars[0].aval.shape != eqn.invars[1].aval.shape:
        return None
    for h, stream in (operands, operands[::-1]):
        other = stream.live if isinstance(stream, Act) else None
        known = not isinstance(stream, Fixed) or not stream.tracks or _was_activation(book, stream)
        if isinstance(h, Act) and h.live and not other and known and _consumed(book, stream):
            return h.live.product, stream
    return None


def _was_activation(book: Book, value: Fixed) -> bool:
    return any(book.notes[t.path].activation for t in value.tracks)


def _consumed(book: Book, value: Value) -> bool:
    return value.source.consumed or isinstance(value, Fixed) and _was_activation(book, value)


def _meetings(book: Book, name: str, operands: Sequence[Value]) -> bool:
    found = acts(operands)
    biased = False
    for k, value in enumerate(operands):
        if isinstance(value, Fixed) and value.tracks:
            kind = "bias" if name in ADDS else "scale" if name == "mul" or (name, k) == ("div", 1) else "other"
            biased |= book.meet(value, name, kind, found[0] if len(found) == 1 else None)
    return biased


def carried(name: str, eqn: Any, operands: Sequence[Value], biased: bool) -> Pending | None:
    """The pending product of an output: that of the one operand that has one, if the equation is linear in it."""
    live = [(k, v) for k, v in enumerate(operands) if isinstance(v, Act) and v.live]
    if len(live) != 1 or name not in LINEAR or live[0][0] > 0 and name in FIRST_ONLY:
        for _, act in live:
            act.end()
        return None
    pending = live[0][1].live
    assert pending is not None
    fixed = all(isinstance(v, Fixed) for k, v in enumerate(operands) if k != live[0][0])
    same = name in ELEMENTWISE
    fresh = pending.fresh and fixed and same and name not in (*ADDS, "sub")
    return pending._replace(layout=pending.layout if same else None, fresh=fresh and not biased)
