"""Views that need their operands to be told: a gather of one entry, as of one layer's matrix from a stack."""

from typing import Any, Sequence

import jax.numpy as jnp
from jax import lax

from peftjax.views import Layout, View, dynamic_cut, follow, squeeze

WITHIN = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def followed(eqn: Any, layout: Layout, operands: Sequence[Any]) -> tuple[list[View] | None, Sequence[Any]]:
    """The views of its first operand that an equation makes, None where it is no view; and the operands they name."""
    if eqn.primitive.name != "gather":
        return follow(eqn.primitive.name, eqn.params, layout), operands
    view = _entry(eqn, layout)
    if view is None:
        return None, operands
    ids, at = operands[1], eqn.params["dimension_numbers"].start_index_map
    starts = [ids[at.index(k)] if k in at else jnp.zeros((), ids.dtype) for k in range(len(layout.dims))]
    return [view], [operands[0], *starts]


def _entry(eqn: Any, layout: Layout) -> View | None:
    """The view that a gather with one index makes where it leaves a matrix; a vector is what a table gives, and no view.

    An index out of bounds fills the dense term with NaN, and with it the sum: the factors may hold any entry then.
    """
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    gone = numbers.collapsed_slice_dims
    if eqn.invars[1].aval.ndim != 1 or numbers.operand_batching_dims or set(gone) != set(numbers.start_index_map):
        return None
    fills = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP and (
        p["fill_value"] is None or p["fill_value"] != p["fill_value"]
    )
    if len(layout.dims) - len(gone) < 2 or not (fills or p["mode"] in WITHIN):
        return None
    cut = dynamic_cut(layout, p["slice_sizes"])
    if cut is None:
        return None
    left, dropped = squeeze(cut[0], gone)
    return left, (*cut[1], *dropped)
