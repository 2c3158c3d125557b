"""A number for a text."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Iterable, Mapping, Self, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from scipy.stats import pearsonr, spearmanr

from experiments import baselines, catalogue, data, files
from experiments.tasks.task import Encoded, Task


@dataclasses.dataclass(frozen=True)
class Regress(Task):
    """A linear output and the squared error, of numbers brought to mean 0 and deviation 1.

    Attributes:
      mean: of the training rows' numbers.
      deviation: of these.
    """

    mean: float
    deviation: float
    metric: ClassVar[str] = "Spearman"
    options: ClassVar[tuple[str, ...]] = ("text", "score")

    @classmethod
    def read(cls, c: ml_collections.ConfigDict) -> tuple[Self, data.Dataset[data.Rows]]:
        """As `Task` has it; `--config.text=` and `--config.score=` name the columns."""
        data.check_columns(c.data, text=c.text, score=c.score)
        if files.is_path(c.data):
            splits = {"train": _checked(c.data, *files.read(Path(c.data), c.text, c.score, "score"))}
        else:
            found = catalogue.scores(c.data, c.text, c.score)
            splits = {split: _checked(f"{c.data}, {split}", *columns) for split, columns in found.items()}
        rows = data.cut(splits, ())
        numbers = rows.train.labels.astype(np.float64)
        if not numbers.std():
            raise ValueError(f"{c.data}: every number to train on is {numbers[0]:g}; expected at least two")
        return cls(float(numbers.mean()), float(numbers.std())), rows

    @property
    def outputs(self) -> int:
        """The number."""
        return 1

    def labels(self, encoded: Encoded, rows: data.Rows) -> np.ndarray:
        """The numbers, in deviations from the mean."""
        return ((rows.labels - self.mean) / self.deviation).astype(np.float32)

    def loss(self, out: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The squared error, in deviations."""
        each = jnp.square(out[:, 0] - batch["label"]) * batch["weight"]
        return each.sum(), {"weight": batch["weight"].sum()}

    def answers(self, outputs: np.ndarray, encoded: Encoded) -> np.ndarray:
        """The number."""
        return outputs[:, 0].astype(np.float64) * self.deviation + self.mean

    def scores(self, answers: np.ndarray, rows: data.Rows) -> dict[str, float]:
        """Spearman's and Pearson's correlation, 0 where all answers are one, and the root of the mean squared error."""
        varies = len(set(answers.tolist())) > 1 and len(set(rows.labels.tolist())) > 1
        return {
            "Spearman": float(spearmanr(answers, rows.labels).statistic) if varies else 0.0,
            "Pearson": float(pearsonr(answers, rows.labels).statistic) if varies else 0.0,
            "RMSE": float(np.sqrt(np.square(answers - rows.labels).mean())),
        }

    def baselines(
        self, data: data.Dataset[data.Rows], test: data.Rows, features: baselines.Features
    ) -> baselines.Baselines:
        """The mean, words counted, and the frozen model's features."""
        return baselines.numbers(data, test, features)

    def said(self, answer: Any, outputs: np.ndarray) -> str:
        """The number."""
        return f"{answer:+.3f}"


def _checked(where: str, texts: Sequence[Any], numbers: Iterable[Any]) -> data.Rows:
    """Rows of texts and numbers, which files have as strings; `where` is for messages."""
    found = []
    for k, (text, number) in enumerate(zip(texts, numbers), 1):
        data.check_text(where, k, text)
        try:
            found.append(float(number))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise ValueError(f"{where}, row {k}: expected a finite number, found {number!r}")
    return data.Rows(texts, np.array(found, np.float32))
