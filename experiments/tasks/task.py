"""What every task has."""

import dataclasses
from typing import Any, ClassVar, Mapping, Self, Sequence

import jax
import ml_collections
import numpy as np

from experiments.baselines import Baseline, Baselines, Features
from experiments.batches import Batch, PerToken, lengths_of, taken
from experiments.data import Dataset, Rows
from experiments.tokens import Tokens

GROUPS = 20  # of test rows, left out in turn


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Rows as a model reads them.

    Attributes:
      ids: of the tokens of each example.
      inputs: what else the model reads, by its name in a batch.
      source: whence the examples are, where answers have to be found there again.
      labels: as the loss reads them; None where the texts have none.
    """

    ids: Sequence[Sequence[int]]
    inputs: Mapping[str, np.ndarray | PerToken] = dataclasses.field(default_factory=dict)
    source: Any = None
    labels: np.ndarray | PerToken | None = None

    @property
    def columns(self) -> dict[str, np.ndarray | PerToken]:
        """What batches hold beside the ids."""
        return dict(self.inputs) if self.labels is None else {**self.inputs, "label": self.labels}

    def everything(self, width: int) -> Batch:
        """All that a loss reads, of all examples at once."""
        lengths = lengths_of(self.ids)
        columns = {name: taken(x, np.arange(len(lengths)), width) for name, x in self.columns.items()}
        mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
        return {"mask": mask, "weight": np.ones(len(lengths), np.float32), **columns}


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
      name: of what was trained.
      scores: on the test rows; the first one is that by which epochs are chosen.
      error: the standard error of the first one, from the number of test rows.
      trainable: how many parameters train.
      seconds: of training, choices included.
    """

    name: str
    scores: Mapping[str, float]
    error: float
    trainable: int
    seconds: float


class Task:
    """A task: a frozen dataclass, whose fields are what has to be known, beside an adapter, to use the model.

    Attributes:
      metric: the score by which epochs are chosen.
      per_token: whether the model has outputs for each token, or for each text.
      options: of a page, that say how its rows are read.
    """

    metric: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    per_token: ClassVar[bool] = False

    @classmethod
    def read(cls, c: ml_collections.ConfigDict) -> tuple[Self, Dataset[Rows]]:
        """The task and the rows that a configuration names.

        Raises:
          ValueError: rows that are not of this task.
        """
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """How many the model has, for each text or token."""
        raise NotImplementedError

    def parsed(self, given: Sequence[str]) -> list[Any]:
        """The texts of rows, as someone types them.

        Raises:
          ValueError: a text that is empty, or too few.
        """
        if not given or not all(text.strip() for text in given):
            raise ValueError("expected at least one text, and none that is empty")
        return list(given)

    def read_texts(self, tokens: Tokens, texts: Sequence[Any]) -> Encoded:
        """Texts, without labels."""
        return Encoded(tokens(texts))

    def labels(self, encoded: Encoded, rows: Rows) -> np.ndarray | PerToken:
        """The rows' labels as the loss reads them, one for each example."""
        raise NotImplementedError

    def encoded(self, tokens: Tokens, rows: Rows) -> Encoded:
        """Rows, with their labels."""
        made = self.read_texts(tokens, rows.texts)
        return dataclasses.replace(made, labels=self.labels(made, rows))

    def loss(self, out: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The summed loss of what counts in a batch, and how many these are."""
        raise NotImplementedError

    def answers(self, outputs: np.ndarray, encoded: Encoded) -> np.ndarray:
        """What the model says of each row, (N,), from its outputs."""
        raise NotImplementedError

    def scores(self, answers: np.ndarray, rows: Rows) -> dict[str, float]:
        """How good answers are; `metric` comes first."""
        raise NotImplementedError

    def baselines(self, data: Dataset[Rows], test: Rows, features: Features) -> Baselines:
        """What a run has to beat, by short names; `features` are those of the frozen model, (N, D)."""
        raise NotImplementedError

    def said(self, answer: Any, outputs: np.ndarray) -> str:
        """An answer and the outputs that it is from, for a reader."""
        return str(answer)

    def error(self, answers: np.ndarray, rows: Rows) -> float:
        """The standard error of the metric, by leaving out a twentieth of the rows in turn."""
        groups = np.array_split(np.random.default_rng(0).permutation(len(rows)), min(GROUPS, len(rows)))
        kept = [np.setdiff1d(np.arange(len(rows)), group) for group in groups]
        values = [self.scores(answers[at], rows[at])[self.metric] for at in kept if len(at)]
        return float(np.sqrt((len(values) - 1) * np.var(values)))

    def result(self, said: Baseline, rows: Rows) -> Result:
        """A line of the table, of what a model says of the rows."""
        scores, error = self.scores(said.answers, rows), self.error(said.answers, rows)
        return Result(said.name, scores, error, said.trainable, said.seconds)


def objects(rows: Sequence[Any]) -> np.ndarray:
    """An array whose entries are these, whatever they are."""
    made = np.empty(len(rows), object)
    for k, row in enumerate(rows):
        made[k] = row
    return made
