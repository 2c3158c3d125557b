"""How views and contractions act on operators: one rule a primitive; where none fits, the operator is merged."""

import dataclasses
import functools
import math
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from peftjax.convolution import convolution
from peftjax.factored import Factor, Term, chain
from peftjax.folding import can_fold, folded
from peftjax.indexing import followed
from peftjax.lookup import lookup
from peftjax.outputs import Rule, Run, dropped, split_terms, summed
from peftjax.ragged import ragged
from peftjax.sides import between, outside, shared, sides
from peftjax.weight import Weight, dense


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
    views, named = followed(eqn, w.layout, operands)
    if views is None or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    if not all(f.follows(e) for _, edits in views for e in edits for t in w.terms for f in t.factors):
        return None
    stop = eqn.primitive.name == "stop_gradient"
    ran = [None if t.dense is None else run(eqn, [t.dense, *rest]) for t in w.terms]
    outs = []
    for k, (layout, edits) in enumerate(views):

        def changed(f: Factor, edits: Sequence[Any] = edits) -> Factor:
            for edit in edits:
                f = f.edited(edit, named)
            return f.having(lax.stop_gradient(f.array)) if stop else f

        terms = tuple(t.mapped(changed, None if r is None else r[k]) for t, r in zip(w.terms, ran))
        outs.append(dataclasses.replace(w, terms=terms, layout=layout, type=eqn.outvars[k].aval))
    return outs


def _gather(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    """One layer's matrix taken from a stack is a view of it, many rows are a lookup."""
    return _view(eqn, operands, run) or lookup(eqn, operands, run)


def _barrier(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any]:
    """Every array of every operand goes through the one barrier."""
    arrays, tree = jax.tree.flatten(list(operands))
    return jax.tree.unflatten(tree, lax.optimization_barrier(arrays))


def _dot(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    side = 1 if isinstance(operands[1], Weight) else 0
    w, x = operands[side].only_for("dot_general"), operands[1 - side]
    x = dense(x, " for dot_general") if isinstance(x, Weight) else x
    flat, out, sizes = _dot_labels(eqn, w, x, side)
    around = shared(w, flat, out)
    if around is None:
        return None
    reads, writes = ({a for a in w.layout.atoms if a in labels} for labels in (flat, out))

    def plain(x: Any, array: Any) -> Any:
        return run(eqn, [x, array] if side else [array, x])[0]

    def outputs(x: Any, w: Weight) -> Any:
        def product(term: Term) -> Any:
            if found := sides(term, reads, writes):
                return between(dropped(x, term), term, found, plain, flat, out, sizes)
            read = Factor(dropped(x, term).reshape([sizes[a] for a in flat]), flat)
            return chain(read, _factors(term, w), out, sizes, eqn.params["precision"])

        return summed(eqn, *split_terms(w, "dot_general", functools.partial(plain, x), product))

    contracted, batch = (d[1 - side] for d in eqn.params["dimension_numbers"])
    read = math.prod(x.shape[k] for k in contracted)
    rows = math.prod(n for k, n in enumerate(x.shape) if k not in (*contracted, *batch))

    def inner(x: Any, w: Weight) -> Any:
        return folded(x, w, plain, outputs) if rows >= read and can_fold(w, x) else outputs(x, w)

    return [outside(x, around, inner, flat, out, sizes)]


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


CONTRACTIONS: dict[str, Rule] = {
    "dot_general": _dot,
    "conv_general_dilated": convolution,
    "gather": _gather,
    "ragged_dot_general": ragged,
    "ragged_dot": ragged,
}
