"""The splits of a data set, and how the rows of one that is made here are dealt out to them."""

from typing import Mapping

import numpy as np

SPLITS = ("train", "validation", "test")
SEED = 0  # of the splits made here; the seed of a run never moves a row from one split to another


def dealt(count: int, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The numbers of the rows of each split, of `count` rows in one random order."""
    order, ends = np.random.default_rng(SEED).permutation(count), np.cumsum([0, *sizes.values()])
    return {name: order[ends[k] : ends[k + 1]] for k, name in enumerate(sizes)}
