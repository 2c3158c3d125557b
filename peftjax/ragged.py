"""Products of sorted rows with the operator of their expert."""

import math
from typing import Any, Sequence

import jax.numpy as jnp
from jax import lax

from peftjax.factored import Factor, Term, chain, pair
from peftjax.outputs import Run, dropped, split_terms, summed
from peftjax.sides import outside, shared
from peftjax.views import only
from peftjax.weight import Weight


def ragged(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    """The rows' products with their experts' operators, or None where the operator has to be merged first."""
    x, w, counts = operands
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    if not isinstance(w, Weight) or isinstance(x, Weight) or len(groups) != 1 or batch[0] or len(contract[0]) != 1:
        return None
    if tuple(numbers.lhs_ragged_dimensions) != (0,) or x.ndim != 2 or tuple(contract[0]) != (1,):
        return None
    group, (read,) = only(w.layout, groups[0]), contract[1]
    (write,) = (k for k in range(3) if k not in (groups[0], read))
    reads, writes = w.layout.dims[read], w.layout.dims[write]
    if group is None:
        return None
    parts = shared(w, (), (group, *writes))
    if parts is None:
        return None
    outs, sizes = ("rows", *writes), {**dict(w.layout.sizes), "rows": x.shape[0]}
    if any(_ragged_order(t, reads, writes, group) is None for *_, p in parts for t in p.terms if not _is_plain(t)):
        return None

    def product(term: Term) -> Any:
        have = Factor(dropped(x, term).reshape(x.shape[0], *map(w.layout.size, reads)), ("rows", *reads))
        todo = _ragged_order(term, reads, writes, group) or []
        while todo:
            f, *todo = todo
            keep = {"rows", *writes, *(a for other in todo for a in other.atoms)}
            have = (
                _ragged_pair(have, f, group, counts, eqn.params["precision"])
                if group in f.atoms
                else pair(have, f, keep)
            )
        return chain(have, (), outs, sizes)

    def inner(x: Any, w: Weight) -> Any:
        return summed(eqn, *split_terms(w, "ragged_dot", lambda array: run(eqn, [x, array, counts])[0], product))

    rows = [(tuple(_of_rows(f, group, counts, x.shape[0]) for f in after), (), part) for after, _, part in parts]
    return [outside(x, rows, inner, (), outs, sizes)]


def _is_plain(term: Term) -> bool:
    return term.dense is not None and not term.factors


def _of_rows(f: Factor, group: Any, counts: Any, rows: int) -> Factor:
    """A factor of experts as one of the rows that each of them is given."""
    if group not in f.atoms:
        return f
    expert = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(rows, dtype=counts.dtype), side="right")
    array = jnp.take(f.array, expert, f.atoms.index(group), mode="clip")
    return f.having(array, tuple("rows" if a == group else a for a in f.atoms))


def _ragged_order(term: Term, reads: Sequence[Any], writes: Sequence[Any], group: Any) -> list[Factor] | None:
    """The factors from the one that reads on, those of the experts alone folded into the first; None if they do not line up."""
    alone = [f for f in term.factors if set(f.atoms) <= {group}]
    todo = [f for f in term.factors if not set(f.atoms) <= {group}]
    have, order = set(reads), []
    while todo and term.dense is None:
        f = next((f for f in todo if set(f.atoms) & have), None)
        if f is None:
            return None
        todo = [other for other in todo if other is not f]
        needed = {*writes, *(a for other in todo for a in other.atoms)}
        shared = have & set(f.atoms)
        if group in f.atoms and (shared & needed or have - shared):
            return None
        have = (have | set(f.atoms)) - {group} - (shared - needed)
        order.append(f)
    if not order or have != set(writes):
        return None
    for f in alone:
        order[0] = pair(order[0], f, set(order[0].atoms))
    return order


def _ragged_pair(x: Factor, f: Factor, group: Any, counts: Any, precision: Any) -> Factor:
    """The rows times the factor of their expert."""
    shared = [a for a in x.atoms if a in f.atoms]
    rest = [a for a in f.atoms if a not in shared and a != group]
    sizes = dict(zip(f.atoms, f.array.shape))
    w = lax.transpose(f.array, [f.atoms.index(a) for a in (group, *shared, *rest)])
    w = w.reshape(sizes[group], math.prod(sizes[a] for a in shared), -1).astype(x.array.dtype)
    flat = lax.transpose(x.array, [x.atoms.index(a) for a in ("rows", *shared)]).reshape(x.array.shape[0], -1)
    y = lax.ragged_dot(flat, w, counts, precision=precision)
    return Factor(y.reshape(y.shape[0], *(sizes[a] for a in rest)), ("rows", *rest))
