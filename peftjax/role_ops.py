"""What an equation says of the parameters that it uses, for `roles`."""

import dataclasses
import functools
import math
from typing import Any, Sequence

import jax.numpy as jnp

from peftjax import views
from peftjax.role_book import Book
from peftjax.role_fixed import (
    ELEMENTWISE,
    compute,
    constants,
    follow,
    view_fixed,
)
from peftjax.role_norm import derive
from peftjax.role_products import PRODUCTS
from peftjax.role_values import (
    KERNEL,
    MIXING,
    UNKNOWN,
    Act,
    Fixed,
    Pending,
    Product,
    Source,
    Value,
    acts,
    any_data,
    heads,
    since,
    tracked,
)
from peftjax.streams import ADDS, FIRST_ONLY, LINEAR, PARTS, PASSED

MOVING = frozenset(
    "clamp concatenate stack tile sort gather dynamic_update_slice pad scatter scatter-add scatter_add scatter-mul scatter_mul "
    "scatter-min scatter_min scatter-max scatter_max reduce psum psum_invariant all_gather all_gather_invariant "
    "reduce_scatter all_to_all ppermute pmax pmin reduce_sum reduce_max reduce_min select_and_gather_add".split()
)
TURNS = (*ADDS, "sub", "complex")


def read(book: Book, eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """The values of an equation's outputs."""
    name = eqn.primitive.name
    if name.startswith("debug_"):
        return [Fixed() for _ in eqn.outvars]
    if not acts(operands) and not tracked(operands):
        return constants(eqn, operands)
    if name in PASSED:
        return list(operands)
    if tracked(operands) and not any_data(operands):  # a number made of parameters is a constant to other parameters
        operands = [Fixed() if isinstance(v, Act) and v.uniform else v for v in operands]
    first = operands[0]
    if name in views.VIEWS and (isinstance(first, Act) or first.tracks):
        return view_act(eqn, operands) if isinstance(first, Act) else view_fixed(book, eqn, first)
    outs = PRODUCTS[name](book, eqn, operands) if name in PRODUCTS else None
    if outs is not None:
        return outs
    return meet(book, eqn, operands) if acts(operands) else compute(book, eqn, operands)


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
        changes = dict(pending=pending) if name not in PARTS else dict(pending=pending, source=Source())
        outs.append(dataclasses.replace(first, **changes))
    return outs


def meet(book: Book, eqn: Any, operands: Sequence[Value]) -> list[Value]:
    """Any other equation with an activation."""
    name = eqn.primitive.name
    residual = is_residual(book, eqn, operands)
    biased = False if residual else _meetings(book, name, operands)
    derived = derive(eqn, operands) if len(eqn.outvars) == 1 else None
    pending = None if residual else carried(name, eqn, operands, biased)
    since: frozenset[str] = frozenset() if residual else history(eqn, operands)
    sums = None if residual else summed(name, operands)
    known = functools.partial(Act, pending=pending, sums=sums, since=since)
    act = functools.partial(known, heads=heads(operands), data=any_data(operands))
    outs = [act(uniform=math.prod(v.aval.shape) == 1) for v in eqn.outvars]
    if residual:
        product, stream, features = residual
        outs[0].source.shape, outs[0].source.features = eqn.outvars[0].aval.shape, features
        product.total, product.stream, product.alive = outs[0].source, stream.source, False
    for made in outs:
        made.source.derived = derived
    for value in operands:
        value.touch(derived)
    return list(outs)


def history(eqn: Any, operands: Sequence[Value]) -> frozenset[str]:
    """What has happened since the last residual sum to what an equation makes.

    A contraction that leaves free axes on both sides mixes positions: attention, where kernels made both. What else
    joins two floating arrays, and does not do so entry by entry or by moving entries, may be anything.
    """
    name, before = eqn.primitive.name, since(operands)
    both = [
        v for v, x in zip(operands, eqn.invars) if isinstance(v, Act) and jnp.issubdtype(x.aval.dtype, jnp.floating)
    ]
    if len(both) < 2 or name in ELEMENTWISE or name in MOVING:
        return before
    if name == "dot_general":
        taken = [len(c) + len(b) for c, b in zip(*eqn.params["dimension_numbers"])]
        if any(n == len(x.aval.shape) for n, x in zip(taken, eqn.invars)):
            return before
        return before | {MIXING if all(KERNEL in v.since for v in both) else UNKNOWN}
    return before | {UNKNOWN}


def summed(name: str, operands: Sequence[Value]) -> Product | None:
    """The one product that an output is made of sums of; notes on it where it meets itself, or what is not linear."""
    found = [(k, v.sums) for k, v in enumerate(operands) if isinstance(v, Act) and v.sums]
    if not found or any(product is not found[0][1] for _, product in found):
        return None
    k, product = found[0]
    if name == "dot_general" and len(acts(operands)) > 1:
        return None
    if len(found) > 1:
        product.turned |= name in TURNS
        product.bent |= name not in (*TURNS, *MOVING, "select_n")
    else:
        product.bent |= name not in LINEAR or k > 0 and name in FIRST_ONLY
    return None if product.bent else product


def is_residual(book: Book, eqn: Any, operands: Sequence[Value]) -> Any:
    """The pending product, the stream, and the axes that are the product's features, where an equation adds the two."""
    if book.stream is None:
        return None
    stream, h = operands[book.stream], operands[1 - book.stream]
    other = stream.live if isinstance(stream, Act) else None
    known = not isinstance(stream, Fixed) or not stream.tracks or _was_activation(book, stream)
    if not isinstance(h, Act) or not h.live or other or not known:
        return None
    ndim = len(eqn.outvars[0].aval.shape)
    features = [k for k in range(ndim) if h.live.layout and "o" in h.live.letters_of(k)]
    return h.live.product, stream, frozenset(features or [ndim - 1])


def _was_activation(book: Book, value: Fixed) -> bool:
    return any(book.notes[t.path].activation for t in value.tracks)


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
    fresh = pending.fresh and fixed and same and (biased or name not in (*ADDS, "sub"))
    layout = pending.layout if same else None
    return pending._replace(layout=layout, fresh=fresh, biased=pending.biased or biased)
