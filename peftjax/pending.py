"""Outputs that wait for their residual add: what they may pass on the way, and where they stop."""

import dataclasses
import functools
from typing import Any, Callable, Sequence

import jax.numpy as jnp

from peftjax.hooked import Pending, inner, position, where
from peftjax.site import Site
from peftjax.views import Layout, follow

SHIFTS = (("add", 0), ("add", 1), ("sub", 0))  # of the output: by a bias, a running mean, or a second branch


def act(evaluator: Any, eqn: Any, operands: Sequence[Any], h: Pending, plain: Any) -> Sequence[Any]:
    """The outputs of an equation that meets a waiting output: it goes on waiting, meets its residual, or raises."""
    name, k = eqn.primitive.name, position(operands, h)
    rest = [x for j, x in enumerate(operands) if j != k]
    run = lambda: plain([inner(x) if x is not h else h.value for x in operands])
    if moves := linear(eqn, jnp.shape(h.value), {*h.features, *(d for d, _ in h.batch)}, k):
        return [_moved(eqn, h, y, move) for y, move in zip(run(), moves)]
    if name in ("add", "add_any") and evaluator.stream(eqn) == 1 - k:
        evaluator.refuse_inner_gradient(eqn, h.path)
        owners = [c.owner for c in h.owners]
        tokens = evaluator.tokens(eqn, h.path, owners, (*h.features, *(d for d, _ in h.batch)))
        site = Site(h.path, h.features, h.batch, name, evaluator.scope_of(eqn), (), *tokens)
        y, r = h.value, evaluator.merged(rest[0], eqn)
        for carried in h.owners:
            y = site.call(carried, "on_residual", y, r)
        evaluator.met(h.path, owners, eqn)
        return plain([r if j != k else y for j in range(2)])
    if (name, k) in SHIFTS and eqn.outvars[0].aval.shape == jnp.shape(h.value):
        return [dataclasses.replace(h, value=run()[0])]
    raise ValueError(
        where(eqn, [h])
        + ": the output waits for its residual add, and only views and operations linear in it may come "
        'before; attach the overlay with where="output", or to a layer whose output is added to the stream'
    )


def _moved(eqn: Any, h: Pending, y: Any, move: "Move") -> Pending:
    features, batch = (move(h.features), [d for k, _ in h.batch for d in move((k,)) or ()])
    if features is None or len(batch) < len(h.batch):
        raise ValueError(
            where(eqn, [h]) + ": the features of the waiting output are folded into other axes by a reshape"
        )
    return dataclasses.replace(h, value=y, features=features, batch=tuple((b, a) for b, (_, a) in zip(batch, h.batch)))


Move = Callable[[tuple[int, ...]], tuple[int, ...] | None]


def linear(eqn: Any, shape: tuple[int, ...], held: set[int], k: int) -> list[Move] | None:
    """How operand k's axes move in each output of an operation linear in it that keeps the axes held; else None."""
    name, p = eqn.primitive.name, eqn.params
    if name == "mul" or (name == "div" and k == 0) or (name == "select_n" and k > 0):
        return [lambda axes: axes]
    if k == 0 and (moves := views_of_output(eqn, shape)):
        return moves
    if name == "reduce_sum" and not set(p["axes"]) & held:
        kept = [d for d in range(len(shape)) if d not in p["axes"]]
        return [lambda axes: tuple(map(kept.index, axes))]
    if name == "dot_general":
        contract, batch = (list(d[k]) for d in p["dimension_numbers"])
        free = [d for d in range(len(shape)) if d not in (*contract, *batch)]
        start = len(batch) if k == 0 else len(eqn.outvars[0].aval.shape) - len(free)
        place = lambda d: batch.index(d) if d in batch else start + free.index(d)
        return None if set(contract) & held else [lambda axes: tuple(map(place, axes))]
    return None


def views_of_output(eqn: Any, shape: tuple[int, ...]) -> list[Move] | None:
    """How the axes of a layer's output move in a view of it, or None where the equation is no view."""
    if eqn.primitive.name == "neg":
        return [lambda axes: axes]
    views = follow(eqn.primitive.name, eqn.params, Layout.of(shape))
    return None if views is None else [functools.partial(_followed, layout) for layout, _ in views]


def _followed(layout: Layout, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dimensions of a view that hold these axes; None where a dimension mixes them with others."""
    wanted, found = set(axes), []
    for k, dim in enumerate(layout.dims):
        mine = [isinstance(a, tuple) and a[0] in wanted for a in dim if layout.size(a) > 1]
        if any(mine) and not all(mine):
            return None
        if any(mine):
            found.append(k)
    return tuple(found)
