"""What a run has to beat: one answer for all, words counted, and the frozen model's features."""

import dataclasses
import time
from typing import Any, Callable, Mapping, Sequence

import numpy as np
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.data import Dataset, Rows

INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
Encode = Callable[[Rows], np.ndarray]  # the frozen model's features of texts, (N, D)
Features = Callable[..., Encode]  # of the rows to encode, for which it compiles: that is not a baseline's time


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What a model says of the test rows.

    Attributes:
      name: of the model.
      answers: (N,).
      trainable: how many parameters it has.
      seconds: of fitting it, choices included; without compiling, but for the run that is set beside the baselines.
    """

    name: str
    answers: np.ndarray
    trainable: int
    seconds: float


Baselines = Mapping[str, Callable[[], Baseline]]  # each is computed when it is called, and may raise a ValueError

LOGISTIC = [LogisticRegression(C=c, max_iter=2000) for c in INVERSE_PENALTIES]
RIDGE = [Ridge(alpha=1 / c) for c in INVERSE_PENALTIES]


def classes(data: Dataset[Rows], test: Rows, features: Features) -> Baselines:
    """The most frequent class, and logistic regression on words and on features."""
    one = np.full(len(test), np.bincount(data.train.labels).argmax())
    return {
        "majority": lambda: Baseline("majority", one, 0, 0.0),
        "words": lambda: words(data, test),
        "probe": lambda: probe(data, test, features),
    }


def numbers(data: Dataset[Rows], test: Rows, features: Features) -> Baselines:
    """The mean, and ridge regression on words and on features."""
    one = np.full(len(test), data.train.labels.mean(dtype=np.float64))
    return {
        "mean": lambda: Baseline("mean", one, 0, 0.0),
        "words": lambda: words(data, test, models=RIDGE),
        "probe": lambda: probe(data, test, features, RIDGE),
    }


def words(data: Dataset[Rows], test: Rows, _: Features | None = None, models: Sequence[Any] = LOGISTIC) -> Baseline:
    """A linear model on TF-IDF of words and pairs of words.

    Raises:
      ValueError: texts without words, or only one class to train on.
    """
    start = time.perf_counter()
    counts = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    try:
        x = counts.fit_transform(data.train.texts)
    except ValueError as error:
        raise ValueError("no text to train on has a word of two letters or more, which TF-IDF counts") from error
    chosen_on = counts.transform(data.validation.texts)
    fitted = _best(models, x, data.train.labels, chosen_on, data.validation.labels)
    seconds = time.perf_counter() - start
    name = f"TF-IDF + {'ridge' if models is RIDGE else 'logistic'} regression"
    return Baseline(name, fitted.predict(counts.transform(test.texts)), size(fitted), seconds)


def probe(data: Dataset[Rows], test: Rows, features: Features, models: Sequence[Any] = LOGISTIC) -> Baseline:
    """A linear model on features of texts, which stay as they are."""
    encode = features(data.train, data.validation)
    start = time.perf_counter()
    x, chosen_on = encode(data.train), encode(data.validation)
    fitted = _scaled(models, x, data.train.labels, chosen_on, data.validation.labels)
    seconds = time.perf_counter() - start
    return Baseline("frozen linear probe", fitted.predict(encode(test)), size(fitted[-1]), seconds)


def linear(x: np.ndarray, y: np.ndarray, x_chosen_on: np.ndarray, y_chosen_on: np.ndarray) -> Pipeline:
    """Logistic regression on features, (N, D), each brought to mean 0 and deviation 1."""
    return _scaled(LOGISTIC, x, y, x_chosen_on, y_chosen_on)


def _scaled(models: Sequence[Any], x: Any, y: np.ndarray, x_chosen_on: Any, y_chosen_on: np.ndarray) -> Pipeline:
    scaled = StandardScaler().fit(x)
    return make_pipeline(scaled, _best(models, scaled.transform(x), y, scaled.transform(x_chosen_on), y_chosen_on))


def _best(models: Sequence[Any], x: Any, y: np.ndarray, x_chosen_on: Any, y_chosen_on: np.ndarray) -> Any:
    """The model that does best on the validation rows, fitted."""
    return max((clone(model).fit(x, y) for model in models), key=lambda fit: fit.score(x_chosen_on, y_chosen_on))


def size(fitted: Any) -> int:
    """How many numbers a linear model has."""
    return fitted.coef_.size + np.size(fitted.intercept_)
