"""Which class a text is of."""

import dataclasses
from typing import Any, ClassVar, Mapping, Self

import jax
import ml_collections
import numpy as np
from sklearn.metrics import f1_score, matthews_corrcoef

from experiments import baselines, data
from experiments.pages import listed
from experiments.tasks.task import Encoded, Task
from experiments.train import cross_entropy


@dataclasses.dataclass(frozen=True)
class Classify(Task):
    """A softmax over classes, and cross-entropy.

    Attributes:
      names: of the classes, in order.
    """

    names: tuple[str, ...]
    metric: ClassVar[str] = "accuracy"
    options: ClassVar[tuple[str, ...]] = ("text", "label", "classes")

    @classmethod
    def read(cls, c: ml_collections.ConfigDict) -> tuple[Self, data.Dataset[data.Rows]]:
        """As `Task` has it; `--config.text=` and `--config.label=` name the columns."""
        classes = listed(c.classes) if len(c.classes) == 1 else [str(name) for name in c.classes]
        rows = data.load(c.data, c.text, c.label, [name for name in classes if name])
        return cls(rows.names), rows

    @property
    def outputs(self) -> int:
        """A logit for each class."""
        return len(self.names)

    def labels(self, encoded: Encoded, rows: data.Rows) -> np.ndarray:
        """The numbers of the classes."""
        return rows.labels

    def loss(self, out: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy."""
        return cross_entropy(out, batch)

    def answers(self, outputs: np.ndarray, encoded: Encoded) -> np.ndarray:
        """The number of the most probable class."""
        return outputs.argmax(1)

    def scores(self, answers: np.ndarray, rows: data.Rows) -> dict[str, float]:
        """Accuracy, F1 averaged over the classes, and Matthews' correlation."""
        return {
            "accuracy": float((answers == rows.labels).mean()),
            "F1": float(f1_score(rows.labels, answers, average="macro", zero_division=0.0)),
            "MCC": float(matthews_corrcoef(rows.labels, answers)),
        }

    def error(self, answers: np.ndarray, rows: data.Rows) -> float:
        """That of a share."""
        share = float((answers == rows.labels).mean())
        return float(np.sqrt(share * (1 - share) / len(rows)))

    def baselines(
        self, data: data.Dataset[data.Rows], test: data.Rows, features: baselines.Features
    ) -> baselines.Baselines:
        """The most frequent class, words counted, and the frozen model's features."""
        return baselines.classes(data, test, features)

    def said(self, answer: Any, outputs: np.ndarray) -> str:
        """The class and its probability."""
        return f"{self.names[answer]}  {float(jax.nn.softmax(outputs)[answer]):.3f}"
