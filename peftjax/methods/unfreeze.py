"""Training leaves themselves: `unfreeze`."""

from peftjax.copies import copied
from peftjax.method import Method, method, per_leaf
from peftjax.targets import Targets


@method
def unfreeze(targets: Targets, *, exclude: Targets = ()) -> Method:
    """Trains chosen leaves themselves, whatever they are: `W' = W + dW`, all of it.

    Args:
      targets: which leaves. A head by its module's name, biases by ".*bias", everything by ".*".
      exclude: leaves to leave out; wins over `targets`.

    Returns:
      The method. The trained copy is float32, also on a bfloat16 base; the original stays as it is. A leaf that trains
      itself already, as a bias of the head does in `chain(bitfit(), head())`, goes on doing so. On locked overlays the
      copy starts as the array that they stand for; overlays of outputs and of further rows go on acting.

    Raises:
      ValueError: a pattern that matches nothing, a leaf of integers, a leaf whose weight another overlay trains, or that
        no array can stand for.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {"head": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
      >>> pj.unfreeze(".*bias").init(jax.random.key(0), params)["head"]["bias"]
      Full(float32[2])
    """
    return per_leaf(copied, targets, exclude)
