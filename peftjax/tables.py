"""Tables with further rows: where ids beyond the vocabulary are read, and what would lose them on the way."""

from typing import Any, Sequence

import jax.numpy as jnp
from jax import lax

from peftjax.hooked import Bounded, Counted, OneHot, Rows, inner, position, where
from peftjax.pending import views_of_output

BOUNDS = ("min", "clamp", "rem")


def notice(eqn: Any, operands: Sequence[Any], outs: Sequence[Any]) -> Sequence[Any]:
    """Marks what a lookup will ask about: one-hot codes, and integers that were clipped on the way."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name == "iota":
        return [Counted(outs[0], eqn.params["dimension"])]
    for k, x in enumerate(operands):
        if isinstance(x, Counted) and (moves := views_of_output(eqn, jnp.shape(x.value))):
            axes = moves[0]((x.axis,))
            return [Counted(outs[0], axes[0])] if axes else outs
        if isinstance(x, Counted) and name == "eq":
            ids = inner(operands[1 - k])
            return [OneHot(outs[0], ids, x.axis)] if jnp.ndim(ids) == len(shape) and ids.shape[x.axis] == 1 else outs
        if isinstance(x, OneHot) and name == "convert_element_type":
            return [OneHot(outs[0], x.ids, x.axis)]
    bounded = name in BOUNDS or any(isinstance(x, Bounded) for x in operands)
    whole = lambda v: jnp.issubdtype(v.aval.dtype, jnp.integer)
    return [Bounded(inner(y)) if bounded and whole(v) else y for y, v in zip(outs, eqn.outvars)]


def read(evaluator: Any, eqn: Any, operands: Sequence[Any], table: Rows, plain: Any) -> Sequence[Any]:
    """A use of the longer table: by a gather, or by a contraction with a one-hot code.

    A tied output head contracts the features: its logits are those of the vocabulary, and further rows have none.
    """
    others = [x for x in operands if x is not table]
    if _is_head(eqn, operands, table):
        evaluator.events.append(evaluator.event(table.path, "left alone", eqn))
        return plain([table.value if x is table else inner(x) for x in operands])
    evaluator.refuse_inner_gradient(eqn, table.path)
    if table.owner.virtual and evaluator.sequence is not None:
        rows = table.layout.shape[_vocabulary(eqn, table)]
        evaluator.sequence.looked_up.setdefault(id(eqn), []).append((table.path, rows))
    if eqn.primitive.name == "gather":
        found = _gathered(evaluator, eqn, others[0], table, plain)
    elif eqn.primitive.name == "dot_general" and isinstance(others[0], OneHot):
        found = _contracted(evaluator, eqn, operands, others[0], table, plain)
    else:
        raise ValueError(where(eqn, [table]) + ": further rows are read by a lookup, or by the one-hot code of ids")
    evaluator.fire(table.path, table.owner, eqn)
    return [found]


def _is_head(eqn: Any, operands: Sequence[Any], table: Rows) -> bool:
    if eqn.primitive.name != "dot_general":
        return False
    contract, batch = (d[position(operands, table)] for d in eqn.params["dimension_numbers"])
    return not batch and [table.layout.dims[k] for k in contract] == [((1,),)]


def _vocabulary(eqn: Any, table: Rows) -> int:
    axes = [k for k, dim in enumerate(table.layout.dims) if dim == ((0,),)]
    if len(axes) != 1 or len(table.layout.dims) != 2:
        raise ValueError(where(eqn, [table]) + ": expected a table of two axes, its rows along the first")
    return axes[0]


def _named(eqn: Any, ids: Any, table: Rows) -> tuple[Any, Any]:
    """Which ids name further rows, and those rows (of the last one where they do not)."""
    if isinstance(ids, Bounded):
        raise ValueError(
            where(eqn, [table]) + ": the ids were clipped or wrapped before, so none can name a further row"
        )
    ids, rows = inner(ids), table.owner.rows()
    size = table.layout.shape[_vocabulary(eqn, table)]
    if jnp.iinfo(ids.dtype).max < size + len(rows) - 1:
        raise ValueError(where(eqn, [table]) + f": ids of {ids.dtype} cannot name {size} + {len(rows)} rows; use int32")
    return ids >= size, rows[jnp.clip(ids - size, 0, len(rows) - 1)]


def _gathered(evaluator: Any, eqn: Any, ids: Any, table: Rows, plain: Any) -> Any:
    d, axis = eqn.params["dimension_numbers"], _vocabulary(eqn, table)
    if tuple(d.start_index_map) != (axis,) or tuple(d.collapsed_slice_dims) != (axis,):
        raise ValueError(where(eqn, [table]) + ": expected a lookup of whole rows by their ids")
    column = Bounded(ids.value[..., 0]) if isinstance(ids, Bounded) else inner(ids)[..., 0]
    further, rows = _named(eqn, column, table)
    last = jnp.asarray(table.layout.shape[axis] - 1, inner(ids).dtype)
    base = evaluator.merged(plain([table.value, jnp.minimum(inner(ids), last)])[0], eqn)
    order = [k for k in range(base.ndim) if k not in d.offset_dims] + list(d.offset_dims)
    return _chosen(base, further, rows, order)


def _contracted(evaluator: Any, eqn: Any, operands: Sequence[Any], code: OneHot, table: Rows, plain: Any) -> Any:
    side = position(operands, table)
    contract, batch = eqn.params["dimension_numbers"]
    if tuple(contract[side]) != (_vocabulary(eqn, table),) or tuple(contract[1 - side]) != (code.axis,) or batch[0]:
        raise ValueError(where(eqn, [table]) + ": expected the one-hot code of ids contracted with the table's rows")
    further, rows = _named(eqn, lax.squeeze(code.ids, (code.axis,)), table)
    base = evaluator.merged(plain([table.value if x is table else code.value for x in operands])[0], eqn)
    order = [*range(1, base.ndim), 0] if side == 0 else list(range(base.ndim))
    return _chosen(base, jnp.broadcast_to(further, [base.shape[k] for k in order[:-1]]), rows, order)


def _chosen(base: Any, further: Any, rows: Any, order: Sequence[int]) -> Any:
    """The further rows where they are named, else the base's; `order` lists the base's axes, features last."""
    back = [order.index(k) for k in range(base.ndim)]
    rows = jnp.broadcast_to(rows, (*further.shape, rows.shape[-1])).astype(base.dtype)
    return jnp.where(lax.transpose(further[..., None], back), lax.transpose(rows, back), base)
