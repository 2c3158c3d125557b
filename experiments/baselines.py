"""What a run has to beat: the most frequent class, words counted, and the frozen model's features."""

import dataclasses
import time
from typing import Any, Callable

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.data import E, Rows

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
        size(fitted),
        seconds,
    )


def probe(features: Callable[[E], np.ndarray], train: E, validation: E, test: E) -> Result:
    """Logistic regression on features of examples, (N, D), which stay as they are."""
    start = time.perf_counter()
    fitted = linear(features(train), train.labels, features(validation), validation.labels)
    seconds = time.perf_counter() - start
    return Result("frozen linear probe", fitted.predict(features(test)) == test.labels, size(fitted[-1]), seconds)


def linear(x: np.ndarray, y: np.ndarray, x_chosen_on: np.ndarray, y_chosen_on: np.ndarray) -> Pipeline:
    """Logistic regression on features, (N, D), each brought to mean 0 and deviation 1."""
    scaled = StandardScaler().fit(x)
    return make_pipeline(scaled, _fitted(scaled.transform(x), y, scaled.transform(x_chosen_on), y_chosen_on))


def _fitted(x: Any, y: np.ndarray, x_chosen_on: Any, y_chosen_on: np.ndarray) -> LogisticRegression:
    """The one of a few penalties that does best on the validation rows."""
    fits = [LogisticRegression(C=c, max_iter=2000).fit(x, y) for c in INVERSE_PENALTIES]
    return max(fits, key=lambda fit: fit.score(x_chosen_on, y_chosen_on))


def size(fitted: LogisticRegression) -> int:
    """How many numbers it has."""
    return fitted.coef_.size + fitted.intercept_.size
