"""Which cases of a table run by default: the others are marked `full`, or `ci` where they run before a change lands."""

import itertools
from typing import Any, Collection, Sequence

import pytest


def covered(*lists: Sequence[Any], at: Collection[int] | None = None) -> list[Any]:
    """Every combination; those run by default that hold each entry of each list once, as far as the lists are as long.

    Of these, only those of the numbers `at`, if given; the others of these are marked `ci`.
    """
    whole = range(max(map(len, lists)))
    assert set(at or ()) <= set(whole), f"at={at}, of {len(whole)} cases"
    kept = {tuple(k % len(x) for x in lists): () if at is None or k in at else pytest.mark.ci for k in whole}
    every = itertools.product(*(range(len(x)) for x in lists))
    return [pytest.param(*(x[k] for x, k in zip(lists, case)), marks=kept.get(case, pytest.mark.full)) for case in every]


def some(cases: Sequence[Any], every: int, others: Any = pytest.mark.full) -> list[Any]:
    """The first of every so many runs by default, `others` marks the rest; a case is one value, or a tuple of several."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*x, marks=others if k % every else ()) for k, x in enumerate(values)]
