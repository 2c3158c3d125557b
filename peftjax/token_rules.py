"""How marks of virtual rows go through each kind of equation."""

import dataclasses
import functools
import math
from typing import Any, Callable

import numpy as np

from peftjax.token_marks import MOST, PREFIX, PROMPT, Marked, clean, small

Rule = Callable[..., list[Marked]]
SOFT = {"mul", "div", "select_n", "convert_element_type", "neg", "stop_gradient", "copy"}
VALUES: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "neg": np.negative,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "abs": np.abs, "sign": np.sign, "convert_element_type": lambda x: x, "stop_gradient": lambda x: x, "copy": lambda x: x,
}  # fmt: skip
COMPARED = {"eq", "ne", "lt", "le", "gt", "ge"}
MOVES = {"add", "sub", "mul", "max", "min", "convert_element_type", "neg"}
ELEMENTWISE = set(VALUES) | set(
    "div exp exp2 log log1p expm1 tanh sin cos tan logistic rsqrt sqrt cbrt integer_pow pow square erf erf_inv erfc round floor "
    "ceil is_finite not and or xor clamp select_n rem nextafter atan2 reduce_precision name optimization_barrier "
    "sharding_constraint reshard pvary add_any population_count shift_left shift_right_logical shift_right_arithmetic "
    "asin acos atan sinh cosh asinh acosh atanh lgamma digamma real imag complex conj".split()
)


def spread(x: Marked, marks: np.ndarray) -> Marked:
    """x, all of it marked where any of `marks` is."""
    worst = np.bitwise_or.reduce(marks, axis=None)
    return dataclasses.replace(x, marks=x.marks | worst, known=None) if worst else x


def elementwise(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """Entry by entry; a known factor of 0, and a known choice, leave nothing of what they exclude."""
    name, shape = eqn.primitive.name, shapes[0]
    if len(shapes) > 1:
        return list(operands)
    up = [
        dataclasses.replace(
            x, marks=_ranked(x.marks, shape), known=None if x.known is None else _ranked(x.known, shape)
        )
        for x in operands
    ]
    marks = functools.reduce(np.bitwise_or, [x.marks for x in up])
    known = _values(name, eqn, up)
    for x, others in ((x, [y for j, y in enumerate(up) if j != k]) for k, x in enumerate(up)):
        if x.known is None:
            continue
        # What is known leaves the result to itself, whatever the other operand is.
        settled = (
            (x.known == 0) & (x.marks == 0)
            if name in ("mul", "and")
            else (x.known != 0) & ~np.isnan(x.known)
            if name == "or"
            else None
        )
        if settled is not None and settled.any():
            marks = np.where(settled, 0, marks).astype(np.uint8)
            fixed = np.where(settled, 0.0 if name != "or" else 1.0, np.nan if known is None else known)
            known = fixed if fixed.size <= MOST else None
    if name == "select_n" and up[0].known is not None:
        which, cases = up[0].known, up[1:]
        for k, x in enumerate(cases):
            marks = np.where(which == k, x.marks | up[0].marks, marks).astype(np.uint8)
    low, high = _bounds(name, up)
    soft = name in ("exp", "exp2") or (name in SOFT and any(x.soft for x in up))
    return [Marked(shape, small(marks), None if known is None else small(known), low, high, soft)]


def _ranked(x: np.ndarray, shape: Any) -> np.ndarray:
    return x.reshape((1,) * len(shape)) if x.size == 1 else x


def _values(name: str, eqn: Any, up: list[Marked]) -> np.ndarray | None:
    if name == "select_n" and up[0].known is not None:
        values = [np.full((1,) * up[0].marks.ndim, np.nan) if x.known is None else x.known for x in up[1:]]
        made = np.where(np.isnan(up[0].known), np.nan, values[-1])
        for k, v in enumerate(values[:-1]):
            made = np.where(up[0].known == k, v, made)
        return made if made.size <= MOST else None
    if name == "not" and eqn.invars[0].aval.dtype == bool and up[0].known is not None:
        return 1 - up[0].known
    if name in COMPARED and (said := _compared(name, up)) is not None:
        return np.full((1,) * up[0].marks.ndim, float(said))
    if (
        name not in VALUES
        or any(x.known is None for x in up)
        or math.prod(np.broadcast_shapes(*(x.known.shape for x in up))) > MOST
    ):
        return None
    values = [x.known for x in up]
    made = np.asarray(VALUES[name](*values), np.float64)
    if name == "convert_element_type" and eqn.outvars[0].aval.dtype == bool:
        made = np.where(np.isnan(made), np.nan, made != 0)
    return np.where(functools.reduce(np.logical_or, [np.isnan(v) for v in values]), np.nan, made)


def _compared(name: str, up: list[Marked]) -> bool | None:
    """What the bounds of two integers say of their comparison."""
    x, y = up
    if None in (x.low, x.high, y.low, y.high):
        return None
    below, above = x.high < y.low, x.low > y.high
    match name:
        case "lt":
            return True if below else False if x.low >= y.high else None
        case "ge":
            return True if x.low >= y.high else False if below else None
        case "gt":
            return True if above else False if x.high <= y.low else None
        case "le":
            return True if x.high <= y.low else False if above else None
    return None


def _bounds(name: str, up: list[Marked]) -> tuple[Any, Any]:
    if name == "select_n":
        cases = [
            x for k, x in enumerate(up[1:]) if up[0].known is None or (np.isnan(up[0].known) | (up[0].known == k)).any()
        ]
        if any(x.low is None or x.high is None for x in cases):
            return None, None
        return min(x.low for x in cases), max(x.high for x in cases)
    if name not in MOVES or any(x.low is None or x.high is None for x in up):
        return None, None
    ends = [x for x in up]
    corners = [
        VALUES[name](*c) for c in np.array(np.meshgrid(*[(x.low, x.high) for x in ends])).reshape(len(ends), -1).T
    ]
    return float(min(corners)), float(max(corners))


def view(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """Axes that move."""
    p, x, shape = eqn.params, operands[0], shapes[0]
    match eqn.primitive.name:
        case "transpose":
            return [x.mapped(shape, lambda a: np.transpose(a, p["permutation"]))]
        case "squeeze":
            return [x.mapped(shape, lambda a: np.squeeze(a, tuple(p["dimensions"])))]
        case "expand_dims":
            return [x.mapped(shape, lambda a: np.expand_dims(a, tuple(p["dimensions"])))]
        case "rev":
            return [x.mapped(shape, lambda a: np.flip(a, tuple(p["dimensions"])))]
        case "broadcast_in_dim":
            sizes = lambda a: [
                a.shape[p["broadcast_dimensions"].index(k)] if k in p["broadcast_dimensions"] else 1
                for k in range(len(shape))
            ]
            return [x.mapped(shape, lambda a: a.reshape(sizes(a)))]
        case "reshape":
            return [x.mapped(shape, lambda a: _reshaped(a, x.shape, shape))]
        case "slice":
            strides = p["strides"] or (1,) * len(x.shape)
            cuts = list(zip(p["start_indices"], p["limit_indices"], strides))
            return [
                x.mapped(shape, lambda a: a[tuple(slice(*c) if n > 1 else slice(None) for c, n in zip(cuts, a.shape))])
            ]
        case _:  # split
            starts = np.cumsum([0, *p["sizes"]])
            part = lambda a, i: (
                a if a.shape[p["axis"]] == 1 else np.take(a, np.arange(starts[i], starts[i + 1]), p["axis"])
            )
            return [x.mapped(s, functools.partial(part, i=i)) for i, s in enumerate(shapes)]


def _reshaped(a: np.ndarray, old: Any, new: Any) -> np.ndarray:
    """The array after a reshape of the value from `old` to `new`: each group of axes that keeps its size by itself."""
    sizes, out, i, j = [], [], 0, 0
    while i < len(old) or j < len(new):
        start, at, n, m = i, j, 1, 1
        while i < len(old) and (n == 1 or n != m):
            if n == m and n > 1:
                break
            if n <= m:
                n, i = n * old[i], i + 1
            elif j < len(new):
                m, j = m * new[j], j + 1
            else:
                break
        while j < len(new) and m < n:
            m, j = m * new[j], j + 1
        if i >= len(old):
            while j < len(new) and (m * new[j] <= n or new[j] == 1):
                m, j = m * new[j], j + 1
        whole = any(k > 1 for k in a.shape[start:i])
        sizes += list(old[start:i]) if whole else [1] * (i - start)
        out += list(new[at:j]) if whole else [1] * (j - at)
        if i == start and j == at:
            break
    return np.broadcast_to(a, sizes).reshape(out)


def reduce(marks: np.ndarray, axes: Any, mixing: bool) -> np.ndarray:
    """Marks over which something is summed. Mixing tokens takes a prompt's rows in without becoming one."""
    most, least = np.bitwise_or.reduce(marks, axis=axes), np.bitwise_and.reduce(marks, axis=axes)
    return (most & PREFIX) | ((least if mixing else most) & PROMPT)


def reduction(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """A sum, maximum or index over axes."""
    axes = tuple(eqn.params["axes"])
    marks = functools.reduce(np.bitwise_or, [x.marks for x in operands])
    if eqn.primitive.name == "reduce_sum" and operands[0].known is not None:
        marks = np.where(operands[0].known == 0, 0, marks).astype(np.uint8)
    mixing = bool(walk.sequence.found[id(eqn)][0]) or operands[0].soft or _is_softmax(eqn, jaxpr)
    made = reduce(marks, axes, mixing)
    _noted(walk, eqn, marks, made, axes)
    soft = operands[0].soft and eqn.primitive.name == "reduce_sum"
    return [dataclasses.replace(clean(s), marks=small(made), soft=soft) for s in shapes]


def _noted(walk: Any, eqn: Any, marks: np.ndarray, made: np.ndarray, axes: Any) -> None:
    if (
        not walk.rehearsing
        and (made & ~np.bitwise_and.reduce(marks, axis=axes, keepdims=made.ndim == marks.ndim)).any()
    ):
        walk.note(eqn, f"over axis {', '.join(map(str, axes))} takes them in")


def _is_softmax(eqn: Any, jaxpr: Any) -> bool:
    """Whether a maximum is only what a softmax takes off before it takes the exponential."""
    if eqn.primitive.name != "reduce_max":
        return False
    uses = [e for e in jaxpr.eqns if any(v is w for v in e.invars for w in eqn.outvars)]
    seen, todo = False, [(e, eqn.outvars[0]) for e in uses]
    while todo:
        e, v = todo.pop()
        if e.primitive.name == "sub" and e.invars[1] is v:
            after = [f for f in jaxpr.eqns if any(w is e.outvars[0] for w in f.invars)]
            if not any(f.primitive.name in ("exp", "exp2") for f in after):
                return False
            seen = True
        elif e.primitive.name in (
            "stop_gradient",
            "broadcast_in_dim",
            "reshape",
            "max",
            "convert_element_type",
            "select_n",
            "is_finite",
        ):
            todo += [(f, e.outvars[0]) for f in jaxpr.eqns if any(w is e.outvars[0] for w in f.invars)]
        else:
            return False
    return seen


def dot(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """A contraction: marks of both, less where the other operand is known to be 0."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    free = [[k for k in range(len(x.shape)) if k not in (*c, *b)] for x, c, b in zip(operands, (lc, rc), (lb, rb))]

    def laid(a: np.ndarray, side: int) -> np.ndarray:
        c, b = ((lc, lb), (rc, rb))[side]
        a = np.transpose(a, (*b, *free[side], *c))
        shape = a.shape
        rest = shape[len(b) : len(b) + len(free[side])]
        ones = ((1,) * len(free[1]), (1,) * len(free[0]))[side]
        return a.reshape(
            (*shape[: len(b)], *(rest + ones if side == 0 else ones + rest), *shape[len(shape) - len(c) :])
        )

    marks = [laid(x.marks, k) for k, x in enumerate(operands)]
    both = marks[0] | marks[1]
    for k, x in enumerate(operands):
        if x.known is not None and (x.known == 0).any():
            both = np.where(laid(x.known == 0, k) & (marks[k] == 0), 0, both).astype(np.uint8)
    axes = tuple(range(both.ndim - len(lc), both.ndim))
    mixing = bool(walk.sequence.found[id(eqn)][0]) or any(x.soft for x in operands)
    made = reduce(both, axes, mixing) if axes else both
    _noted(walk, eqn, both, made, axes)
    return [dataclasses.replace(clean(shapes[0]), marks=small(made))]


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
            f"wrap_tokens: position {int(high)} is looked up in a table of {size}{f', in {where}' if where else ''}: virtual tokens "
            "make the sequence too long. Cut the inputs, or use fewer virtual tokens"
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
            _noted(walk, eqn, a, made, (k,))
            a = made
    return [dataclasses.replace(clean(shape), marks=small(a))]


def concatenate(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """One after the other."""
    axis = eqn.params["dimension"]
    wide = [x.whole((axis,)) for x in operands]

    def joined(arrays: Any) -> np.ndarray:
        shape = np.broadcast_shapes(*([n if k != axis else 1 for k, n in enumerate(a.shape)] for a in arrays))
        full = [np.broadcast_to(a, [a.shape[k] if k == axis else n for k, n in enumerate(shape)]) for a in arrays]
        return small(np.concatenate(full, axis))

    known = None if any(x.known is None for x in wide) else joined([x.known for x in wide])
    bounds = [
        None if any(getattr(x, s) is None for x in wide) else f(getattr(x, s) for x in wide)
        for s, f in (("low", min), ("high", max))
    ]
    return [Marked(shapes[0], joined([x.marks for x in wide]), known, *bounds)]


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


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(("transpose", "squeeze", "expand_dims", "rev", "broadcast_in_dim", "reshape", "slice", "split"), view),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"), reduction),
    **dict.fromkeys(("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"), cumulative),
    "dot_general": dot,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "concatenate": concatenate,
    "pad": pad,
    "iota": iota,
}  # fmt: skip
