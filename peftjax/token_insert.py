"""Virtual tokens in the arguments of a model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax import compat
from peftjax.token_args import Names
from peftjax.token_axes import Span

FILLER = 0  # the id at a prefix's positions: any valid one, for nobody reads what it makes
IGNORED = -100  # the label of a token that the loss leaves out


def inserted(
    names: Names, field: str, x: Any, axis: int, span: Span, active: Any, vocabulary: int, mask: Any = None
) -> Any:
    """An argument with virtual tokens: trained ones where `active`, else such that nobody reads them.

    `mask` says which tokens are real: virtual positions that come first begin where the row's began.
    """
    if not span.virtual:
        return x
    one = active.astype(x.dtype)
    match field:
        case "ids":
            ids = [vocabulary + k for k in range(span.prompt)] + [FILLER] * span.prefix
            if max(ids) > jnp.iinfo(x.dtype).max:
                raise ValueError(
                    f"wrap_tokens: {names.ids} is {x.dtype}, which cannot name {vocabulary} + {span.prompt} rows; "
                    "use int32"
                )
            return _joined(x, jnp.asarray(ids, x.dtype), axis, span)
        case "positions":
            n = jnp.asarray(span.virtual, x.dtype)
            shape = [span.virtual if k == axis else 1 for k in range(x.ndim)]
            count = jnp.arange(span.virtual, dtype=x.dtype).reshape(shape)
            if _shifts(names, span):
                return _joined(x + n * one, _first(x, axis, mask) + count, axis, span)
            start = (
                jnp.max(x, axis=axis, keepdims=True) + jnp.ones((), x.dtype) if span.prompt else jnp.zeros((), x.dtype)
            )
            return _joined(x, start + count, axis, span)
        case "mask":
            return _padded(x, one, axis, span)
        case "labels":
            return _labels(names, x, axis, span)
        case _:
            return _padded(x, jnp.zeros((), x.dtype), axis, span)


def _first(x: Any, axis: int, mask: Any) -> Any:
    """Where the positions of each row begin: at 0 in most models, at 2 in RoBERTa.

    Padding before the first real token counts where it is numbered up to that token, as BERT does; else it is that
    token's position, for models that give all padding one position of no meaning.
    """
    begin = lax.slice_in_dim(x, 0, 1, axis=axis)
    if mask is None or mask.shape != x.shape:
        return begin
    real = mask != jnp.zeros((), mask.dtype)
    first = jnp.min(jnp.where(real, x, jnp.max(x, axis=axis, keepdims=True)), axis=axis, keepdims=True)
    before = jnp.argmax(real, axis=axis, keepdims=True).astype(x.dtype)
    return jnp.maximum(jnp.where(begin + before == first, begin, first), jnp.zeros((), x.dtype))


def _shifts(names: Names, span: Span) -> bool:
    return span.start == 0 if names.shift is None else names.shift


def _labels(names: Names, x: Any, axis: int, span: Span) -> Any:
    ignored = jnp.asarray(IGNORED, x.dtype)
    if names.drop_first_label and span.start == 0:
        rest = lax.slice_in_dim(x, 1, x.shape[axis], axis=axis)
        return _padded(rest, ignored, axis, dataclasses.replace(span, prefix=span.prefix + 1))
    return _padded(x, ignored, axis, span)


def _padded(x: Any, value: Any, axis: int, span: Span) -> Any:
    low, high = (0, span.virtual) if span.start else (span.virtual, 0)
    return lax.pad(x, value, [(low, high, 0) if k == axis else (0, 0, 0) for k in range(x.ndim)])


def _joined(x: Any, rows: Any, axis: int, span: Span) -> Any:
    shape = [span.virtual if k == axis else n for k, n in enumerate(x.shape)]
    rows = rows if rows.ndim == x.ndim else rows.reshape([span.virtual if k == axis else 1 for k in range(x.ndim)])
    rows = compat.like(jnp.broadcast_to(rows, shape), jax.typeof(x))
    return jnp.concatenate([x, rows] if span.start else [rows, x], axis=axis)
