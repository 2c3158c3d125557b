"""Where output and table overlays fire: decided by the structure of the model, never guessed, never skipped."""

import dataclasses
from typing import Any, Sequence

import jax.numpy as jnp
from jax.extend import core as jex

from peftjax import pending, tables
from peftjax.hooked import Hook, Made, Param, Pending, Rows, inner, position, where
from peftjax.indexing import followed
from peftjax.pending import views_of_output
from peftjax.site import Site
from peftjax.views import Cut, DynamicCut, Layout, Reverse
from peftjax.weight import Weight

ELEMENTWISE = set(
    "mul add sub div max min neg exp log abs sqrt rsqrt integer_pow pow square tanh logistic clamp select_n sign round".split()
)
KERNEL_OPERAND = {
    "dot_general": (0, 1),
    "conv_general_dilated": (1,),
    "gather": (0,),
    "ragged_dot_general": (1,),
    "ragged_dot": (1,),
}


def act(evaluator: Any, eqn: Any, operands: Sequence[Any], plain: Any) -> Sequence[Any]:
    """The outputs of an equation with marked operands. `plain(operands)` runs it on arrays and operators."""
    waiting = [x for x in operands if isinstance(x, Pending)]
    hooks = [x for x in operands if isinstance(x, (Hook, Rows))]
    if len(waiting) + len(hooks) > 1:
        raise ValueError(
            where(eqn, waiting + hooks) + ": two overlays of outputs meet in one equation, and neither can act first"
        )
    if waiting:
        return pending.act(evaluator, eqn, operands, waiting[0], plain)
    if hooks:
        return _hooked(evaluator, eqn, operands, hooks[0], plain)
    return _marked(eqn, operands, plain)


def _marked(eqn: Any, operands: Sequence[Any], plain: Any) -> Sequence[Any]:
    """Parameters stay parameters through views and among themselves; a kernel's output is marked as its own."""
    name, first = eqn.primitive.name, operands[0]
    outs = plain([inner(x) for x in operands])
    views = followed(eqn, first.layout, [inner(x) for x in operands])[0] if isinstance(first, Param) else None
    if views is not None:
        return [Param(y, first.path, layout) for y, (layout, _) in zip(outs, views)]
    if isinstance(first, Made) and (moves := views_of_output(eqn, jnp.shape(first.value))):
        moved = [(y, move(first.features), move(first.batch)) for y, move in zip(outs, moves)]
        return [y if f is None or b is None else Made(y, first.path, f, b) for y, f, b in moved]
    at = [k for k in KERNEL_OPERAND.get(name, ()) if isinstance(operands[k], Param) and operands[k].path]
    if at:
        kernel = operands[at[-1]]
        features, batch = contracted(eqn, kernel.layout, at[-1])
        return [Made(y, kernel.path, features, tuple(k for k, _ in batch)) for y in outs]
    alone = all(isinstance(x, Param) or isinstance(v, jex.Literal) for x, v in zip(operands, eqn.invars))
    if alone and name in ELEMENTWISE:
        paths = {x.path for x in operands if isinstance(x, Param)}
        return [Param(y, paths.pop() if len(paths) == 1 else None, Layout.of(jnp.shape(_array(y)))) for y in outs]
    return outs


def _array(y: Any) -> Any:
    return jnp.zeros(y.type.shape) if isinstance(y, Weight) else y


def _hooked(evaluator: Any, eqn: Any, operands: Sequence[Any], hook: Any, plain: Any) -> Sequence[Any]:
    name, k = eqn.primitive.name, position(operands, hook)
    rest = [x for j, x in enumerate(operands) if j != k]
    run = lambda: plain([inner(x) if x is not hook else hook.value for x in operands])
    views, named = followed(eqn, hook.layout, [inner(x) for x in operands]) if k == 0 else (None, operands)
    if views is not None:
        return [_viewed(eqn, hook, y, layout, edits, named) for y, (layout, edits) in zip(run(), views)]
    if isinstance(hook, Rows):
        return tables.read(evaluator, eqn, operands, hook, plain)
    bias = hook.owners[0].owner.kernel
    if bias is None and k in KERNEL_OPERAND.get(name, ()):
        return [_at_contraction(evaluator, eqn, run()[0], hook, k)]
    if bias is not None and name == "add" and isinstance(rest[0], Made) and rest[0].path == bias:
        own = tuple(a for d in rest[0].features for a in hook.layout.dims[d])
        _whole(eqn, hook, own)
        batch = [(d, a) for d in rest[0].batch for a in hook.layout.dims[d]]
        return [_fired(evaluator, eqn, run()[0], hook, rest[0].features, batch, own)]
    parameters = all(isinstance(x, Param) for x in rest) or all(
        isinstance(v, jex.Literal) for v in eqn.invars if v is not eqn.invars[k]
    )
    if name in ELEMENTWISE and parameters and eqn.outvars[0].aval.shape == hook.layout.shape:
        return [dataclasses.replace(hook, value=y) for y in run()]
    expected = (
        f"the addition of this bias to the output of {bias}"
        if bias
        else "the contraction of this kernel with an activation"
    )
    raise ValueError(
        where(eqn, [hook]) + f": it acts on a layer's output; expected {expected}. Attach it to a kernel, or its bias"
    )


Batch = Sequence[tuple[int, Any]]


def contracted(eqn: Any, layout: Layout, operand: int) -> tuple[tuple[int, ...], Batch]:
    """The axes of a contraction's output that are the kernel's own (its features), and those of its batch axes."""
    p, ndim = eqn.params, len(eqn.outvars[0].aval.shape)
    match eqn.primitive.name:
        case "dot_general":
            contract, batch = (d[operand] for d in p["dimension_numbers"])
            free = len(layout.dims) - len(contract) - len(batch)
            start = ndim - free if operand == 1 else len(batch)
            return tuple(range(start, start + free)), [(k, a) for k, d in enumerate(batch) for a in layout.dims[d]]
        case "conv_general_dilated":
            return (p["dimension_numbers"].out_spec[1],), ()
        case "gather":
            d = p["dimension_numbers"]
            rows = [k for k in range(ndim) if k not in d.offset_dims]
            pairs = zip(d.operand_batching_dims, d.start_indices_batching_dims)
            return tuple(d.offset_dims), [(rows[j], a) for k, j in pairs for a in layout.dims[k]]
        case _:
            return (ndim - 1,), ()


def _viewed(eqn: Any, hook: Any, y: Any, layout: Layout, edits: Sequence[Any], operands: Sequence[Any]) -> Any:
    if isinstance(hook, Rows):
        if any(isinstance(e, (Cut, DynamicCut, Reverse)) for e in edits):
            raise ValueError(where(eqn, [hook]) + ": the table is cut or reversed before its lookup")
        return dataclasses.replace(hook, value=y, layout=layout)
    cut = [
        e.atom
        for e in edits
        if isinstance(e, (Cut, DynamicCut, Reverse)) and not all(c.has(e.atom) for c in hook.owners)
    ]
    owners = tuple(c.edited(edits, operands) for c in hook.owners)
    return dataclasses.replace(hook, value=y, owners=owners, layout=layout, cut=(*hook.cut, *cut))


def _at_contraction(evaluator: Any, eqn: Any, y: Any, hook: Hook, k: int) -> Any:
    """The layer's output changed; a second, different use of a tied leaf is no output of this layer and stays."""
    if eqn.primitive.name.startswith("ragged") and any(
        c.has(a) for c in hook.owners for dim in hook.layout.dims for a in dim
    ):
        raise ValueError(
            where(eqn, [hook]) + ": a ragged product mixes experts along its rows, and each has its own overlay"
        )
    features, batch = contracted(eqn, hook.layout, k)
    own = tuple(a for dim in _kernel_dims(eqn, hook.layout, k) for a in dim)
    if evaluator.layer.setdefault(hook.path, own) != own:
        evaluator.events.append(evaluator.event(hook.path, "left alone", eqn))
        return y
    _whole(eqn, hook, own)
    return _fired(evaluator, eqn, y, hook, features, batch, own)


def _whole(eqn: Any, hook: Hook, own: Sequence[Any]) -> None:
    """Refuses an output of which a view of the leaf has left only a part."""
    if cut := [a for a in own if any(a[: len(c)] == c for c in hook.cut)]:
        raise ValueError(
            where(eqn, [hook]) + f": axis {cut[0][0]} is cut before the layer acts, so it has not one output"
        )


def _kernel_dims(eqn: Any, layout: Layout, k: int) -> list[tuple[Any, ...]]:
    """The kernel's dimensions that become the output's features."""
    if eqn.primitive.name == "conv_general_dilated":
        return [layout.dims[eqn.params["dimension_numbers"].rhs_spec[0]]]
    if eqn.primitive.name == "dot_general":
        contract, batch = (d[k] for d in eqn.params["dimension_numbers"])
        return [dim for d, dim in enumerate(layout.dims) if d not in (*contract, *batch)]
    if eqn.primitive.name == "gather":
        numbers = eqn.params["dimension_numbers"]
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        return [dim for d, dim in enumerate(layout.dims) if d not in gone]
    return [layout.dims[-1]]


def _fired(
    evaluator: Any, eqn: Any, y: Any, hook: Hook, features: tuple[int, ...], batch: Batch, own: tuple[Any, ...]
) -> Any:
    evaluator.refuse_inner_gradient(eqn, hook.path)
    tokens = evaluator.tokens(eqn, hook.path, [c.owner for c in hook.owners], (*features, *(k for k, _ in batch)))
    site = Site(hook.path, features, tuple(batch), eqn.primitive.name, evaluator.scope_of(eqn), own, *tokens)
    for carried in hook.owners:
        evaluator.fire(hook.path, carried.owner, eqn)
        if carried.owner.virtual and evaluator.sequence is not None:
            evaluator.sequence.acted.setdefault(id(eqn), []).append((site.sequence, features, carried.owner.features))
        if carried.owner.where == "output":
            y = site.call(carried, "on_output", y)
    if waiting := tuple(c for c in hook.owners if c.owner.where == "residual"):
        evaluator.waiting.append(hook.path)
        return Pending(y, waiting, hook.path, features, site.batch)
    return Made(y, hook.path, features, tuple(k for k, _ in batch)) if hook.owners[0].owner.kernel is None else y
