"""Whether a traced model is causal: whether it compares places along two axes of tokens, as a triangular mask does."""

import dataclasses
from typing import Any, Callable

import numpy as np
from jax.extend import core as jex

from peftjax.regions import ONCE

COMPARES = {"ge", "gt", "le", "lt"}
VIEWS = {"broadcast_in_dim", "reshape", "transpose", "convert_element_type", "squeeze", "slice", "expand_dims", "copy"}
REGIONS = ONCE | {"custom_jvp_call"}
ARITHMETIC = {"add", "sub", "neg", "mul"}
CUTS = {"dynamic_slice", "gather", "and", "or", "not"}
OPAQUE = {"pallas_call", "custom_call", "ffi_call", "custom_vjp_call"}


@dataclasses.dataclass
class Reading:
    """What is found in a trace.

    Attributes:
      own: whether two axes of an equation's output are those of the tokens that are asked about.
      found: "triangle", "opaque", and "own triangle", "own distances" of those tokens.
      triangles: variables that hold triangles, perhaps larger ones, of which parts are cut.
    """

    own: Callable[[Any], bool] = lambda eqn: False
    found: set[str] = dataclasses.field(default_factory=set)
    triangles: set[Any] = dataclasses.field(default_factory=set)

    def note(self, what: str, eqn: Any) -> None:
        """Notes a comparison of places."""
        self.found |= {what} | ({f"own {what}"} if self.own(eqn) else set())


def is_causal(jaxpr: Any) -> bool | None:
    """True where a triangle is compared or held as a constant, False where none is, None where it cannot be told."""
    reading = Reading()
    _read(jaxpr, {}, reading)
    opaque = {"opaque", "distances"} & reading.found
    return True if "triangle" in reading.found else None if opaque else False


def against_last(closed: Any, own: Callable[[Any], bool]) -> str | None:
    """Why virtual tokens cannot come last, in words: nobody would see them, or their distances follow the padding."""
    reading = Reading(own)
    reading.triangles |= {v for v, x in zip(closed.jaxpr.constvars, closed.consts) if _is_triangle(x)}
    _read(closed.jaxpr, {}, reading)
    if "own triangle" in reading.found:
        return "the model is causal, so no token would see them"
    if "own distances" in reading.found:
        return "the model reads how far apart tokens are, and how far these are would follow the padding"
    return None


def _read(jaxpr: Any, counted: dict[Any, frozenset[int]], reading: Reading) -> list[frozenset[int] | None]:
    """Notes what is found; `counted` says along which axes a variable counts places. Returns that of the outputs."""
    read = lambda v: None if isinstance(v, jex.Literal) else counted.get(v)
    for eqn in jaxpr.eqns:
        name, operands = eqn.primitive.name, [read(v) for v in eqn.invars]
        known = [x for x in operands if x]
        if any(_holds(v, reading) for v in eqn.invars):
            reading.found |= {"own triangle"} if reading.own(eqn) else set()
            reading.triangles |= set(eqn.outvars) if name in VIEWS | CUTS else set()
        if name == "iota":
            counted[eqn.outvars[0]] = frozenset({eqn.params["dimension"]})
        elif name in COMPARES:
            # Places against each other, or their difference against a number, as in buckets of distances.
            if len(known) == 2 and known[0] != known[1]:
                reading.note("triangle", eqn)
                reading.triangles.add(eqn.outvars[0])
            elif any(len(x) > 1 for x in known):
                reading.note("distances", eqn)
        elif name in OPAQUE:
            reading.found.add("opaque")
        elif name in ARITHMETIC and known:
            counted[eqn.outvars[0]] = frozenset().union(*known)
        elif name in VIEWS and operands[0]:
            moved = frozenset(_moved(eqn, k) for k in operands[0]) - {None}
            counted[eqn.outvars[0]] = moved  # type: ignore[assignment]
        else:
            _inside(eqn, operands, counted, reading)
    return [read(v) for v in jaxpr.outvars]


def _inside(eqn: Any, operands: Any, counted: dict[Any, frozenset[int]], reading: Reading) -> None:
    bodies = []
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, (jex.ClosedJaxpr, jex.Jaxpr)):
                bodies.append(x.jaxpr if isinstance(x, jex.ClosedJaxpr) else x)
                if isinstance(x, jex.ClosedJaxpr) and any(_is_triangle(c) for c in x.consts):
                    reading.found.add("triangle")
    for body in bodies:
        once = eqn.primitive.name in REGIONS and len(body.invars) == len(operands)
        inside = {v: x for v, x in zip(body.invars, operands) if x} if once else {}
        if len(body.invars) == len(operands):
            reading.triangles |= {w for v, w in zip(eqn.invars, body.invars) if _holds(v, reading)}
        outs = _read(body, inside, reading)
        if once:
            counted.update({v: x for v, x in zip(eqn.outvars, outs) if x})
            reading.triangles |= {v for v, w in zip(eqn.outvars, body.outvars) if _holds(w, reading)}


def _holds(v: Any, reading: Reading) -> bool:
    return not isinstance(v, jex.Literal) and v in reading.triangles


def _is_triangle(x: Any) -> bool:
    shape = np.shape(x)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
        return False
    square = np.asarray(x).reshape(-1, shape[-1], shape[-1])[0] != 0
    return bool((square == np.tril(np.ones_like(square))).all())


def _moved(eqn: Any, k: int) -> int | None:
    """Where an axis of the operand of a view went; None where it did not go anywhere as it is."""
    p, size = eqn.params, eqn.invars[0].aval.shape[k]
    match eqn.primitive.name:
        case "broadcast_in_dim":
            return p["broadcast_dimensions"][k]
        case "transpose":
            return p["permutation"].index(k)
        case "squeeze":
            return k - sum(d % eqn.invars[0].aval.ndim < k for d in p["dimensions"])
        case "reshape":
            same = [j for j, n in enumerate(eqn.outvars[0].aval.shape) if n == size]
            return same[0] if len(same) == 1 else None
        case _:
            return k
