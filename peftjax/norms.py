"""Norms of a weight's output features, and how low-rank products change them, without forming the sum."""

from typing import Any, Sequence

import jax.numpy as jnp
from jax import lax

from peftjax.factored import Factor, Labels, chain, wide_dtype

Product = tuple[Factor, ...]


def norm(w: Factor, kept: Labels) -> Any:
    """The Euclidean norm over every axis but these; in float32 or wider."""
    gone = tuple(k for k, a in enumerate(w.atoms) if a not in kept)
    return jnp.sqrt(jnp.sum(jnp.square(w.array.astype(wide_dtype(w.array.dtype))), gone))


def changed_norm(before: Any, w: Factor, products: Sequence[Product], kept: Labels) -> Any:
    """The norm of w plus products whose inner axis is "rank", where that of w is `before`.

    `|W + P|^2 = |W|^2 + 2 <W, P> + |P|^2`: `<W, A B>` goes through `A^T W`, `|A B|^2` through `A^T A`. What the products
    add is added to the norm, not to its square: where they add nothing, the norm keeps every bit.
    """
    wide = Factor(w.array.astype(wide_dtype(w.array.dtype)), w.atoms)
    others = [
        tuple(f.having(f.array, tuple("other" if a == "rank" else a for a in f.atoms)) for f in p) for p in products
    ]
    along = lambda first, *rest: chain(first, rest, kept, {}, lax.Precision.HIGHEST)
    cross = sum(2 * along(wide, *p) for p in products)
    own = sum(sum(along(*p, *q) for q in others) for p in products)
    change = cross + own
    total = before + jnp.sqrt(jnp.maximum(jnp.square(before) + change, 0))
    return before + change / jnp.where(total > 0, total, 1)
