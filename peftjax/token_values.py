"""Marks of virtual rows through equations that work entry by entry, and what their operands' values say."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from peftjax.token_marks import MOST, Marked, small

SOFT = {"mul", "div", "select_n", "convert_element_type", "neg", "stop_gradient", "copy"}
VALUES: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "neg": np.negative,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "abs": np.abs, "sign": np.sign, "convert_element_type": lambda x: x, "stop_gradient": lambda x: x, 
    "copy": lambda x: x,
}  # fmt: skip
COMPARED = {"eq", "ne", "lt", "le", "gt", "ge"}
MOVES = {"add", "sub", "mul", "max", "min", "convert_element_type", "neg"}
ELEMENTWISE = set(VALUES) | set(
    "div exp exp2 log log1p expm1 tanh sin cos tan logistic rsqrt sqrt cbrt integer_pow pow square "
    "erf erf_inv erfc round "
    "floor ceil is_finite not and or xor clamp select_n rem nextafter atan2 reduce_precision name optimization_barrier "
    "sharding_constraint reshard pvary add_any population_count shift_left shift_right_logical shift_right_arithmetic "
    "asin acos atan sinh cosh asinh acosh atanh lgamma digamma real imag complex conj".split()
)


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
