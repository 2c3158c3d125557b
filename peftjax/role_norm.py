"""Recognises a layer norm or an RMS norm in a trace: what is computed from one array, its scale, bias and eps.

Only what is surely such a norm counts as one: statistics are followed from the sum over the features to the root. What
else combines an array's entries with a statistic of the array itself is noted as a norm that is not known.
"""

import dataclasses
import math
from typing import Any, Iterator, Sequence

from peftjax.role_fixed import ELEMENTWISE
from peftjax.role_values import Act, Derived, Fixed, Source, Value, tracked
from peftjax.streams import ADDS

MEANS = {"sum": "mean", "squares": "mean square", "centred squares": "variance"}
ROOTED = ("mean square", "variance")
DEPTH = 8  # how many arrays back, each computed from the one before alone


def derive(eqn: Any, operands: Sequence[Value]) -> Derived | None:
    """What an equation's output is to the array whose norm it may be a part of."""
    found = [v for v in operands if isinstance(v, Act)]
    made: list[Derived] = []
    for base in dict.fromkeys(b for v in found for b in _bases(v.source)):
        parts = [_relative(v.source, base) if isinstance(v, Act) else v for v in operands]
        if all(p is not None for p in parts):
            step = _step(eqn, [p for p in parts if p is not None])
            made += [step] if step is not None else []
    known = next((d for d in reversed(made) if d.level != "u"), None)
    if known is not None and known.level == "n":
        known.base.norm = known
    return known or (made[-1] if made else None)


def _bases(source: Source) -> Iterator[Source]:
    """An array, and those that it is computed from alone, the nearest first."""
    yield source
    for _ in range(DEPTH):
        if source.derived is None:
            return
        source = source.derived.base
        yield source


def _relative(source: Source, base: Source) -> Derived | None:
    """What an array is to a base; through several arrays, no more than that it is computed from the base alone."""
    if source is base:
        return Derived(base, "x")
    if source.derived is not None and source.derived.base is base:
        return source.derived
    mixed = False
    for _ in range(DEPTH):
        if source.derived is None:
            return None
        mixed, source = mixed or source.derived.mixed, source.derived.base
        if source is base:
            return Derived(base, "u", mixed=mixed)
    return None


def _step(eqn: Any, parts: Sequence[Derived | Fixed]) -> Derived | None:
    name = eqn.primitive.name
    mine = [p for p in parts if isinstance(p, Derived)]
    base = mine[0].base
    if any(d.level == "n" for d in mine):
        return _affine(name, mine[0], [p for p in parts if isinstance(p, Fixed)]) if len(mine) == 1 else None
    if name not in ELEMENTWISE:
        return _reduced(eqn, mine) or Derived(base, "u", mixed=True)
    mixed = any(d.mixed for d in mine)
    if mixed and not all(d.mixed for d in mine):
        base.normed = True
    known = _pair(name, parts) if len(mine) == 2 else _single(eqn, mine[0], parts)
    return known or Derived(base, "u", mixed=mixed)


def _reduced(eqn: Any, mine: Sequence[Derived]) -> Derived | None:
    """A sum over some axes, of the array or of its squares."""
    d = mine[0]
    if eqn.primitive.name != "reduce_sum" or d.level not in "xe" or d.level == "x" and d.centred:
        return None
    shape, axes = eqn.invars[0].aval.shape, tuple(sorted(eqn.params["axes"]))
    if d.level == "e" and d.centred and d.axes != axes:
        return None
    stat = "sum" if d.level == "x" else "centred squares" if d.centred else "squares"
    count = math.prod(shape[k] for k in axes)
    return dataclasses.replace(d, level="r", stat=stat, axes=axes, ndim=len(shape), count=count, mixed=True)


def _single(eqn: Any, d: Derived, parts: Sequence[Derived | Fixed]) -> Derived | None:
    """An entrywise equation of one part and of numbers and parameters."""
    name, first = eqn.primitive.name, isinstance(parts[0], Derived)
    others = [p for p in parts if isinstance(p, Fixed)]
    value = others[0].value if len(others) == 1 and not tracked(others) else None
    if name == "reduce_precision" or _is_identity(name, value, first) or name == "select_n" and _is_chosen(parts):
        return d
    if d.level == "x":
        return dataclasses.replace(d, level="e") if _is_square(eqn, value, first) else None
    if d.level != "r":
        return None
    if d.root:
        return _rooted(eqn, d, others, value, first)
    if d.stat in MEANS and value is not None and _divides(name, value, first, d.count):
        return dataclasses.replace(d, stat=MEANS[d.stat])
    if d.stat == "mean" and _is_square(eqn, value, first):
        return dataclasses.replace(d, stat="squared mean")
    if d.stat not in ROOTED:
        return None
    if name == "max" and value == 0 and not d.eps:
        return d
    if name in ADDS and value is not None and not d.eps:
        return dataclasses.replace(d, eps=value)
    root = {"sqrt": "root", "rsqrt": "inverse"}.get(name)
    if name == "pow" and first and value in (0.5, -0.5):
        root = "root" if value > 0 else "inverse"
    return dataclasses.replace(d, root=root) if root else None


def _rooted(eqn: Any, d: Derived, others: Sequence[Fixed], value: float | None, first: bool) -> Derived | None:
    """What is done to a root: turned over, or, turned over, multiplied by the norm's scale."""
    name = eqn.primitive.name
    if d.root == "root" and d.scale is None:
        over = name == "div" and not first and value == 1 or name == "integer_pow" and eqn.params["y"] == -1
        return dataclasses.replace(d, root="inverse") if over else None
    scale = others[0].shifted if name == "mul" and others else None
    return dataclasses.replace(d, scale=scale) if scale and d.root == "inverse" and d.scale is None else None


def _pair(name: str, parts: Sequence[Derived | Fixed]) -> Derived | None:
    """An entrywise equation of two parts."""
    a, b = parts[:2]
    if len(parts) != 2 or not isinstance(a, Derived) or not isinstance(b, Derived):
        return None
    levels = a.level + b.level
    if levels == "xx" and name == "mul" and (a.centred, a.axes) == (b.centred, b.axes):
        return dataclasses.replace(a, level="e")
    if levels == "rr" and not a.root and not b.root and a.axes == b.axes:
        if name == "mul" and a.stat == b.stat == "mean":
            return dataclasses.replace(a, stat="squared mean")
        if name == "sub" and (a.stat, b.stat) == ("mean square", "squared mean") and not a.eps:
            return dataclasses.replace(a, stat="variance")
    if levels == "xr" and name == "sub" and b.stat == "mean" and not b.root and not a.centred:
        return dataclasses.replace(b, level="x", stat="", centred=True, mixed=False)
    if levels in ("xr", "rx"):
        x, r = (a, b) if levels == "xr" else (b, a)
        joins = name == "mul" and r.root == "inverse" or name == "div" and levels == "xr" and r.root == "root"
        alike = r.stat == ("variance" if x.centred else "mean square") and (not x.centred or x.axes == r.axes)
        if joins and alike:
            return dataclasses.replace(r, level="n", centred=x.centred)
    return None


def _affine(name: str, d: Derived, others: Sequence[Fixed]) -> Derived | None:
    """What is done to the normalised array: its scale, then its bias; numbers and other parameters make another norm."""
    leaf = others[0].shifted if len(others) == 1 else None
    if name == "reduce_precision":
        return d
    if leaf and name == "mul" and d.scale is None and d.bias is None:
        return dataclasses.replace(d, scale=leaf)
    if leaf and name in ADDS and d.bias is None and not leaf[1]:
        return dataclasses.replace(d, bias=leaf[0])
    if name in ("mul", "div", "sub", *ADDS) and tracked(others):
        d.base.norm = None
    return None


def _is_identity(name: str, value: float | None, first: bool) -> bool:
    return name in ADDS and value == 0 or name == "sub" and first and value == 0 or name == "mul" and value == 1


def _is_chosen(parts: Sequence[Derived | Fixed]) -> bool:
    """Whether a choice that is known falls on the part itself."""
    which = parts[0].value if isinstance(parts[0], Fixed) else None
    return which is not None and isinstance(parts[1 + int(which)], Derived)


def _is_square(eqn: Any, value: float | None, first: bool) -> bool:
    name = eqn.primitive.name
    return name == "square" or name == "integer_pow" and eqn.params["y"] == 2 or name == "pow" and first and value == 2


def _divides(name: str, value: float, first: bool, count: int) -> bool:
    """Whether an equation divides by this count."""
    by = value if name == "div" and first else 1 / value if name == "mul" and value else None
    return by is not None and math.isclose(by, count, rel_tol=1e-5)
