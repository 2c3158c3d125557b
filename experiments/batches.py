"""Token ids in batches of a few lengths, as numpy arrays."""

from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

Batch = dict[str, np.ndarray]


class Tokens:
    """Turns texts to ids.

    Args:
      folder: a checkpoint's, with its `tokenizer.json`.
      length: the most tokens of a text; what is longer is cut.
    """

    def __init__(self, folder: Path, length: int):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))
        # A file may hold the settings of whoever saved it; here, batches are padded when their length is known.
        self._tokenizer.enable_truncation(length)
        self._tokenizer.no_padding()
        self.length = length

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, with the marks that the model expects around it."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]


def lengths(longest: int, fixed: bool) -> tuple[int, ...]:
    """The lengths of batches: the longest alone, or some eighths of it, each compiled once."""
    return (longest,) if fixed else tuple(sorted({-(-longest * k // 8) for k in (2, 3, 4, 5, 6, 8)}))


def batches(
    ids: Sequence[Sequence[int]],
    labels: np.ndarray,
    size: int,
    widths: Sequence[int],
    rng: np.random.Generator | None = None,
) -> Iterator[Batch]:
    """Every example once, in batches of one shape per width.

    Args:
      ids: per example; none is longer than the last width.
      labels: (N,).
      size: examples per batch. What is left of a width fills up with examples of weight 0.
      widths: the lengths of batches; an example goes to the first that holds it.
      rng: shuffles examples and batches; None keeps the order of each width.

    Yields:
      `ids`, `mask` (size, width) int32, `label` (size,) int32, `weight` (size,) float32, `index` (size,), which example.
    """
    order = np.arange(len(ids)) if rng is None else rng.permutation(len(ids))
    width = np.array([next(w for w in widths if len(x) <= w) for x in ids])
    groups = []
    for w in widths:
        mine = order[width[order] == w]
        groups += [(w, mine[k : k + size]) for k in range(0, len(mine), size)]
    for k in np.arange(len(groups)) if rng is None else rng.permutation(len(groups)):
        yield _batch(ids, labels, size, *groups[k])


def _batch(ids: Sequence[Sequence[int]], labels: np.ndarray, size: int, width: int, chosen: np.ndarray) -> Batch:
    index = np.resize(chosen, size)  # repeats them where they are too few
    padded = np.zeros((size, width), np.int32)
    mask = np.zeros((size, width), np.int32)
    for row, k in enumerate(index):
        padded[row, : len(ids[k])] = ids[k]
        mask[row, : len(ids[k])] = 1
    weight = (np.arange(size) < len(chosen)).astype(np.float32)
    return {"ids": padded, "mask": mask, "label": labels[index].astype(np.int32), "weight": weight, "index": index}
