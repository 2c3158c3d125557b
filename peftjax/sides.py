"""A dense array between factors: the equation runs on it as it stands, its operand and its output change beside it."""

import dataclasses
import functools
import operator
from typing import Any, Callable, Collection, Sequence

from jax import lax

from peftjax.factored import Factor, Labels, Term, Weight, chain, wide_dtype

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
    return chain(wide, factors, labels, sizes, lax.Precision.HIGHEST).reshape(x.shape).astype(x.dtype)


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


def shared(w: Weight, ins: Collection[Any], outs: Collection[Any]) -> Shared:
    """The operator in parts: the factors that a part's terms share on its output's axes, then its input's; the rest."""
    return [(after, before, part) for after, rest in _apart(w, outs) for before, part in _apart(rest, ins)]


def _apart(w: Weight, atoms: Collection[Any]) -> list[tuple[tuple[Factor, ...], Weight]]:
    groups: dict[tuple[int, ...], tuple[tuple[Factor, ...], list[Term]]] = {}
    for term in w.terms:
        is_apart = [bool(f.shared) and set(f.atoms) <= set(atoms) for f in term.factors]
        apart = tuple(f for f, a in zip(term.factors, is_apart) if a)
        _, terms = groups.setdefault(tuple(f.shared for f in apart), (apart, []))
        terms.append(dataclasses.replace(term, factors=tuple(f for f, a in zip(term.factors, is_apart) if not a)))
    return [(apart, dataclasses.replace(w, terms=tuple(terms))) for apart, terms in groups.values()]


def outside(
    x: Any, parts: Shared, inner: Callable[[Any, Weight], Any], ins: Labels, outs: Labels, sizes: dict[Any, int]
) -> Any:
    """The sum of the parts' outputs `inner(x, part)`, where shared factors change input and output once."""

    def output(after: Sequence[Factor], before: Sequence[Factor], part: Weight) -> Any:
        return changed(inner(changed(x, ins, before, sizes), part), outs, after, sizes)

    return functools.reduce(operator.add, [output(*part) for part in parts])
