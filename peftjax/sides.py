"""A dense array between factors: the equation runs on it as it stands, its operand and its output change beside it."""

import dataclasses
import functools
import operator
from typing import Any, Callable, Collection, Sequence

from peftjax import compat
from peftjax.factored import Factor, Labels, Term, wide_dtype
from peftjax.weight import Weight

Sides = tuple[tuple[Factor, ...], tuple[Factor, ...]]


def sides(term: Term, reads: Collection[Any], writes: Collection[Any]) -> Sides | None:
    """The factors that act on what a dense term reads, and on what it writes; None where one of them does both.

    `reads` and `writes` are the atoms of either side; those of experts belong to both.
    """
    if term.dense is None:
        return None
    after = [set(f.atoms) <= set(writes) for f in term.factors]
    if not all(a or set(f.atoms) <= set(reads) for a, f in zip(after, term.factors)):
        return None
    before = tuple(f for a, f in zip(after, term.factors) if not a)
    return before, tuple(f for a, f in zip(after, term.factors) if a)


def changed(x: Any, labels: Labels, factors: Sequence[Factor], sizes: dict[Any, int]) -> Any:
    """An activation with these axes, times factors; in float32 or wider, for a factor near one is lost in bfloat16."""
    if not factors:
        return x
    wide = Factor(x.astype(wide_dtype(x.dtype)).reshape([sizes[a] for a in labels]), labels)
    for factor in factors:
        wide = factor.acting(wide)
    return compat.like(wide.array.reshape(x.shape).astype(x.dtype), compat.type_of(x))


def between(
    x: Any,
    term: Term,
    found: Sides,
    plain: Callable[[Any, Any], Any],
    ins: Labels,
    outs: Labels,
    sizes: dict[Any, int],
) -> Any:
    """The output of an equation `plain(x, array)` on a dense term between factors; `ins` and `outs` are its axes."""
    before, after = found
    y = plain(changed(x, ins, before, sizes), term.dense)
    return changed(y, outs, after, sizes)


Shared = Sequence[tuple[tuple[Factor, ...], tuple[Factor, ...], Weight]]


def shared(w: Weight, ins: Collection[Any], outs: Collection[Any]) -> Shared | None:
    """The operator in parts: the factors that a part's terms share on its output's axes, then its input's; the rest.

    Both are in the order in which they act. None where a factor that mixes entries can act on neither side.
    """
    parts = [
        (after, tuple(f.backward() for f in reversed(before)), part)
        for after, rest in _apart(w, outs)
        for before, part in _apart(rest, ins)
    ]
    return None if any(f.along for *_, part in parts for t in part.terms for f in t.factors) else parts


def _apart(w: Weight, atoms: Collection[Any]) -> list[tuple[tuple[Factor, ...], Weight]]:
    groups: dict[tuple[int, ...], tuple[tuple[Factor, ...], list[Term]]] = {}
    for term in w.terms:
        is_apart = _outermost(term.factors, atoms)
        apart = tuple(f for f, a in zip(term.factors, is_apart) if a)
        _, terms = groups.setdefault(tuple(f.shared for f in apart), (apart, []))
        terms.append(dataclasses.replace(term, factors=tuple(f for f, a in zip(term.factors, is_apart) if not a)))
    return [(apart, dataclasses.replace(w, terms=tuple(terms))) for apart, terms in groups.values()]


def _outermost(factors: Sequence[Factor], atoms: Collection[Any]) -> list[bool]:
    """Which shared factors have these axes alone, and change places with every later one that does not."""
    found: list[bool] = []
    staying: list[Factor] = []
    for f in reversed(factors):
        passes = all(f.touches.isdisjoint(g.along) and g.touches.isdisjoint(f.along) for g in staying)
        found.insert(0, bool(f.shared) and f.touches <= set(atoms) and passes)
        staying += [] if found[0] else [f]
    return found


def outside(
    x: Any, parts: Shared, inner: Callable[[Any, Weight], Any], ins: Labels, outs: Labels, sizes: dict[Any, int]
) -> Any:
    """The sum of the parts' outputs `inner(x, part)`, where shared factors change input and output once."""

    def output(after: Sequence[Factor], before: Sequence[Factor], part: Weight) -> Any:
        return changed(inner(changed(x, ins, before, sizes), part), outs, after, sizes)

    return functools.reduce(operator.add, [output(*part) for part in parts])
