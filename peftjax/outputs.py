"""What a contraction gives for an operator: the plain terms' output, and the sum of what the products add."""

import functools
import operator
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

from peftjax import compat
from peftjax.factored import Term
from peftjax.weight import Weight

Run = Callable[[Any, Sequence[Any]], list[Any]]
Rule = Callable[[Any, Sequence[Any], Run], list[Any] | None]


def dropped(x: Any, term: Term) -> Any:
    """What a term reads, with its dropout where it has a key."""
    if not term.rate or term.key is None:
        return x
    key = term.key.array[(0,) * term.key.array.ndim]
    keep = jax.random.bernoulli(key, 1 - term.rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - term.rate, x.dtype), jnp.zeros((), x.dtype))


def summed(eqn: Any, y: Any, deltas: Sequence[Any]) -> Any:
    """The plain output and what the products add, summed among themselves first: opposite products cancel exactly."""
    kind = eqn.outvars[0].aval
    if not deltas:
        return y
    # A dense array between factors gives the output's type, a product that of what it reads.
    same = len({d.dtype for d in deltas}) == 1
    laid = [d.reshape(kind.shape) if same else d.reshape(kind.shape).astype(kind.dtype) for d in deltas]
    delta = functools.reduce(operator.add, laid)
    delta = compat.like(delta.astype(kind.dtype), kind)
    return delta if y is None else y + delta


def split_terms(w: Weight, primitive: str, plain: Callable[[Any], Any], product: Callable[[Term], Any]) -> Any:
    """The sum of the plain dense terms' outputs (run as the equation stands), and the other terms' outputs."""
    terms = w.only_for(primitive).terms
    base = None
    for term in terms:
        if term.dense is not None and not term.factors:
            y = plain(term.dense)
            base = y if base is None else base + y
    return base, [product(t) for t in terms if t.dense is None or t.factors]
