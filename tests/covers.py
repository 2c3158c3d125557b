"""Which cases of a table run by default: the others are marked `full`."""

import itertools
from typing import Any, Iterator, Sequence

import pytest


def covered(*lists: Sequence[Any]) -> list[Any]:
    """Every combination; those run by default that hold each entry of each list once, as far as the lists are as long."""
    kept = {tuple(k % len(x) for x in lists) for k in range(max(map(len, lists)))}
    return list(_marked(lists, kept))


def _marked(lists: Sequence[Sequence[Any]], kept: set[tuple[int, ...]]) -> Iterator[Any]:
    for at in itertools.product(*(range(len(x)) for x in lists)):
        values = [x[k] for x, k in zip(lists, at)]
        yield pytest.param(*values, marks=() if at in kept else pytest.mark.full)


def some(cases: Sequence[Any], every: int) -> list[Any]:
    """The first of every so many runs by default; a case is one value, or a tuple of several."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*x, marks=pytest.mark.full if k % every else ()) for k, x in enumerate(values)]
