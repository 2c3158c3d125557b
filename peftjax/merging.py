"""Folding overlays into the weights: a plain tree again, and what rounding took on the way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peftjax import compat
from peftjax.flat import not_finite
from peftjax.overlay import Overlay, layers
from peftjax.paths import flatten
from peftjax.switches import with_key
from peftjax.tree import check_whole, entries, map_leaves, resolve
from peftjax.weight import materialise


class Rounding(NamedTuple):
    """What the cast to the base's dtype took from a merged weight."""

    error: Any  # |merged - exact| / |exact|, Euclidean, where exact is the sum in float32
    unchanged: Any  # the share of the changed entries that rounding put back on the base's value

    def __str__(self) -> str:
        return f"rounding {self.error:.1e}, {self.unchanged:.1%} of the changes lost"


def merge(tuned: Any, report: bool = False) -> Any:
    """Folds every overlay into the array it stands on: `fn(merge(tuned))` is `wrap(fn)(tuned)`.

    Sums are taken in float32 and cast once to the base's dtype. A merged array lies where its base lay. Dropout keys
    are set aside.

    Args:
      tuned: a tree with overlays.
      report: whether to say what rounding took; a bf16 base loses much of a small change.

    Returns:
      A plain tree; with `report`, `(tree, {path: Rounding})`. Leaves without an overlay are the same arrays.

    Raises:
      ValueError: the tree is one part of `partition`, no weight can say what an overlay does, or an overlay, or its
        base, holds a NaN or an infinity; a sum is beyond what the base's dtype holds. Other leaves are not looked at.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.merge(pj.insert(tuned, {"b/value": jnp.full(2, 3.0)}))["b"]
      Array([3., 3.], dtype=float32)
    """
    check_whole(tuned)
    _check(tuned)
    plain = resolve(with_key(tuned, None))
    merged = map_leaves(_merged, plain)
    after, folded = dict(flatten(merged)), {path: x for path, x in flatten(plain) if isinstance(x, Overlay)}
    if beyond := not_finite((path, after[path]) for path in folded):
        raise ValueError(f"not merged, for the sums are beyond what their dtype holds: {', '.join(beyond)}")
    return (merged, {path: _rounding(x, after[path]) for path, x in folded.items()}) if report else merged


def _check(tuned: Any) -> None:
    kept = [f"{p} ({type(x).__name__})" for p, leaf in flatten(tuned) for x in layers(leaf) if not x.merges]
    if kept:
        raise ValueError(
            f"no weight can say what these overlays do: {', '.join(kept)}. They act on outputs, add rows, or act in "
            "some uses only. Call `wrap(fn)(tuned, ...)` instead of merging; `disable(tuned)` switches them off, and "
            "`strip(tuned)` is the base model. Of virtual tokens, `settle(tuned)` keeps the other overlays, and "
            "`extract(tuned)` what trained"
        )
    broken = not_finite((e.key, e.value) for e in entries(tuned) if e.field and not e.is_key)
    if broken:
        raise ValueError(f"not merged, for these hold a NaN or an infinity: {', '.join(broken)}. Did training diverge?")


def _merged(path: str, x: Any) -> Any:
    if not isinstance(x, Overlay):
        return x
    try:
        array = materialise(x)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    sharding = getattr(x.bottom, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding) and not compat.is_traced(array):
        return jax.device_put(array, sharding)
    return array


def _rounding(x: Overlay, merged: Any) -> Rounding:
    base = x.bottom.astype(jnp.float32)
    exact = materialise(_standing_on(x, base))
    got = merged.astype(jnp.float32)
    changed = exact != base
    lost = jnp.sum(changed & (got == base)) / jnp.maximum(1, jnp.sum(changed))
    norm = jnp.linalg.norm(exact.ravel())
    return Rounding(jnp.linalg.norm((got - exact).ravel()) / jnp.where(norm > 0, norm, 1), lost)


def _standing_on(x: Any, bottom: Any) -> Any:
    return x.replace(base=_standing_on(x.base, bottom)) if isinstance(x, Overlay) else bottom
