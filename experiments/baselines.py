"""What a run has to beat: the most frequent class, words counted, and the frozen model's features."""

import dataclasses
import time
from typing import Any, Callable, Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from experiments.data import Rows

INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
      name: of what was trained.
      correct: per test row, whether it was right.
      trainable: how many parameters train.
      seconds: of training, choices included.
    """

    name: str
    correct: np.ndarray
    trainable: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """The share that was right."""
        return float(self.correct.mean())

    @property
    def error(self) -> float:
        """The standard error of the accuracy, from the number of test rows."""
        return float(np.sqrt(self.accuracy * (1 - self.accuracy) / len(self.correct)))


def majority(train: Rows, test: Rows) -> Result:
    """Always the most frequent class of the training rows."""
    return Result("majority", test.labels == np.bincount(train.labels).argmax(), 0, 0.0)


def words(train: Rows, validation: Rows, test: Rows) -> Result:
    """Logistic regression on TF-IDF of words and pairs of words."""
    start = time.perf_counter()
    counts = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    fitted = _fitted(
        counts.fit_transform(train.texts), train.labels, counts.transform(validation.texts), validation.labels
    )
    seconds = time.perf_counter() - start
    return Result(
        "TF-IDF + logistic regression",
        fitted.predict(counts.transform(test.texts)) == test.labels,
        _size(fitted),
        seconds,
    )


def probe(features: Callable[[Sequence[str]], np.ndarray], train: Rows, validation: Rows, test: Rows) -> Result:
    """Logistic regression on features of texts, (N, D), which stay as they are."""
    start = time.perf_counter()
    x = features(train.texts)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    scaled = lambda x: (x - mean) / deviation
    fitted = _fitted(scaled(x), train.labels, scaled(features(validation.texts)), validation.labels)
    seconds = time.perf_counter() - start
    return Result(
        "frozen linear probe", fitted.predict(scaled(features(test.texts))) == test.labels, _size(fitted), seconds
    )


def _fitted(x: Any, y: np.ndarray, x_chosen_on: Any, y_chosen_on: np.ndarray) -> LogisticRegression:
    """The one of a few penalties that does best on the validation rows."""
    fits = [LogisticRegression(C=c, max_iter=2000).fit(x, y) for c in INVERSE_PENALTIES]
    return max(fits, key=lambda fit: fit.score(x_chosen_on, y_chosen_on))


def _size(fitted: LogisticRegression) -> int:
    return fitted.coef_.size + fitted.intercept_.size
