"""Labelled texts: the movie reviews, any tensorflow-datasets data set, or a file of one's own."""

import dataclasses
from pathlib import Path
from typing import Any, Generic, Iterable, Protocol, Self, Sequence, TypeVar

import numpy as np

from experiments import catalogue, files
from experiments.columns import Picked
from experiments.splits import SEED

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}


class Examples(Protocol):
    """Inputs and their labels."""

    @property
    def labels(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, at: Any) -> Self: ...


E = TypeVar("E", bound=Examples)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts, which may stay on the disk until they are read, and their labels.

    Attributes:
      texts: a sequence of strings; or of words, or pairs of texts, as the task has it.
      labels: (N,): int32 from 0, float32, or an object for each text, as the task has it.
    """

    texts: Any
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, at: Any) -> "Rows":
        return Rows(Picked(self.texts, at), self.labels[at])


class Sealed(Generic[E]):
    """The test split: it opens once, at the end; every choice is made on the validation split."""

    def __init__(self, rows: E):
        self._rows, self.opened = rows, False

    def open(self) -> E:
        """The rows, the first time.

        Raises:
          RuntimeError: it was opened before.
        """
        if self.opened:
            raise RuntimeError(
                "the test split was read before: what it says is no estimate once a choice depends on it"
            )
        self.opened = True
        return self._rows


@dataclasses.dataclass(frozen=True)
class Dataset(Generic[E]):
    """Three splits, and what the labels are called."""

    train: E
    validation: E
    test: Sealed[E]
    names: tuple[str, ...]


def load(name: str, text: str = "text", label: str = "label", classes: Sequence[str] = ()) -> Dataset[Rows]:
    """A data set of texts and labels.

    Args:
      name: "reviews"; the path of a `.csv`, `.tsv` or `.jsonl` file; or what tensorflow-datasets calls one of its own.
      text, label: the columns.
      classes: what the labels of a file are called, in order; by default those that occur, sorted.

    Returns:
      Its splits. Those that it does not have are cut from its training split (of a file, from all of it), always in
      the same way.

    Raises:
      ValueError: no such file, column or data set, an empty text, a label outside the classes, or columns or classes of
        a data set that has its own.
    """
    if files.is_path(name):
        if len(classes) == 1:
            raise ValueError(f"classes {classes[0]!r}: expected at least two, as --config.classes=bad,good")
        texts, labels = files.read(Path(name), text, label)
        names = tuple(classes) or tuple(sorted(set(labels)))
        if len(names) < 2:
            raise ValueError(f"{name}: every label in {label!r} is {names[0]!r}; expected at least two kinds")
        return cut({"train": _checked(name, texts, labels, names)}, names)
    check_columns(name, text=text, label=label)
    splits, names = catalogue.reviews() if name == "reviews" else catalogue.public(name, text, label)
    if classes and tuple(classes) != names:
        raise ValueError(
            f"classes {', '.join(classes)}: the labels of {name!r} are called {', '.join(names)}; expected no others"
        )
    return cut({split: _checked(f"{name}, {split}", *columns, names) for split, columns in splits.items()}, names)


def check_columns(name: str, **columns: str) -> None:
    """Raises where columns of the reviews, by the flags that set them, have other names than these: nothing reads them."""
    if other := [(flag, column) for flag, column in columns.items() if name == "reviews" and column != flag]:
        flag, column = other[0]
        raise ValueError(
            f"--config.{flag}={column}: the reviews have no such column, only {', '.join(columns)}; "
            "name a file with --config.data="
        )


def identity(name: str) -> dict[str, str]:
    """What, beside its name, tells a file from what it held before; nothing of a data set that has a name of its own."""
    return {"digest": files.digest(Path(name))} if files.is_path(name) else {}


def cut(splits: dict[str, E], names: tuple[str, ...]) -> Dataset[E]:
    """Cuts the validation and test splits that are missing from the training split.

    Raises:
      ValueError: too few rows.
    """
    rows = splits["train"]
    order = np.random.default_rng(SEED).permutation(len(rows))
    for split in ("validation", "test"):
        if split not in splits:
            size = max(1, round(SHARES[split] * len(rows)))
            splits[split], order = rows[order[:size]], order[size:]
    if len(order) < 2:
        raise ValueError(f"{len(rows)} rows are too few to train, choose and test on")
    return Dataset(rows[order], splits["validation"], Sealed(splits["test"]), names)


def _checked(where: str, texts: Sequence[Any], labels: Iterable[Any], names: tuple[str, ...]) -> Rows:
    """Rows of texts and names of labels; `where` is for messages."""
    at = {name: k for k, name in enumerate(names)}
    found: list[int] = []
    for k, (text, label) in enumerate(zip(texts, labels), 1):
        check_text(where, k, text)
        if label not in at:
            raise ValueError(f"{where}, row {k}: label {label!r} is none of {', '.join(map(repr, names))}")
        found.append(at[label])
    return Rows(texts, np.array(found, np.int32))


def check_text(where: str, k: int, text: Any) -> None:
    """Raises where the k-th row of something has no text."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}, row {k}: expected a text, found {text!r}")
