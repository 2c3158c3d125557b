"""A pretrained tree in a fresh model: a new head on an old body."""

from typing import Any, Sequence

import jax

from peftjax.flat import near, unique
from peftjax.overlay import type_of
from peftjax.paths import flatten
from peftjax.patterns import matches
from peftjax.tree import map_leaves


def graft(pretrained: Any, fresh: Any, replace: str | Sequence[str] = ()) -> Any:
    """Lays a pretrained tree into a fresh model's.

    Args:
      pretrained: arrays, found by path: boxes, `FrozenDict`s and NNX states on either side make no difference.
      fresh: the new model's parameters; where they are not kept, shapes are enough.
      replace: which leaves the new model replaces: a regex fullmatched on a leaf's or its module's path, or a sequence
          of suffixes. Fresh leaves of that name stay fresh, pretrained ones are left out.

    Returns:
      The fresh tree holding the pretrained arrays themselves, in their own dtype.

    Raises:
      ValueError: lists every leaf that is missing, left over, of another shape, or to stay fresh but without a value,
          and every pattern that names nothing.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> old, new = {"body": jnp.ones(2), "head": jnp.ones(9)}, {"body": jnp.zeros(2), "head": jnp.zeros(3)}
      >>> pj.graft(old, new, replace="head")
      {'body': Array([1., 1.], dtype=float32), 'head': Array([0., 0., 0.], dtype=float32)}
    """
    old, new = unique(flatten(pretrained)), unique(flatten(fresh))
    patterns, suffix = ((replace,), False) if isinstance(replace, str) else (tuple(replace), True)
    replaced = lambda path: any(matches(p, path, suffix) for p in patterns)
    faults = [
        f"{p!r} matches no path (nearest: {near(p, [*new, *old])})"
        for p in patterns
        if not any(matches(p, path, suffix) for path in (*new, *old))
    ]
    for path, leaf in new.items():
        if replaced(path):
            faults += [f"{path} stays fresh, but is a shape without a value"] * isinstance(leaf, jax.ShapeDtypeStruct)
        elif path not in old:
            faults.append(f"{path} is not in the pretrained tree (nearest: {near(path, old)})")
        elif type_of(old[path]).shape != type_of(leaf).shape:
            faults.append(
                f"{path} is {type_of(old[path]).shape} in the pretrained tree, {type_of(leaf).shape} in the fresh one"
            )
    faults += [f"{path} is in the pretrained tree alone" for path in old if path not in new and not replaced(path)]
    if faults:
        raise ValueError("the trees differ; name in `replace` what the new model replaces:\n  " + "\n  ".join(faults))
    return map_leaves(lambda path, leaf: leaf if replaced(path) else old[path], fresh)
