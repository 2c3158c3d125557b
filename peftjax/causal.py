"""Whether a traced model is causal: whether it compares places along two axes of tokens, as a triangular mask does."""

from typing import Any

import numpy as np
from jax.extend import core as jex

from peftjax.regions import ONCE

COMPARES = {"ge", "gt", "le", "lt"}
VIEWS = {"broadcast_in_dim", "reshape", "transpose", "convert_element_type", "squeeze", "slice", "expand_dims", "copy"}
REGIONS = ONCE | {"custom_jvp_call"}
ARITHMETIC = {"add", "sub", "neg", "mul"}
OPAQUE = {"pallas_call", "custom_call", "ffi_call", "custom_vjp_call"}


def is_causal(jaxpr: Any) -> bool | None:
    """True where a triangle is compared or held as a constant, False where none is, None where it cannot be told."""
    found: set[str] = set()
    _read(jaxpr, {}, found)
    return True if "triangle" in found else None if "opaque" in found else False


def _read(jaxpr: Any, counted: dict[Any, frozenset[int]], found: set[str]) -> list[frozenset[int] | None]:
    """Notes what is found; `counted` says along which axes a variable counts places. Returns that of the outputs."""
    read = lambda v: None if isinstance(v, jex.Literal) else counted.get(v)
    for eqn in jaxpr.eqns:
        name, operands = eqn.primitive.name, [read(v) for v in eqn.invars]
        known = [x for x in operands if x]
        if name == "iota":
            counted[eqn.outvars[0]] = frozenset({eqn.params["dimension"]})
        elif name in COMPARES:
            # Places against each other, or their difference against a number, as in buckets of distances.
            if len(known) == 2 and known[0] != known[1]:
                found.add("triangle")
            elif any(len(x) > 1 for x in known):
                found.add("opaque")
        elif name in OPAQUE:
            found.add("opaque")
        elif name in ARITHMETIC and known:
            counted[eqn.outvars[0]] = frozenset().union(*known)
        elif name in VIEWS and operands[0]:
            moved = frozenset(_moved(eqn, k) for k in operands[0]) - {None}
            counted[eqn.outvars[0]] = moved  # type: ignore[assignment]
        else:
            _inside(eqn, operands, counted, found)
    return [read(v) for v in jaxpr.outvars]


def _inside(eqn: Any, operands: Any, counted: dict[Any, frozenset[int]], found: set[str]) -> None:
    bodies = []
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, (jex.ClosedJaxpr, jex.Jaxpr)):
                bodies.append(x.jaxpr if isinstance(x, jex.ClosedJaxpr) else x)
                if isinstance(x, jex.ClosedJaxpr) and any(_is_triangle(c) for c in x.consts):
                    found.add("triangle")
    for body in bodies:
        once = eqn.primitive.name in REGIONS and len(body.invars) == len(operands)
        inside = {v: x for v, x in zip(body.invars, operands) if x} if once else {}
        outs = _read(body, inside, found)
        if once:
            counted.update({v: x for v, x in zip(eqn.outvars, outs) if x})


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
