"""Token ids in batches of a few lengths, as numpy arrays."""

import dataclasses
from typing import Any, Mapping, Sequence

import grain
import numpy as np

from experiments.columns import Ids

Batch = dict[str, np.ndarray]
IGNORED = -100  # the label of a token that does not count


@dataclasses.dataclass(frozen=True)
class PerToken:
    """A column with a value for each token of each example.

    Attributes:
      rows: as long as the ids.
      fill: the value behind them.
    """

    rows: Sequence[Sequence[int]]
    fill: int = IGNORED


def lengths(longest: int, fixed: bool) -> tuple[int, ...]:
    """The lengths of batches: the longest alone, or some eighths of it, each compiled once."""
    return (longest,) if fixed else tuple(sorted({-(-longest * k // 8) for k in (2, 3, 4, 5, 6, 8)}))


def batches(
    ids: Sequence[Sequence[int]],
    columns: Mapping[str, np.ndarray | PerToken],
    size: int,
    widths: Sequence[int],
    seed: Sequence[int] | None = None,
    share: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """Every example once, in batches of one shape per width.

    The batches are planned from the lengths of all examples, so every process takes the same step with the same width.

    Args:
      ids: per example; none is longer than the last width. Where they are `Ids`, a batch reads and encodes its texts
        when it is made, which iterators do ahead of time, in threads.
      columns: what else a batch holds of its examples, such as "label": (N, ...), or a value per token.
      size: examples per batch, over all processes. What is left of a width fills up with examples of weight 0.
      widths: the lengths of batches; an example goes to the first that holds it.
      seed: shuffles examples and batches; None keeps the order of each width.
      share: (k, n) gives the k-th of n equal parts of each batch.

    Returns:
      A data set whose k-th element is the k-th batch: `ids`, `mask` (size, width) int32, `weight` (size,) float32,
      `index` (size,), which example, and the columns, (size, ...) or (size, width). Iterators of it prefetch, and know
      where they stand.

    Raises:
      ValueError: a size that the parts do not divide.
    """
    if size % share[1]:
        raise ValueError(f"a batch of {size} examples: expected a multiple of {share[1]}, the number of processes")
    plan = _plan(lengths_of(ids), size, widths, None if seed is None else np.random.default_rng(seed))
    part = _part(size, share)
    return grain.MapDataset.source(plan).map(lambda chosen: _batch(ids, columns, size, chosen[0], chosen[1], part))


def one_of_each(
    ids: Sequence[Sequence[int]],
    columns: Mapping[str, np.ndarray | PerToken],
    size: int,
    widths: Sequence[int],
    share: tuple[int, int] = (0, 1),
) -> list[Batch]:
    """A batch of each width that `batches` of these arguments has: of one example, over and over."""
    found, first = first_of_each(ids, widths)
    part = _part(size, share)
    return [_batch(ids, columns, size, widths[w], np.array([k]), part) for w, k in zip(found, first)]


def first_of_each(ids: Sequence[Sequence[int]], widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which widths some examples need, and the first of each."""
    return np.unique(np.searchsorted(widths, lengths_of(ids)), return_index=True)


def _part(size: int, share: tuple[int, int]) -> slice:
    """Which examples of a batch are the k-th of n equal parts."""
    k, n = share
    return slice(size * k // n, size * (k + 1) // n)


def _plan(
    length: np.ndarray, size: int, widths: Sequence[int], rng: np.random.Generator | None
) -> list[tuple[int, np.ndarray]]:
    """The width of each batch, and its examples."""
    order = np.arange(len(length)) if rng is None else rng.permutation(len(length))
    width = np.asarray(widths)[np.searchsorted(widths, length)]
    groups = []
    for w in widths:
        mine = order[width[order] == w]
        groups += [(w, mine[k : k + size]) for k in range(0, len(mine), size)]
    return groups if rng is None else [groups[k] for k in rng.permutation(len(groups))]


def _batch(
    ids: Sequence[Sequence[int]],
    columns: Mapping[str, np.ndarray | PerToken],
    size: int,
    width: int,
    chosen: np.ndarray,
    part: slice,
) -> Batch:
    index, weight = (x[part] for x in filled(chosen, size))
    own = [ids[k] for k in index]
    mask = padded([np.ones(len(x), np.int32) for x in own], width, 0)
    others = {name: taken(x, index, width) for name, x in columns.items()}
    return {"ids": padded(own, width, 0), "mask": mask, "weight": weight, "index": index, **others}


def lengths_of(ids: Sequence[Sequence[int]]) -> np.ndarray:
    """How many tokens each example has, (N,)."""
    return ids.lengths if isinstance(ids, Ids) else np.array([len(x) for x in ids])


def taken(column: np.ndarray | PerToken, index: np.ndarray, width: int) -> np.ndarray:
    """The entries of a column that belong to some examples, (len(index), ...) or (len(index), width)."""
    if isinstance(column, PerToken):
        return padded([column.rows[k] for k in index], width, column.fill)
    return column[index]


def padded(rows: Sequence[Any], width: int, fill: int) -> np.ndarray:
    """The rows, (len(rows), width) int32, each filled up at its end."""
    made = np.full((len(rows), width), fill, np.int32)
    for own, row in zip(made, rows):
        own[: len(row)] = row
    return made


def filled(chosen: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """So many examples, (size,) int, of those chosen, which are repeated where they are too few; and weights, 0 of repeats."""
    return np.resize(chosen, size), (np.arange(size) < len(chosen)).astype(np.float32)
