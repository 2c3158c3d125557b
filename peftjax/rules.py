"""How views and contractions act on operators: one rule a primitive; where none fits, the operator is merged."""

import dataclasses
import functools
import math
import operator
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from peftjax import compat
from peftjax.factored import Factor, Term, Weight, chain, dense, pair
from peftjax.folding import can_fold, folded
from peftjax.views import Split, follow, only

Run = Callable[[Any, Sequence[Any]], list[Any]]
Rule = Callable[[Any, Sequence[Any], Run], list[Any] | None]


def act(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    """What the equation gives where some operands are operators, or None where one has to be merged first.

    `run(eqn, operands)` runs an equation on plain operands.
    """
    rule = CONTRACTIONS.get(eqn.primitive.name) or (_barrier if eqn.primitive.name == "optimization_barrier" else _view)
    return rule(eqn, operands, run)


def _view(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    w, *rest = operands
    if not isinstance(w, Weight) or any(isinstance(v, Weight) for v in rest):
        return None
    views = follow(eqn.primitive.name, eqn.params, w.layout)
    if views is None or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    stop = eqn.primitive.name == "stop_gradient"
    ran = [None if t.dense is None else run(eqn, [t.dense, *rest]) for t in w.terms]
    outs = []
    for k, (layout, edits) in enumerate(views):

        def changed(f: Factor, edits: Sequence[Any] = edits) -> Factor:
            for edit in edits:
                f = f.edited(edit, operands)
            return Factor(lax.stop_gradient(f.array), f.atoms) if stop else f

        terms = tuple(t.mapped(changed, None if r is None else r[k]) for t, r in zip(w.terms, ran))
        outs.append(dataclasses.replace(w, terms=terms, layout=layout, type=eqn.outvars[k].aval))
    return outs


def _barrier(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any]:
    """Every array of every operand goes through the one barrier."""
    arrays, tree = jax.tree.flatten(list(operands))
    return jax.tree.unflatten(tree, lax.optimization_barrier(arrays))


def _dropped(x: Any, term: Term) -> Any:
    if not term.rate or term.key is None:
        return x
    key = term.key.array[(0,) * term.key.array.ndim]
    keep = jax.random.bernoulli(key, 1 - term.rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - term.rate, x.dtype), jnp.zeros((), x.dtype))


def _sum(eqn: Any, y: Any, deltas: Sequence[Any]) -> Any:
    """The plain output and what the products add, summed among themselves first: opposite products cancel exactly."""
    kind = eqn.outvars[0].aval
    if not deltas:
        return y
    delta = functools.reduce(operator.add, deltas)
    delta = compat.like(delta.reshape(kind.shape).astype(kind.dtype), kind)
    return delta if y is None else y + delta


def _split_terms(w: Weight, primitive: str, plain: Callable[[Any], Any], product: Callable[[Term], Any]) -> Any:
    """The sum of the plain dense terms' outputs (run as the equation stands), and the other terms' outputs."""
    terms = w.only_for(primitive).terms
    base = None
    for term in terms:
        if term.dense is not None and not term.factors:
            y = plain(term.dense)
            base = y if base is None else base + y
    return base, [product(t) for t in terms if t.dense is None or t.factors]


def _dot(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    side = 1 if isinstance(operands[1], Weight) else 0
    w, x = operands[side].only_for("dot_general"), operands[1 - side]
    x = dense(x) if isinstance(x, Weight) else x
    flat, out, sizes = _dot_labels(eqn, w, x, side)

    def plain(x: Any, array: Any) -> Any:
        return run(eqn, [x, array] if side else [array, x])[0]

    def outputs(x: Any, w: Weight) -> Any:
        def product(term: Term) -> Any:
            dropped = Factor(_dropped(x, term).reshape([sizes[a] for a in flat]), flat)
            return chain(dropped, _factors(term, w), out, sizes, eqn.params["precision"])

        return _sum(eqn, *_split_terms(w, "dot_general", functools.partial(plain, x), product))

    contracted, batch = (d[1 - side] for d in eqn.params["dimension_numbers"])
    read = math.prod(x.shape[k] for k in contracted)
    rows = math.prod(n for k, n in enumerate(x.shape) if k not in (*contracted, *batch))
    return [folded(x, w, plain, outputs)] if rows >= read and can_fold(w, x) else [outputs(x, w)]


def _dot_labels(eqn: Any, w: Weight, x: Any, side: int) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[Any, int]]:
    """The axes of the activation and of the output, in the operator's atoms and the activation's own; their sizes."""
    contract, batch = ([d[side], d[1 - side]] for d in eqn.params["dimension_numbers"])
    labels: list[tuple[Any, ...]] = [(("x", k),) for k in range(x.ndim)]
    for mine, others in (contract, batch):
        for k, j in zip(mine, others):
            labels[j] = w.layout.dims[k]
    free = [a for k, dim in enumerate(w.layout.dims) if k not in (*contract[0], *batch[0]) for a in dim]
    kept = [a for j, dim in enumerate(labels) if j not in (*contract[1], *batch[1]) for a in dim]
    out = (*(a for k in batch[0] for a in w.layout.dims[k]), *(kept + free if side else free + kept))
    sizes: dict[Any, int] = {("x", k): n for k, n in enumerate(x.shape)} | dict(w.layout.sizes)
    return tuple(a for dim in labels for a in dim), out, sizes


def _factors(term: Term, w: Weight) -> tuple[Factor, ...]:
    if term.dense is None:
        return term.factors
    atoms = w.layout.atoms
    return (Factor(term.dense.reshape([w.layout.size(a) for a in atoms]), atoms), *term.factors)


def _conv(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    x, w = operands
    p = eqn.params
    if not isinstance(w, Weight) or isinstance(x, Weight) or p["batch_group_count"] != 1:
        return None
    products = [_conv_term(t, w, x, p) for t in w.only_for("conv_general_dilated").terms if t.dense is None or t.factors]
    if any(make is None for make in products):
        return None
    base, _ = _split_terms(w, "conv_general_dilated", lambda array: run(eqn, [x, array])[0], lambda t: None)
    return [_sum(eqn, base, [make() for make in products if make is not None])]


def _conv_term(term: Term, w: Weight, x: Any, p: dict[str, Any]) -> Callable[[], Any] | None:
    """The output of one product of factors: a convolution with the factor that reads, then the ones that write."""
    out_dim, *read_dims = p["dimension_numbers"].rhs_spec
    read = {a for k in read_dims for a in w.layout.dims[k]}
    write = w.layout.dims[out_dim]
    readers = [f for f in term.factors if read & set(f.atoms)]
    if term.dense is not None or len(readers) != 1 or not read <= set(readers[0].atoms) or set(write) & set(readers[0].atoms):
        return None
    groups = p["feature_group_count"]
    if groups > 1 and len(write) != 1:
        return None
    reader = readers[0]
    inner = tuple(a for a in reader.atoms if a not in read)
    width = math.prod(n for a, n in zip(reader.atoms, reader.array.shape) if a in inner)

    def kernel() -> Any:
        order = [a for k in range(len(w.layout.dims)) for a in (inner if k == out_dim else w.layout.dims[k])]
        shape = [width if k == out_dim else n for k, n in enumerate(w.layout.shape)]
        array = lax.transpose(reader.array, [reader.atoms.index(a) for a in order]).reshape(shape)
        return jnp.tile(array, [groups if k == out_dim else 1 for k in range(array.ndim)])

    def product() -> Any:
        keys = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")
        h = lax.conv_general_dilated(
            _dropped(x, term), kernel().astype(x.dtype), **{k: p[k] for k in keys}, precision=p["precision"]
        )
        feature = p["dimension_numbers"].out_spec[1]
        parts = (write[0] + (0,), write[0] + (1,)) if groups > 1 else write
        others = [f for f in term.factors if f is not reader]
        sizes = dict(w.layout.sizes)
        if groups > 1:
            sizes |= {parts[0]: groups, parts[1]: sizes[write[0]] // groups}
            others = [f.edited(Split(write[0], parts, (groups, sizes[parts[1]])), ()) for f in others]
        given = parts[:1] + inner if groups > 1 else inner
        inner_sizes = dict(zip(reader.atoms, reader.array.shape))
        at = lambda k, these: these if k == feature else (("y", k),)
        sizes |= {("y", k): n for k, n in enumerate(h.shape)} | {a: inner_sizes[a] for a in inner}
        have = tuple(a for k in range(h.ndim) for a in at(k, given))
        want = tuple(a for k in range(h.ndim) for a in at(k, parts))
        return chain(Factor(h.reshape([sizes[a] for a in have]), have), others, want, sizes, p["precision"])

    return product


def _gather(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
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
    out = tuple(a for k in range(len(kind.shape)) for a in (next(steps) if k in d.offset_dims else (("n", next(counter)),)))
    sizes: dict[Any, int] = dict(layout.sizes) | {("n", j): n for j, n in enumerate(ids.shape[:-1])}

    def product(term: Term) -> Any:
        factors = [_gathered(f, ids, indexed, rows, eqn.params) for f in term.factors]
        if term.dense is not None:
            y = run(eqn, [term.dense, ids])[0]
            factors.insert(0, Factor(y.reshape([sizes[a] for a in out]), out))
        factors.sort(key=lambda f: ("n", 0) not in f.atoms)
        return chain(factors[0], factors[1:], out, sizes)

    return [_sum(eqn, *_split_terms(w, "gather", lambda array: run(eqn, [array, ids])[0], product))]


def _gathered(f: Factor, ids: Any, indexed: dict[Any, int], rows: dict[Any, int], params: dict[str, Any]) -> Factor:
    """A factor's rows where the ids point; batch axes become the ids' own."""
    columns = [indexed[a] for a in f.atoms if a in indexed]
    if not columns:
        return Factor(f.array, tuple(("n", rows[a]) if a in rows else a for a in f.atoms))
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
        f.array, jnp.stack([ids[..., c] for c in columns], -1), numbers, sizes,
        mode=params["mode"], fill_value=params["fill_value"],
    )
    return Factor(array, (*(("n", j) for j in range(n)), *(f.atoms[k] for k in rest)))


def _ragged(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
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
    orders = [_ragged_order(t, reads, writes, group) for t in w.terms if t.dense is None or t.factors]
    if group is None or None in orders:
        return None

    def product(term: Term) -> Any:
        have = Factor(_dropped(x, term).reshape(x.shape[0], *map(w.layout.size, reads)), ("rows", *reads))
        todo = _ragged_order(term, reads, writes, group) or []
        while todo:
            f, *todo = todo
            keep = {"rows", *writes, *(a for other in todo for a in other.atoms)}
            have = _ragged_pair(have, f, group, counts, eqn.params["precision"]) if group in f.atoms else pair(have, f, keep)
        return chain(have, (), ("rows", *writes), dict(w.layout.sizes))

    return [_sum(eqn, *_split_terms(w, "ragged_dot", lambda array: run(eqn, [x, array, counts])[0], product))]


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


CONTRACTIONS: dict[str, Rule] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "ragged_dot_general": _ragged,
    "ragged_dot": _ragged,
}
