"""Reads a jaxpr for `roles`, through every region: jit, remat, scan, cond, while, custom derivatives, shard_map."""

import dataclasses
import math
from typing import Any, Callable, Sequence

from jax.extend import core as jex

from peftjax import compat, role_ops
from peftjax.role_book import Book
from peftjax.role_fixed import constant
from peftjax.role_values import Act, Fixed, Head, Track, Value, any_data, heads, since

Outs = list[Value]


def walk(book: Book, closed: Any, operands: Sequence[Value]) -> Outs:
    """The values of a jaxpr's outputs, given those of its inputs."""
    jaxpr, consts = (closed.jaxpr, closed.consts) if isinstance(closed, jex.ClosedJaxpr) else (closed, ())
    env: dict[Any, Value] = dict(zip(jaxpr.invars, operands, strict=True))
    env |= {v: constant(x) for v, x in zip(jaxpr.constvars, consts)}
    read = lambda v: constant(v.val) if isinstance(v, jex.Literal) else env[v]
    for eqn in jaxpr.eqns:
        found, region = [read(v) for v in eqn.invars], REGIONS.get(eqn.primitive.name)
        with book.reading(eqn, inside=region is not None):
            env.update(zip(eqn.outvars, (region or role_ops.read)(book, eqn, found), strict=False))
    return [read(v) for v in jaxpr.outvars]


def body(eqn: Any) -> Any:
    """The jaxpr of a region that runs once."""
    return next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)


def once(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """A region that runs once, on the same values."""
    return walk(book, body(eqn), operands)


def enter(value: Value) -> Value:
    """A value inside a region that runs many times, or perhaps not: its history ends outside."""
    value.touch()
    if isinstance(value, Fixed):
        return value
    value.end()
    return Act(heads=value.heads, data=value.data, uniform=value.uniform, since=value.since)


def leave(value: Value, without: frozenset[Head] = frozenset()) -> Value:
    """A value that comes out of such a region."""
    value.touch()
    if isinstance(value, Fixed):
        return value
    value.end()
    return Act(heads=value.heads - without, data=value.data, uniform=value.uniform, since=value.since)


def join(a: Value, b: Value) -> Value:
    """What a value is that may be either of two."""
    if a is b:
        return a
    if isinstance(a, Fixed) and isinstance(b, Fixed):
        places = [[(t.path, t.layout) for t in v.tracks] for v in (a, b)]
        if places[0] == places[1]:
            return Fixed(tuple(map(_weaker, a.tracks, b.tracks)), a.value if a.value == b.value else None)
    return Act(heads=heads([a, b]), data=any_data([a, b]), since=since([a, b]))


def _weaker(a: Track, b: Track) -> Track:
    return dataclasses.replace(a, ops=a.ops | b.ops, indexed=a.indexed | b.indexed)


def settle(book: Book, step: Callable[[Outs], Outs], carry: Outs) -> Outs:
    """The carry of a loop: what it is on entry and after any number of steps."""
    with book.rehearsal():
        while True:
            after = step(carry)[: len(carry)]
            joined = [join(a, b) if not _same(a, b) else a for a, b in zip(carry, after)]
            if all(_same(a, b) for a, b in zip(carry, joined)):
                return joined
            carry = joined


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, Fixed) and isinstance(b, Fixed):
        return (a.tracks, a.value) == (b.tracks, b.value)
    if not isinstance(a, Act) or not isinstance(b, Act):
        return False
    return a.data >= b.data and a.uniform <= b.uniform and a.since >= b.since


def loop(book: Book, step: Callable[[Outs], Outs], carry: Outs) -> Outs:
    """Reads a loop's body once, on the settled carry. What its own kernels carry on is no head."""
    known = heads(carry)
    settled = settle(book, step, carry)
    outs = step([dataclasses.replace(v, heads=v.heads & known) if isinstance(v, Act) else v for v in settled])
    inner = heads(outs[: len(carry)]) - known
    ends = [join(a, leave(b, inner)) for a, b in zip(settled, outs)]
    return ends + [leave(v, inner) for v in outs[len(carry) :]]


def scan(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """A scan: constants, carry, and what is sliced along its first axis."""
    n_consts, n_carry = compat.scan_sizes(eqn.params)
    start = n_consts + n_carry
    values = [enter(v) for v in operands[:start]] + [layer(book, v) for v in operands[start:]]
    fixed, carry, slices = values[:n_consts], values[n_consts:start], values[start:]
    outs = loop(book, lambda carry: walk(book, eqn.params["jaxpr"], [*fixed, *carry, *slices]), carry)
    stacked = [Fixed() if isinstance(v, Fixed) else v for v in outs[n_carry:]]
    return outs[:n_carry] + stacked


def layer(book: Book, value: Value) -> Value:
    """One layer's slice of what a scan goes over."""
    inner = enter(value)
    if not isinstance(inner, Fixed):
        return inner
    tracks = []
    for track in inner.tracks:
        book.mark(track, {a: "s" for a in track.layout.dims[0]})
        tracks.append(dataclasses.replace(track, layout=track.layout.having(track.layout.dims[1:])))
    return Fixed(tuple(tracks), inner.value)


def while_loop(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """A while loop: the constants of its condition and of its body, and the carry."""
    p, values = eqn.params, [enter(v) for v in operands]
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]

    def step(carry: Outs) -> Outs:
        walk(book, p["cond_jaxpr"], [*values[:first], *carry])
        return walk(book, p["body_jaxpr"], [*values[first:second], *carry])

    return loop(book, step, values[second:])


def cond(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """Branches, each read on the same values."""
    values = [enter(v) for v in operands]
    outs = [walk(book, branch, values[1:]) for branch in eqn.params["branches"]]
    joined = outs[0]
    for more in outs[1:]:
        joined = [join(a, b) for a, b in zip(joined, more)]
    return [leave(v) for v in joined]


def shard_map(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """One device's part of a computation: the axes of parameters are in their places, and shorter."""
    inner = body(eqn)
    invars = inner.jaxpr.invars if isinstance(inner, jex.ClosedJaxpr) else inner.invars
    outs = walk(book, inner, [resized(v, var.aval.shape) for v, var in zip(operands, invars)])
    return [Fixed() if isinstance(v, Fixed) else v for v in outs]


def resized(value: Value, shape: Sequence[int]) -> Value:
    """Parameters whose dimensions have other sizes; of several axes in one, the first that can shrinks."""
    if not isinstance(value, Fixed):
        return value
    tracks = []
    for track in value.tracks:
        layout = track.layout
        for k, (size, whole) in enumerate(zip(shape, layout.shape)):
            parts = math.gcd(whole, whole // size) if size else 1
            atom = next((a for a in layout.dims[k] if layout.size(a) % parts == 0), None)
            layout = layout.resized(atom, layout.size(atom) // parts) if atom else layout
        if layout.shape == tuple(shape):
            tracks.append(dataclasses.replace(track, layout=layout))
    return dataclasses.replace(value, tracks=tuple(tracks))


Region = Callable[[Book, Any, Sequence[Value]], Outs]
REGIONS: dict[str, Region] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "remat"), once),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"), once),
    "scan": scan,
    "while": while_loop,
    "cond": cond,
    "shard_map": shard_map,
}
