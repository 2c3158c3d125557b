"""How a scan slices operators and parameters with overlays: every array that has the stacked axis, and no other."""

import dataclasses
from typing import Any, Callable, Sequence

import jax.numpy as jnp

from peftjax.factored import Factor, Term
from peftjax.hooked import Carried, Hook, Param, Rows
from peftjax.weight import Weight

Rebuild = Callable[[Any], Any]


def split(evaluator: Any, eqn: Any, operands: Sequence[Any], kinds: Sequence[Any]) -> tuple[list[Any], Rebuild]:
    """What of the operands a scan slices, stacked axes first; and how one step's operands are made of the slices."""
    parts = [_split(evaluator, eqn, x, kind) for x, kind in zip(operands, kinds)]
    return [arrays for arrays, _ in parts], lambda slices: [make(s) for (_, make), s in zip(parts, slices)]


def _split(evaluator: Any, eqn: Any, x: Any, kind: Any) -> tuple[Any, Rebuild]:
    apart = isinstance(x, (Weight, Param, Hook, Rows)) and len(x.layout.dims[0]) == 1
    if not apart:
        return evaluator.merged(x, eqn), lambda s: s
    atom = x.layout.dims[0][0]
    if isinstance(x, Weight):
        return [_moved(t, atom) for t in x.terms], lambda s: _weight(x, atom, kind, s)
    arrays, make = _split(evaluator, eqn, x.value, kind)
    layout = x.layout.having(x.layout.dims[1:])
    if isinstance(x, Param):
        return arrays, lambda s: Param(make(s), x.path, layout)
    if isinstance(x, Rows):
        raise ValueError(f"the table at {x.path} is stacked by a scan; virtual rows belong to one table")
    fields = [{n: _first(f, atom) for n, f in c.fields.items()} for c in x.owners]

    def hook(slices: Any) -> Hook:
        value, mine = slices
        sliced = [{n: _rest(f, new[n], atom) for n, f in c.fields.items()} for c, new in zip(x.owners, mine)]
        owners = tuple(Carried(c.owner, fields) for c, fields in zip(x.owners, sliced))
        return Hook(make(value), owners, x.path, layout, x.cut)

    return (arrays, fields), hook


def _first(f: Factor | None, atom: Any) -> Any:
    """The factor's array with the stacked axis first, or None where it has none."""
    return jnp.moveaxis(f.array, f.atoms.index(atom), 0) if f is not None and atom in f.atoms else None


def _rest(f: Any, array: Any, atom: Any) -> Any:
    """The factor of one step."""
    return f if array is None else f.having(array, tuple(a for a in f.atoms if a != atom))


def _moved(term: Term, atom: Any) -> Any:
    return term.dense, [_first(f, atom) for f in term.factors], _first(term.key, atom)


def _weight(weight: Weight, atom: Any, kind: Any, slices: Any) -> Weight:
    rest = lambda f, array: _rest(f, array, atom)
    terms = tuple(
        dataclasses.replace(t, dense=dense, factors=tuple(map(rest, t.factors, factors)), key=rest(t.key, key))
        for t, (dense, factors, key) in zip(weight.terms, slices)
    )
    return Weight(terms, weight.layout.having(weight.layout.dims[1:]), kind, weight.path)
