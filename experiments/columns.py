"""Columns of rows that stay where they are: each entry is read, or turned to token ids, when it is asked for."""

from collections.abc import Sequence
from typing import Any, Callable

import numpy as np

AT_ONCE = 1024


class Texts(Sequence[str]):
    """The texts of a source of rows with random access, such as tensorflow-datasets' data sources.

    Args:
      source: its rows are mappings.
      column: of the texts, which are UTF-8.
    """

    def __init__(self, source: Any, column: str):
        self._source, self._column = source, column

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, k: Any) -> Any:
        return self._source[range(len(self))[k]][self._column].decode()


class Picked(Sequence[Any]):
    """Some entries of a sequence, in an order of their own.

    Args:
      of: the sequence.
      at: which, (N,).
    """

    def __init__(self, of: Sequence[Any], at: np.ndarray):
        self._of, self._at = of, at

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, k: Any) -> Any:
        return self._of[self._at[k]]


class Ids(Sequence[list[int]]):
    """The token ids of texts; kept are only their `lengths`, (N,).

    Args:
      texts: the texts.
      encode: `encode(texts)`, the ids of each of a list of texts.
    """

    def __init__(self, texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]]):
        self._texts, self._encode = texts, encode
        parts = (range(k, min(k + AT_ONCE, len(texts))) for k in range(0, len(texts), AT_ONCE))
        self.lengths = np.array([len(ids) for part in parts for ids in encode([texts[k] for k in part])], np.int32)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, k: Any) -> Any:
        return self._encode([self._texts[k]])[0]
