"""Recognises a layer norm or an RMS norm in a trace: what is computed from one array, its scale, bias and eps."""

import dataclasses
from typing import Sequence

from peftjax.role_values import Act, Derived, Fixed, Value, tracked

POWERS = ("square", "abs", "integer_pow", "pow", "real", "conj")
ROOTS = ("sqrt", "rsqrt", "pow")
ADDS, MULS = ("add", "add_any"), ("mul", "div")


def derive(name: str, operands: Sequence[Value]) -> Derived | None:
    """What an equation's output is to the array whose norm it may be a part of."""
    found = [v for v in operands if isinstance(v, Act)]
    bases = [v.derived.base for v in found if v.derived] + [v.source for v in found]
    for base in bases:
        parts = [_relative(v, base) if isinstance(v, Act) else v for v in operands]
        if all(p is not None for p in parts):
            made = _step(name, [p for p in parts if p is not None])
            if made is not None:
                return _noted(made)
    return None


def _relative(act: Act, base: object) -> Derived | None:
    if act.derived and act.derived.base is base:
        return act.derived
    return Derived(act.source, "x") if act.source is base else None


def _noted(made: Derived) -> Derived:
    if made.level == "n":
        made.base.normed, made.base.norm = True, made
    return made


def _step(name: str, parts: Sequence[Derived | Fixed]) -> Derived | None:
    levels = "".join(p.level for p in parts if isinstance(p, Derived))
    first = next(p for p in parts if isinstance(p, Derived))
    others = [p for p in parts if isinstance(p, Fixed)]
    if len(levels) == 1:
        return {"x": _powers, "e": _powers, "r": _statistic, "n": _affine}[levels](name, first, others)
    if levels in ("xx", "ee") and name == "mul":
        return dataclasses.replace(first, level="e")
    if levels in ("xr", "rx", "er", "re", "rr"):
        return _joined(name, levels, [p for p in parts if isinstance(p, Derived)])
    return None


def _powers(name: str, d: Derived, others: Sequence[Fixed]) -> Derived | None:
    if tracked(others):
        return None
    if name.startswith("reduce_"):
        return dataclasses.replace(d, level="r")
    if name in ("sub", *ADDS) and all(v.value == 0 for v in others):  # less a mean of zero
        return d
    if name in POWERS or d.level == "e" and name in MULS:
        return dataclasses.replace(d, level="e")
    return None


def _statistic(name: str, d: Derived, others: Sequence[Fixed]) -> Derived | None:
    leaves = tracked(others)
    if leaves:
        scale = leaves[0].whole
        return dataclasses.replace(d, scale=scale.path) if scale and d.root and name == "mul" else None
    if name in ADDS and others and not d.root and others[0].value is not None:
        return dataclasses.replace(d, eps=others[0].value)
    return dataclasses.replace(d, root=d.root or name in ROOTS)


def _affine(name: str, d: Derived, others: Sequence[Fixed]) -> Derived | None:
    leaves = tracked(others)
    if not leaves:
        return None
    leaf = leaves[0].whole
    if leaf and name == "mul" and d.scale is None and d.bias is None:
        return dataclasses.replace(d, scale=leaf.path)
    if leaf and name in ADDS and d.bias is None:
        return dataclasses.replace(d, bias=leaf.path)
    if name in (*MULS, *ADDS):  # a norm of another kind
        d.base.norm = None
    return None


def _joined(name: str, levels: str, parts: Sequence[Derived]) -> Derived | None:
    a, b = parts
    if levels == "rr":
        scale = a.scale or b.scale
        return dataclasses.replace(a, eps=a.eps or b.eps, root=a.root or b.root, scale=scale)
    whole, statistic = (a, b) if levels[1] == "r" else (b, a)
    if name in ("sub", *ADDS) and not statistic.root:
        return dataclasses.replace(whole, centred=whole.centred or whole.level == "x")
    if name in MULS and statistic.root and whole.level == "x":
        return dataclasses.replace(statistic, level="n", centred=whole.centred)
    return whole if whole.level == "e" and not statistic.root else None
