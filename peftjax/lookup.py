"""Lookups (gathers) of an operator's rows: of each factor's rows, which are then multiplied."""

from typing import Any, Sequence

import jax.numpy as jnp
from jax import lax

from peftjax.factored import Factor, Term, chain, wide_dtype
from peftjax.outputs import Run, split_terms, summed
from peftjax.picks import Pick
from peftjax.sides import outside, shared
from peftjax.weight import Weight


def lookup(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    """The rows that a gather takes from an operator, or None where the operator has to be merged first."""
    w, ids = operands
    if not isinstance(w, Weight) or isinstance(ids, Weight):
        return None
    d, slices, layout = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], w.layout
    batching = dict(zip(d.operand_batching_dims, d.start_indices_batching_dims))
    indexed = {layout.dims[k][0] if len(layout.dims[k]) == 1 else None: j for j, k in enumerate(d.start_index_map)}
    whole = [k for k in range(len(layout.dims)) if k not in d.start_index_map and k not in batching]
    if None in indexed or set(d.start_index_map) != set(d.collapsed_slice_dims):
        return None
    if any(slices[k] != layout.shape[k] for k in whole) or any(len(layout.dims[k]) != 1 for k in batching):
        return None
    rows = {layout.dims[k][0]: j for k, j in batching.items()}
    offsets = [layout.dims[k] for k in whole]
    steps = iter(offsets)
    counter = iter(range(ids.ndim))
    kind = eqn.outvars[0].aval
    out = tuple(
        a for k in range(len(kind.shape)) for a in (next(steps) if k in d.offset_dims else (("n", next(counter)),))
    )
    sizes: dict[Any, int] = dict(layout.sizes) | {("n", j): n for j, n in enumerate(ids.shape[:-1])}

    around = shared(w, (), {*rows, *(a for dim in offsets for a in dim)})
    if around is None:
        return None

    def product(term: Term) -> Any:
        factors = [_gathered(f, ids, indexed, rows, eqn.params) for f in term.factors]
        if term.dense is not None:
            y = run(eqn, [term.dense, ids])[0]
            y = y.astype(wide_dtype(y.dtype))
            factors.insert(0, Factor(y.reshape([sizes[a] for a in out]), out))
        factors.sort(key=lambda f: ("n", 0) not in f.atoms)
        return chain(factors[0], factors[1:], out, sizes)

    def inner(ids: Any, w: Weight) -> Any:
        return summed(eqn, *split_terms(w, "gather", lambda array: run(eqn, [array, ids])[0], product))

    parts = [(tuple(_gathered(f, ids, indexed, rows, eqn.params) for f in after), (), p) for after, _, p in around]
    return [outside(ids, parts, inner, (), out, sizes)]


def _gathered(f: Factor, ids: Any, indexed: dict[Any, int], rows: dict[Any, int], params: dict[str, Any]) -> Factor:
    """A factor's rows where the ids point; batch axes become the ids' own."""
    columns = [indexed[a] for a in f.atoms if a in indexed]
    if not columns:
        return f.having(f.array, tuple(("n", rows[a]) if a in rows else a for a in f.atoms))
    taken = tuple(k for k, a in enumerate(f.atoms) if a in indexed)
    batch = tuple(k for k, a in enumerate(f.atoms) if a in rows)
    rest = tuple(k for k, a in enumerate(f.atoms) if a not in indexed and a not in rows)
    n = ids.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(n, n + len(rest))),
        collapsed_slice_dims=taken,
        start_index_map=taken,
        operand_batching_dims=batch,
        start_indices_batching_dims=tuple(rows[f.atoms[k]] for k in batch),
    )
    sizes = tuple(size if k in rest else 1 for k, size in enumerate(f.array.shape))
    array = lax.gather(
        f.array,
        jnp.stack([ids[..., c] for c in columns], -1),
        numbers,
        sizes,
        mode=params["mode"],
        fill_value=f.count if isinstance(f, Pick) else params["fill_value"],
    )
    return f.having(array, (*(("n", j) for j in range(n)), *(f.atoms[k] for k in rest)))
