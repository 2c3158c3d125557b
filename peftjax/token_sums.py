"""Marks of virtual rows through sums, maxima and contractions: what mixes tokens, and what pools them."""

import dataclasses
import functools
from typing import Any

import numpy as np

from peftjax.token_marks import PREFIX, PROMPT, Marked, clean, small


def reduce(marks: Any, axes: Any, mixing: bool) -> Any:
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
    noted(walk, eqn, marks, made, axes)
    soft = operands[0].soft and eqn.primitive.name == "reduce_sum"
    return [dataclasses.replace(clean(s), marks=small(made), soft=soft) for s in shapes]


def noted(walk: Any, eqn: Any, marks: Any, made: Any, axes: Any) -> None:
    """Notes an equation that takes marked entries in where there were others."""
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
    noted(walk, eqn, both, made, axes)
    return [dataclasses.replace(clean(shapes[0]), marks=small(made))]
