"""The rows of a data set that is made here, dealt out to its splits."""

from typing import Mapping

import numpy as np

SEED = 0  # the splits stay the same whatever the seed of a run


def dealt(count: int, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The numbers of the rows of each split, of `count` rows in one random order."""
    order, ends = np.random.default_rng(SEED).permutation(count), np.cumsum([0, *sizes.values()])
    return {name: order[ends[k] : ends[k + 1]] for k, name in enumerate(sizes)}
