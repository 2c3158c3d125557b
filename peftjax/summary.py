"""What a tuned tree holds: numbers and a table."""

import math
from typing import Any, NamedTuple

from peftjax.overlay import Overlay, layers, short, type_of
from peftjax.paths import flatten
from peftjax.tree import Entry, entries


class Count(NamedTuple):
    """How many numbers train, how many are frozen, and how many there are."""

    trainable: int
    frozen: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / max(1, self.total)
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.3%})"


def count(tuned: Any) -> Count:
    """Counts the parameters of a tuned tree.

    Args:
      tuned: a tree with overlays; shapes are enough.

    Returns:
      A `Count`. Scales and dropout keys are no parameters; a base under a trained copy of it is frozen.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> print(pj.count(tuned))
      2 of 8 parameters train (25.000%)
    """
    sizes = [(e.trains, math.prod(e.value.shape)) for e in entries(tuned) if _counts(e)]
    trainable, total = sum(n for trains, n in sizes if trains), sum(n for _, n in sizes)
    return Count(trainable, total - trainable, total)


def _counts(entry: Entry) -> bool:
    return hasattr(entry.value, "shape") and not entry.is_key and entry.field.rpartition("/")[2] != "scale"


class Description(str):
    """A table as text, which shows itself where it is the value of a line."""

    def __repr__(self) -> str:
        return str(self)


def describe(tuned: Any) -> Description:
    """Shows a tuned tree as a table: every leaf, its type, the overlays on it and what they train.

    Args:
      tuned: a tree with overlays; shapes are enough.

    Returns:
      The table, a line a leaf, with the totals below.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.describe(tuned)
      path  type          overlay  trains
      b     float32[2]    Full          2
      w     float32[2,2]  -             -
      2 of 8 parameters train (25.000%)
    """
    trained: dict[str, int] = {}
    for e in entries(tuned):
        trained[e.path] = trained.get(e.path, 0) + (math.prod(e.value.shape) if e.trains else 0)
    rows = [("path", "type", "overlay", "trains")]
    for path, leaf in flatten(tuned):
        numbers = f"{trained[path]:,}" if isinstance(leaf, Overlay) else "-"
        rows.append((path or ".", _type(leaf), " over ".join(map(_title, layers(leaf))) or "-", numbers))
    wide = [max(len(row[k]) for row in rows) for k in range(4)]
    line = lambda row: f"{row[0]:{wide[0]}}  {row[1]:{wide[1]}}  {row[2]:{wide[2]}}  {row[3]:>{wide[3]}}".rstrip()
    return Description("\n".join([*map(line, rows), str(count(tuned))]))


def _type(leaf: Any) -> str:
    return short(type_of(leaf)) if isinstance(leaf, Overlay) else short(leaf)


def _title(x: Overlay) -> str:
    notes = ", ".join(filter(None, (x.summary(), "locked" if x.locked else "")))
    return f"{type(x).__name__}({notes})" if notes else type(x).__name__
