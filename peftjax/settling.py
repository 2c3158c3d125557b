"""Virtual tokens set aside, and networks that make them folded into what they make."""

from typing import Any

from peftjax.tree import map_layers, resolve


def settle(tuned: Any) -> Any:
    """Sets prompts and prefixes aside: for the steps of cached decoding, after a first call has filled the cache.

    Args:
      tuned: a tree with overlays.

    Returns:
      The tree without overlays of virtual tokens; the others stay. Positions then go on after the virtual tokens.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.prompt(2, targets="words").init(jax.random.key(0), {"words": jnp.ones((5, 2))})
      >>> pj.settle(tuned)["words"].shape
      (5, 2)
    """
    return map_layers(lambda _, x: x.base if x.virtual else x, tuned)


def fold(tuned: Any) -> Any:
    """Puts the values of small networks that make trained fields in their places: P-tuning's, and a deep prefix's.

    Args:
      tuned: a tree with overlays, trained.

    Returns:
      The tree that `prompt`, and `prefix` without `hidden`, would have made, and with which `save` takes it; overlays
      without a network stay.

    Raises:
      ValueError: no overlay has one.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.p_tuning(2, 4, targets="words").init(jax.random.key(0), {"words": jnp.ones((5, 2))})
      >>> pj.extract(pj.fold(tuned))["words/prompt"].shape
      (2, 2)
    """
    folded: list[str] = []

    def change(path: str, x: Any) -> Any:
        if not hasattr(type(x), "folded"):
            return x
        folded.append(path)
        return x.folded()

    made = map_layers(change, resolve(tuned))
    if not folded:
        raise ValueError(
            "fold: no overlay has a network that makes its rows; expected one of p_tuning, or prefix(hidden=)"
        )
    return made
