"""Tuned trees for tests: with what trains away from where it starts, where most of it is zero."""

import numpy as np

import peftjax as pj


def away(tuned, by=0.3, seed=0):
    """The tree with what trains moved by normal numbers times `by`."""
    rng = np.random.default_rng(seed)
    shift = lambda x: np.asarray(x) + np.float32(by) * rng.standard_normal(x.shape).astype(np.float32)
    return pj.insert(tuned, {key: shift(x) for key, x in pj.extract(tuned).items()})
