"""Applying an operator by summing it first, where that is the smaller sum; its gradients never form that of the sum."""

from typing import Any, Callable

import jax
import jax.numpy as jnp

from peftjax import compat
from peftjax.factored import Weight, dense


def can_fold(w: Weight, x: Any) -> bool:
    """Whether summing the operator loses nothing against summing outputs: float32, no dropout, no explicit axes."""
    wide = jnp.finfo(w.type.dtype).bits >= 32 and w.type.dtype == x.dtype
    return wide and w.plain is None and not any(t.rate and t.key is not None for t in w.terms) and compat.explicit_spec(x) is None


def folded(x: Any, w: Weight, plain: Callable[[Any, Any], Any], outputs: Callable[[Any, Weight], Any]) -> Any:
    """`x (W + dW)`: worth it where x has more rows than W reads, so that W is smaller than the outputs to sum.

    `plain(x, array)` is the equation on an array, `outputs(x, w)` the sum of the terms' outputs. The gradient of x is
    taken through the sum, those of the factors through their own products (`x A B`): that of W is never formed. Kept
    for the backward pass is x alone; the sum is made again.
    """
    leaves, tree = jax.tree.flatten(w)
    whole = lambda leaves: dense(jax.tree.unflatten(tree, leaves))

    @jax.custom_vjp
    def apply(x: Any, leaves: list[Any]) -> Any:
        return plain(x, whole(leaves))

    def forward(x: Any, leaves: list[Any]) -> Any:
        values, moving = [v.value for v in leaves], [v.value if v.perturbed else None for v in leaves]
        read = x.value if any(v.perturbed for v in leaves) or x.perturbed else None
        return apply(x.value, values), (read, values, moving, () if x.perturbed else None)

    def backward(saved: Any, g: Any) -> Any:
        x, values, moving, reads = saved
        g = compat.instantiate(g)
        dx = None if reads is None else jax.vjp(lambda x: plain(x, whole(values)), x)[1](g)[0]

        def through(moving: list[Any]) -> Any:
            return outputs(x, jax.tree.unflatten(tree, [v if m is None else m for v, m in zip(values, moving)]))

        return dx, jax.vjp(through, moving)[1](g)[0]

    apply.defvjp(forward, backward, symbolic_zeros=True)
    return apply(x, leaves)
