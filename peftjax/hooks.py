"""Where output and table overlays fire: decided by the structure of the model, never guessed, never skipped."""

import dataclasses
import functools
from typing import Any, Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from peftjax.factored import Weight
from peftjax.hooked import Hook, Made, Param, Pending, Rows, Site, inner
from peftjax.views import Cut, DynamicCut, Layout, Reverse, follow

ELEMENTWISE = {"mul", "add", "sub", "div", "max", "min", "neg", "exp", "log", "abs", "sqrt", "rsqrt", "integer_pow", "pow",
               "square", "tanh", "logistic", "clamp", "select_n", "sign", "round"}
KERNEL_OPERAND = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,), "ragged_dot_general": (1,), "ragged_dot": (1,)}


def act(evaluator: Any, eqn: Any, operands: Sequence[Any], plain: Any) -> Sequence[Any]:
    """The outputs of an equation with marked operands. `plain(operands)` runs it on arrays and operators."""
    waiting = [x for x in operands if isinstance(x, Pending)]
    hooks = [x for x in operands if isinstance(x, (Hook, Rows))]
    if len(waiting) + len(hooks) > 1:
        raise ValueError(_where(eqn, waiting + hooks) + ": two overlays of outputs meet in one equation, and neither can act first")
    if waiting:
        return _pending(evaluator, eqn, operands, waiting[0], plain)
    if hooks:
        return _hooked(evaluator, eqn, operands, hooks[0], plain)
    return _marked(eqn, operands, plain)


def _where(eqn: Any, overlays: Sequence[Any]) -> str:
    names = ", ".join(f"{_names(x)} at {x.path}" for x in overlays)
    scope = str(eqn.source_info.name_stack)
    return f"{names}, used by {eqn.primitive.name}" + (f" in {scope}" if scope else "")


def _names(x: Any) -> str:
    owners = [c.owner for c in x.owners] if isinstance(x, Hook) else [x.owner.owner if isinstance(x, Pending) else x.owner]
    return ", ".join(type(owner).__name__ for owner in owners)


def _marked(eqn: Any, operands: Sequence[Any], plain: Any) -> Sequence[Any]:
    """Parameters stay parameters through views and among themselves; a kernel's output is marked as its own."""
    name, first = eqn.primitive.name, operands[0]
    outs = plain([inner(x) for x in operands])
    views = follow(name, eqn.params, first.layout) if isinstance(first, Param) else None
    if views is not None:
        return [Param(y, first.path, layout) for y, (layout, _) in zip(outs, views)]
    if isinstance(first, Made) and (moves := _views_of_output(eqn, jnp.shape(first.value))):
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
    name, k = eqn.primitive.name, operands.index(hook)
    rest = [x for j, x in enumerate(operands) if j != k]
    run = lambda: plain([inner(x) if x is not hook else hook.value for x in operands])
    views = follow(name, eqn.params, hook.layout) if k == 0 else None
    if views is not None:
        return [_viewed(eqn, hook, y, layout, edits, operands) for y, (layout, edits) in zip(run(), views)]
    if isinstance(hook, Rows):
        if name == "gather":
            return _looked_up(evaluator, eqn, operands, hook, plain)
        raise ValueError(_where(eqn, [hook]) + ": virtual rows are read by a lookup (gather) of the table alone")
    bias = hook.owners[0].owner.kernel
    if bias is None and k in KERNEL_OPERAND.get(name, ()):
        return [_at_contraction(evaluator, eqn, run()[0], hook, k)]
    if bias is not None and name == "add" and isinstance(rest[0], Made) and rest[0].path == bias:
        _whole(eqn, hook, [a for d in rest[0].features for a in hook.layout.dims[d]])
        batch = [(d, a) for d in rest[0].batch for a in hook.layout.dims[d]]
        return [_fired(evaluator, eqn, run()[0], hook, rest[0].features, batch)]
    parameters = all(isinstance(x, Param) for x in rest) or all(isinstance(v, jex.Literal) for v in eqn.invars if v is not eqn.invars[k])
    if name in ELEMENTWISE and parameters and eqn.outvars[0].aval.shape == hook.layout.shape:
        return [dataclasses.replace(hook, value=y) for y in run()]
    expected = f"the addition of this bias to the output of {bias}" if bias else "the contraction of this kernel with an activation"
    raise ValueError(_where(eqn, [hook]) + f": it acts on a layer's output; expected {expected}. Attach it to a kernel, or its bias")


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
            raise ValueError(_where(eqn, [hook]) + ": the table is cut or reversed before its lookup")
        return dataclasses.replace(hook, value=y, layout=layout)
    cut = [e.atom for e in edits if isinstance(e, (Cut, DynamicCut, Reverse)) and not all(c.has(e.atom) for c in hook.owners)]
    owners = tuple(c.edited(edits, operands) for c in hook.owners)
    return dataclasses.replace(hook, value=y, owners=owners, layout=layout, cut=(*hook.cut, *cut))


def _at_contraction(evaluator: Any, eqn: Any, y: Any, hook: Hook, k: int) -> Any:
    """The layer's output changed; a second, different use of a tied leaf is no output of this layer and stays."""
    if eqn.primitive.name.startswith("ragged") and any(c.has(a) for c in hook.owners for dim in hook.layout.dims for a in dim):
        raise ValueError(_where(eqn, [hook]) + ": a ragged product mixes experts along its rows, and each has its own overlay")
    features, batch = contracted(eqn, hook.layout, k)
    own = tuple(a for dim in _kernel_dims(eqn, hook.layout, k) for a in dim)
    if evaluator.layer.setdefault(hook.path, own) != own:
        evaluator.events.append(evaluator.event(hook.path, "left alone", eqn))
        return y
    _whole(eqn, hook, own)
    return _fired(evaluator, eqn, y, hook, features, batch)


def _whole(eqn: Any, hook: Hook, own: Sequence[Any]) -> None:
    """Refuses an output of which a view of the leaf has left only a part."""
    if cut := [a for a in own if any(a[: len(c)] == c for c in hook.cut)]:
        raise ValueError(_where(eqn, [hook]) + f": axis {cut[0][0]} is cut before the layer acts, so it has not one output")


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


def _fired(evaluator: Any, eqn: Any, y: Any, hook: Hook, features: tuple[int, ...], batch: Batch) -> Any:
    evaluator.refuse_inner_gradient(eqn, hook.path)
    site = Site(hook.path, features, tuple(batch), eqn.primitive.name, evaluator.scope_of(eqn))
    for k, carried in enumerate(hook.owners):
        evaluator.fire(hook.path, carried.owner, eqn)
        if carried.owner.where == "residual":
            if k + 1 < len(hook.owners):
                raise ValueError(_where(eqn, [hook]) + ": an overlay that waits for the residual add has to be the outermost")
            return Pending(y, carried, hook.path, features, site.batch)
        y = site.call(carried, "on_output", y)
    return Made(y, hook.path, features, tuple(k for k, _ in batch)) if hook.owners[0].owner.kernel is None else y


def _pending(evaluator: Any, eqn: Any, operands: Sequence[Any], h: Pending, plain: Any) -> Sequence[Any]:
    name, k = eqn.primitive.name, operands.index(h)
    rest = [x for j, x in enumerate(operands) if j != k]
    run = lambda: plain([inner(x) if x is not h else h.value for x in operands])
    if moves := linear(eqn, jnp.shape(h.value), {*h.features, *(d for d, _ in h.batch)}, k):
        return [_waits(eqn, h, y, move) for y, move in zip(run(), moves)]
    if name == "add" and (isinstance(rest[0], Param) or isinstance(eqn.invars[1 - k], jex.Literal)):
        return [dataclasses.replace(h, value=run()[0])]
    if name in ("add", "add_any") and jnp.shape(inner(rest[0])) == jnp.shape(h.value):
        evaluator.refuse_inner_gradient(eqn, h.path)
        site = Site(h.path, h.features, h.batch, name, evaluator.scope_of(eqn))
        out = site.call(h.owner, "on_residual", h.value, evaluator.merged(rest[0], eqn))
        evaluator.met(h.path, eqn)
        return [out]
    raise ValueError(
        _where(eqn, [h]) + ": the output waits for its residual add, and only views and operations linear in it may come "
        'before; attach the overlay with where="output", or to a layer whose output is added to the stream'
    )


def _waits(eqn: Any, h: Pending, y: Any, move: "Move") -> Pending:
    features, batch = move(h.features), [d for k, _ in h.batch for d in move((k,)) or ()]
    if features is None or len(batch) < len(h.batch):
        raise ValueError(_where(eqn, [h]) + ": the features of the waiting output are folded into other axes by a reshape")
    return dataclasses.replace(h, value=y, features=features, batch=tuple((b, a) for b, (_, a) in zip(batch, h.batch)))


Move = Callable[[tuple[int, ...]], tuple[int, ...] | None]


def linear(eqn: Any, shape: tuple[int, ...], held: set[int], k: int) -> list[Move] | None:
    """How operand k's axes move in each output of an operation linear in it that keeps the axes held; else None."""
    name, p = eqn.primitive.name, eqn.params
    if name == "mul" or (name == "div" and k == 0) or (name == "select_n" and k > 0):
        return [lambda axes: axes]
    if name == "sub" and k == 0 and isinstance(eqn.invars[1], jex.Literal):
        return [lambda axes: axes]
    if k == 0 and (moves := _views_of_output(eqn, shape)):
        return moves
    if name == "reduce_sum" and not set(p["axes"]) & held:
        kept = [d for d in range(len(shape)) if d not in p["axes"]]
        return [lambda axes: tuple(map(kept.index, axes))]
    if name == "dot_general":
        contract, batch = (list(d[k]) for d in p["dimension_numbers"])
        free = [d for d in range(len(shape)) if d not in (*contract, *batch)]
        start = len(batch) if k == 0 else len(eqn.outvars[0].aval.shape) - len(free)
        place = lambda d: batch.index(d) if d in batch else start + free.index(d)
        return None if set(contract) & held else [lambda axes: tuple(map(place, axes))]
    return None


def _views_of_output(eqn: Any, shape: tuple[int, ...]) -> list[Move] | None:
    """How the axes of a layer's output move in a view of it, or None where the equation is no view."""
    if eqn.primitive.name == "neg":
        return [lambda axes: axes]
    views = follow(eqn.primitive.name, eqn.params, Layout.of(shape))
    return None if views is None else [functools.partial(_followed, layout) for layout, _ in views]


def _followed(layout: Layout, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dimensions of a view that hold these axes; None where a dimension mixes them with others."""
    wanted, found = set(axes), []
    for k, dim in enumerate(layout.dims):
        mine = [isinstance(a, tuple) and a[0] in wanted for a in dim if layout.size(a) > 1]
        if any(mine) and not all(mine):
            return None
        if any(mine):
            found.append(k)
    return tuple(found)


def _looked_up(evaluator: Any, eqn: Any, operands: Sequence[Any], table: Rows, plain: Any) -> Sequence[Any]:
    """A lookup in the longer table: ids below the vocabulary's size read the base, the others the further rows."""
    ids, d = inner(operands[1]), eqn.params["dimension_numbers"]
    vocabulary = [k for k, dim in enumerate(table.layout.dims) if dim == ((0,),)]
    if len(vocabulary) != 1 or tuple(d.start_index_map) != tuple(vocabulary) or tuple(d.collapsed_slice_dims) != tuple(vocabulary):
        raise ValueError(_where(eqn, [table]) + ": expected a lookup of whole rows by their ids")
    size, rows = table.layout.shape[vocabulary[0]], table.owner.rows()
    if jnp.iinfo(ids.dtype).max < size + len(rows) - 1:
        raise ValueError(_where(eqn, [table]) + f": ids of {ids.dtype} cannot name {size} + {len(rows)} rows; use int32")
    evaluator.refuse_inner_gradient(eqn, table.path)
    evaluator.fire(table.path, table.owner, eqn)
    base = evaluator.merged(plain([table.value, jnp.minimum(ids, jnp.asarray(size - 1, ids.dtype))])[0], eqn)
    which = jnp.clip(ids[..., 0] - size, 0, len(rows) - 1)
    n = which.ndim
    order = [k for k in range(base.ndim) if k not in d.offset_dims] + list(d.offset_dims)
    virtual = rows.astype(base.dtype)[which]
    virtual = lax.transpose(virtual, [order.index(k) for k in range(base.ndim)])
    chosen = jnp.expand_dims(ids[..., 0] >= size, tuple(range(n, base.ndim)))
    chosen = lax.transpose(chosen, [order.index(k) for k in range(base.ndim)])
    return [jnp.where(chosen, virtual, base)]
