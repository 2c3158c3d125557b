"""Gradients of what trains, and of nothing else."""

from typing import Any, Callable

import jax

from peftjax.tree import combine, partition


def value_and_grad(loss: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    """Makes a function of a tuned tree that returns the loss and its gradient by what trains.

    Frozen arrays are no argument of the differentiation, so no work and no memory goes into gradients for them.

    Args:
      loss: a scalar function `loss(tuned, *args, **kwargs)`.
      has_aux: whether it returns `(loss, aux)`, as for `jax.value_and_grad`.

    Returns:
      A function of the same arguments that returns `(value, gradients)`; the gradients have the shape of
      `partition(tuned)[0]`: None where an array is frozen.

    Raises:
      ValueError: nothing in the tree trains.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> apply = pj.wrap(lambda params, x: x @ params["w"] + params["b"])
      >>> value, grads = pj.value_and_grad(lambda tuned, x: apply(tuned, x).sum())(tuned, jnp.ones((3, 2)))
      >>> print(value, grads["b"].value, grads["w"])
      18.0 [3. 3.] None
    """

    def run(tuned: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        trainable, frozen = partition(tuned)
        if not jax.tree.leaves(trainable):
            raise ValueError("nothing in this tree trains: it holds no overlay, or all of them are locked")
        of_trainable = lambda part: loss(combine(part, frozen), *args, **kwargs)
        return jax.value_and_grad(of_trainable, has_aux=has_aux)(trainable)

    return run
