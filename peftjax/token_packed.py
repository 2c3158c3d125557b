"""Rows that virtual tokens cannot join, packed sequences above all: refused where values are known, else made NaN."""

import functools
import operator
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peftjax import compat
from peftjax.call import Call
from peftjax.token_args import Names, sequence_axis

MASKS = ("mask", "pool_mask")


def check_values(names: Names, found: dict[str, int], call: Call) -> None:
    """Raises where values that are known say what virtual tokens cannot follow: packed positions, an additive mask."""
    known = {field: np.asarray(call.leaves[k]) for field, k in found.items() if _is_known(call.leaves[k])}
    ids = call.leaves[found["ids"]]
    for field in MASKS:
        if field in known and not _binary(np, _rows(np, known[field], ids, names.axis), ids).all():
            raise ValueError(
                f"wrap_tokens: {names.fields[field]} holds {np.unique(known[field])[:4]}; expected 1 where a token is "
                "real and 0 elsewhere, neither the numbers of packed segments nor what is added to scores"
            )
    if "positions" in known and ("mask" in known or "mask" not in found):
        if not _rising(np, known, ids, names.axis).all():
            raise ValueError(
                f"wrap_tokens: {names.positions} restarts or stands still within a row, as packed sequences do; "
                "expected one sequence a row"
            )


def _is_known(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray)) and not compat.is_traced(x)


def sound(values: Mapping[str, Any], ids: Any, axis: int) -> Any:
    """Of each example, whether its mask and positions pass `check_values`: what is left to do where they are traced."""
    told = [_binary(jnp, _rows(jnp, values[field], ids, axis), ids) for field in MASKS if field in values]
    if "positions" in values:
        told.append(_rising(jnp, values, ids, axis))
    return functools.reduce(operator.and_, told) if told else None


def _rows(xp: Any, x: Any, ids: Any, axis: int) -> Any:
    """An argument with its tokens last, and no fewer axes than the ids."""
    at = sequence_axis(x, ids, axis)
    x = xp.moveaxis(x, -1 if at is None else at, -1)
    return x.reshape((1,) * (len(ids.shape) - x.ndim) + x.shape)


def _binary(xp: Any, mask: Any, ids: Any) -> Any:
    return xp.all(mask == mask.astype(bool).astype(mask.dtype), axis=tuple(range(len(ids.shape) - 1, mask.ndim)))


def _rising(xp: Any, values: Mapping[str, Any], ids: Any, axis: int) -> Any:
    """Whether the positions of an example's real tokens rise; those of padding may be any."""
    at, examples = _rows(xp, values["positions"], ids, axis), len(ids.shape) - 1
    mask = _rows(xp, values["mask"] if "mask" in values else xp.ones(at.shape[-1:], bool), ids, axis)
    real = xp.any(mask.astype(bool), axis=tuple(range(examples, mask.ndim - 1)))  # without an axis of heads
    at, real = xp.broadcast_arrays(at, real.reshape((1,) * (at.ndim - real.ndim) + real.shape))
    lowest = -np.inf
    if xp.issubdtype(at.dtype, xp.integer):
        at, lowest = at.astype(np.int32), np.iinfo(np.int32).min
    highest = _running_max(xp, xp.where(real, at, xp.asarray(lowest, at.dtype)))[..., :-1]
    rises = xp.all(~real[..., 1:] | (at[..., 1:] > highest), axis=-1)
    return xp.all(rises, axis=tuple(range(rises.ndim - examples)))


def _running_max(xp: Any, x: Any) -> Any:
    return np.maximum.accumulate(x, axis=-1) if xp is np else lax.cummax(x, axis=x.ndim - 1)


def spoiled(x: Any, fine: Any, axis: int) -> Any:
    """x, with NaN in the examples that are not fine; in all of x, where its axes do not begin as those of the ids.

    `fine` has the ids' axes but `axis`, that of tokens. A product, so that the gradients are NaN as well: a loss that
    masks such rows would else train on the others without a word.
    """
    kept = [k for k in range(fine.ndim + 1) if k != axis % (fine.ndim + 1)]
    if any(n not in (1, *x.shape[k : k + 1]) or k >= x.ndim for k, n in zip(kept, fine.shape)):
        fine, kept = jnp.all(fine), []
    fine = compat.agreed(jnp.expand_dims(fine, [k for k in range(x.ndim) if k not in kept]), x)
    factor = jnp.where(fine, jnp.ones((), x.dtype), jnp.full((), np.nan, x.dtype))
    return x * compat.like(jnp.broadcast_to(factor, x.shape), jax.typeof(x))
