"""How marks of virtual rows go through each kind of equation: lookups, cuts, joins, and the table of all rules."""

import dataclasses
from typing import Any, Callable

import numpy as np

from peftjax.token_marks import PREFIX, PROMPT, Marked, clean, small
from peftjax.token_sums import dot, noted, reduction
from peftjax.token_values import ELEMENTWISE, elementwise
from peftjax.token_views import view

Rule = Callable[..., list[Marked]]


def spread(x: Marked, marks: np.ndarray) -> Marked:
    """x, all of it marked where any of `marks` is."""
    worst = np.bitwise_or.reduce(marks, axis=None)
    return dataclasses.replace(x, marks=x.marks | worst, known=None) if worst else x


def gather(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """Rows by their index: marked where the index is, or, where the rows are marked, all over."""
    x, ids, d = operands[0], operands[1], eqn.params["dimension_numbers"]
    shape = shapes[0]
    for j, k in enumerate(d.start_index_map):
        high = ids.high
        if len(d.start_index_map) == 1 and high is not None and ids.known is None and eqn.params["slice_sizes"][k] == 1:
            _long_enough(eqn, x.shape[k], high)
        elif (
            ids.known is not None
            and len(d.start_index_map) == 1
            and not ids.marks.any()
            and eqn.params["slice_sizes"][k] == 1
        ):
            _long_enough(eqn, x.shape[k], np.nanmax(ids.known) if not np.isnan(ids.known).all() else -1)
    rows = np.bitwise_or.reduce(ids.marks, axis=-1)
    batch = [k for k in range(len(shape)) if k not in d.offset_dims]
    marks = rows.reshape([rows.shape[batch.index(k)] if k in batch else 1 for k in range(len(shape))])
    made, indexed = x.marks, [k for k in d.start_index_map if eqn.params["slice_sizes"][k] != x.shape[k]]
    for k in indexed:
        reduced = np.bitwise_or.reduce(made, axis=k, keepdims=True)
        if (reduced & ~np.bitwise_and.reduce(made, axis=k, keepdims=True)).any() and not walk.rehearsing:
            walk.note(eqn, "takes a row at an index that the trace does not tell")
        made = reduced
    gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    kept = iter(k for k in range(len(x.shape)) if k not in gone)
    pairs = {batch[j]: k for k, j in zip(d.operand_batching_dims, d.start_indices_batching_dims)}
    source = [next(kept) if k in d.offset_dims else pairs.get(k) for k in range(len(shape))]
    order = [k for k in source if k is not None]
    made = np.transpose(made, (*order, *(k for k in range(made.ndim) if k not in order)))
    sizes = iter(made.shape)
    made = made.reshape([1 if k is None else next(sizes) for k in source])
    return [dataclasses.replace(clean(shape), marks=small(marks | made))]


def _long_enough(eqn: Any, size: int, high: float) -> None:
    if high >= size:
        where = str(eqn.source_info.name_stack)
        raise ValueError(
            f"wrap_tokens: position {int(high)} is looked up in a table of {size}{where and f', in {where}'}: virtual "
            "tokens make the sequence too long. Cut the inputs, or use fewer virtual tokens"
        )


def dynamic_slice(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """A part at a place that may be known."""
    x, starts, shape = operands[0], operands[1:], shapes[0]
    a = x.marks
    for k, (start, size) in enumerate(zip(starts, shape)):
        if a.shape[k] == 1 or size == x.shape[k]:
            continue
        if start.known is not None and start.known.size == 1 and not np.isnan(start.known).any():
            at = int(np.clip(start.known.ravel()[0], 0, x.shape[k] - size))
            a = np.take(a, np.arange(at, at + size), axis=k)
        else:
            made = np.bitwise_or.reduce(a, axis=k, keepdims=True)
            noted(walk, eqn, a, made, (k,))
            a = made
    return [dataclasses.replace(clean(shape), marks=small(a))]


def concatenate(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """One after the other."""
    return [_joined(operands, eqn.params["dimension"], shapes[0])]


def stack(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """Beside each other, along a new axis."""
    axis = eqn.params["axis"] % len(shapes[0])
    one = lambda x: x.mapped((*x.shape[:axis], 1, *x.shape[axis:]), lambda a: np.expand_dims(a, axis))
    return [_joined([one(x) for x in operands], axis, shapes[0])]


def tile(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """Several times after itself."""
    reps, x = eqn.params["reps"], operands[0]
    whole = x.whole([k for k, n in enumerate(reps) if n > 1])
    return [whole.mapped(shapes[0], lambda a: np.tile(a, reps))]


def _joined(operands: list[Marked], axis: int, shape: Any) -> Marked:
    wide = [x.whole((axis,)) for x in operands]

    def joined(arrays: Any) -> np.ndarray:
        shape = np.broadcast_shapes(*([n if k != axis else 1 for k, n in enumerate(a.shape)] for a in arrays))
        full = [np.broadcast_to(a, [a.shape[k] if k == axis else n for k, n in enumerate(shape)]) for a in arrays]
        return small(np.concatenate(full, axis))

    known = None if any(x.known is None for x in wide) else joined([x.known for x in wide])
    bounds: Any = [
        None if any(getattr(x, s) is None for x in wide) else f(getattr(x, s) for x in wide)
        for s, f in (("low", min), ("high", max))
    ]
    return Marked(tuple(shape), joined([x.marks for x in wide]), known, *bounds)


def pad(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """More entries of a constant."""
    x, config = operands[0], eqn.params["padding_config"]
    moved = [k for k, c in enumerate(config) if tuple(c) != (0, 0, 0)]
    if any(i or lo < 0 or hi < 0 for lo, hi, i in config):
        return [spread(clean(shapes[0]), x.marks | operands[1].marks.max(initial=0))]
    a = x.whole([k for k in moved if x.marks.shape[k] > 1]).marks
    widths = [(max(lo, 0), max(hi, 0)) if a.shape[k] > 1 else (0, 0) for k, (lo, hi, _) in enumerate(config)]
    return [dataclasses.replace(clean(shapes[0]), marks=small(np.pad(a, widths)))]


def cumulative(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """Running sums: a prompt's rows are taken in, what stands at a prefix's positions spoils all that follow."""
    x, axis = operands[0], eqn.params["axis"]
    before = np.flip(x.marks, axis) if eqn.params.get("reverse") else x.marks
    spoilt = np.bitwise_or.accumulate(before & PREFIX, axis=axis)
    spoilt = np.flip(spoilt, axis) if eqn.params.get("reverse") else spoilt
    return [dataclasses.replace(clean(shapes[0]), marks=small((x.marks & PROMPT) | spoilt))]


def iota(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """0, 1, 2, ... along one axis."""
    shape, k = shapes[0], eqn.params["dimension"]
    known = np.arange(shape[k], dtype=np.float64).reshape([-1 if j == k else 1 for j in range(len(shape))])
    return [dataclasses.replace(clean(shape), known=known, low=0.0, high=float(shape[k] - 1))]


VIEWS = ("transpose", "squeeze", "expand_dims", "rev", "broadcast_in_dim", "reshape", "slice", "split")
SUMS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys(SUMS, reduction),
    **dict.fromkeys(("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"), cumulative),
    "dot_general": dot,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "concatenate": concatenate,
    "stack": stack,
    "tile": tile,
    "pad": pad,
    "iota": iota,
}
