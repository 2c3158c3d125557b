"""Applying an operator by summing it first, where that is the smaller sum; its gradients never form that of the sum."""

from typing import Any, Callable

import jax
import jax.numpy as jnp

from peftjax import compat
from peftjax.weight import Weight, dense


def can_fold(w: Weight, x: Any) -> bool:
    """Whether summing the operator loses nothing against summing outputs: float32, no dropout, no explicit axes.

    Nor a dense array between factors: its own output, which gradients for the factors need, would be a product more.
    Nor where no term is dense: there is no product to spare. Nor on a mesh: where it splits the base, the sum would be
    gathered going forward, and the base once more going back, which reads it alone.
    """
    wide = jnp.finfo(w.type.dtype).bits >= 32 and w.type.dtype == x.dtype
    arrays = [x, *(t.dense for t in w.terms if t.dense is not None)]
    return (
        wide
        and w.plain is None
        and not w.drops
        and any(t.dense is not None for t in w.terms)
        and not any(t.dense is not None and t.factors for t in w.terms)
        and compat.explicit_spec(x) is None
        and not any(map(compat.is_spread, arrays))
    )


def folded(x: Any, w: Weight, plain: Callable[[Any, Any], Any], outputs: Callable[[Any, Weight], Any]) -> Any:
    """`x (W + dW)`: worth it where x has more rows than W reads, so that W is smaller than the outputs to sum.

    `plain(x, array)` is the equation on an array, `outputs(x, w)` the sum of the terms' outputs. Derivatives are those
    of `outputs`: they keep no sum of weights, and for the factors they never form the gradient of W.
    """
    leaves, tree = jax.tree.flatten(w)

    @jax.custom_jvp
    def apply(x: Any, *leaves: Any) -> Any:
        return plain(x, dense(jax.tree.unflatten(tree, leaves)))

    def apply_jvp(primals: Any, tangents: Any) -> Any:
        moving = [k for k, t in enumerate(tangents) if not compat.is_symbolic_zero(t)]

        def along(*moved: Any) -> Any:
            x, *leaves = (moved[moving.index(k)] if k in moving else p for k, p in enumerate(primals))
            return outputs(x, jax.tree.unflatten(tree, leaves))

        _, tangent = jax.jvp(along, tuple(primals[k] for k in moving), tuple(tangents[k] for k in moving))
        return apply(*primals), tangent

    apply.defjvp(apply_jvp, symbolic_zeros=True)
    return apply(x, *leaves)
