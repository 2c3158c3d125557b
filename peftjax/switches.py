"""Switches of overlays: their scale, their randomness, and whether they train."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.overlay import Overlay, is_key, layers
from peftjax.paths import flatten
from peftjax.targets import Targets, choose
from peftjax.tree import map_layers, map_leaves
from peftjax.weight import materialise


def scale(tuned: Any, factor: Any) -> Any:
    """Multiplies the effect of every overlay: 1 leaves it, 0 is the base model, between them it interpolates.

    Args:
      tuned: a tree with overlays.
      factor: a number, or an array of shape (), which may be traced.

    Returns:
      A tree of the same structure and types, so nothing is traced again.

    Raises:
      ValueError: the factor has axes, or is a Python number that is not finite; of an array, the value is not looked at.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.scale(tuned, 0.5)["b"].scale
      Array(0.5, dtype=float32)
    """
    if jnp.ndim(factor) or (isinstance(factor, (int, float)) and not math.isfinite(factor)):
        raise ValueError(f"expected a finite number or an array of shape (), found {factor!r}")
    by = lambda s: s * (factor if isinstance(factor, (int, float)) else jnp.asarray(factor, s.dtype))
    return map_layers(lambda _, x: x.replace(scale=jax.tree.map(by, x.scale)), tuned)


def disable(tuned: Any) -> Any:
    """Switches every overlay off: the base model, of the same structure and types, so nothing is traced again.

    Args:
      tuned: a tree with overlays.

    Returns:
      The tree with every scale 0. What trains keeps its values.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.disable(tuned)["b"].scale
      Array(0., dtype=float32)
    """
    return map_layers(lambda _, x: x.replace(scale=jax.tree.map(jnp.zeros_like, x.scale)), tuned)


def lock(tuned: Any, targets: Targets = ".*") -> Any:
    """Keeps overlays from training, as under a new one: every overlay on these leaves is frozen from here on.

    Args:
      tuned: a tree with overlays.
      targets: which leaves: a regex fullmatched on the leaf's or its module's path, or a sequence of suffixes; all
          overlays by default.

    Returns:
      The tree with the same arrays; `partition`, `mask` and what is built on them count them as frozen.

    Raises:
      ValueError: a pattern matches no leaf with an overlay.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.extract(pj.lock(tuned, "b"))
      {}
    """
    paths = set(choose(targets, {path: x for path, x in flatten(tuned) if isinstance(x, Overlay)}))
    return map_leaves(lambda path, x: _locked(x) if path in paths else x, tuned)


def _locked(x: Any) -> Any:
    if not isinstance(x, Overlay):
        return x
    return x.replace(base=_locked(x.base), locked=tuple(n for n, kind in x.kinds.items() if kind == "trained"))


def with_key(tuned: Any, key: Any) -> Any:
    """Gives every overlay with dropout its own random key; without one, an overlay is deterministic.

    The key of a leaf is `fold_in(key, hash of its path)`, split where layers are stacked. Call it inside the loss: keys
    are no parameters, and a tree that holds them cannot be differentiated whole. In `peftjax.make_train_step`, a state
    with a key calls it; elsewhere nobody does, and dropout without it is no error.

    Args:
      tuned: a tree with overlays.
      key: a random key, of `jax.random.key` or the older `PRNGKey`, a new one for every step; None takes the keys out.

    Returns:
      The tree with keys. Overlays whose dropout is 0 stay as they are. The input of a weight drops out where the weight
      contracts or convolves it; a lookup has none to drop. Where an overlay has no rule and would have to be merged, the
      wrapped function raises ValueError. `peftjax.merge` sets keys aside.

    Raises:
      TypeError: the key is no array, such as a seed.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> method = pj.lora(rank=1, dropout=0.1, targets="w")
      >>> tuned = method.init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.with_key(tuned, jax.random.key(1))["w"].key.shape, pj.with_key(tuned, None)["w"].key
      ((), None)
      >>> apply = pj.wrap(lambda params, x: x @ params["w"])
      >>> loss = lambda tuned, x, key: apply(pj.with_key(tuned, key), x).sum()
      >>> value, grads = pj.value_and_grad(loss)(tuned, jnp.ones((3, 2)), jax.random.key(1))
    """
    if key is not None and not hasattr(key, "dtype"):
        raise TypeError(f"with_key: expected a random key, such as jax.random.key(0), or None; found {key!r}")
    if key is not None and not is_key(key):
        key = jax.random.wrap_key_data(key)

    def keyed(path: str, x: Overlay) -> Any:
        if "key" not in x.kinds or (key is not None and not _drops(x)):
            return x
        return x.replace(key=None if key is None else _split(fold(key, path), jnp.shape(x.scale)))

    return map_layers(keyed, tuned)


def dropping(tuned: Any) -> list[str]:
    """The paths of the leaves with an overlay that has dropout."""
    return [path for path, leaf in flatten(tuned) if any(map(_drops, layers(leaf)))]


def _drops(x: Overlay) -> bool:
    return "key" in x.kinds and bool(getattr(x, "dropout", 0))


def still(leaf: Any) -> Any:
    """The array that a leaf stands for, without dropout."""
    return materialise(with_key({"w": leaf}, None)["w"])


def fold(key: Any, path: str) -> Any:
    """The key of a path: the same in every process and version."""
    return jax.random.fold_in(key, int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little"))


def _split(key: Any, shape: tuple[int, ...]) -> Any:
    return jax.random.split(key, shape) if shape else key
