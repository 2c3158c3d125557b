"""Sentences of movie reviews with the mean of twenty people's ratings, as a tensorflow-datasets builder.

Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text". TensorFlow is
not needed, and is not imported.
"""

import csv
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from experiments.assets import REVIEWS, fetch
from experiments.splits import dealt

SIZES = {"train": 3000, "validation": 1000, "test": 2000}
Rated = tuple[str, float, str]


class MovieReviews(tfds.core.GeneratorBasedBuilder):
    """Positive or negative: what at least a clear majority of raters agreed on, |mean rating| >= 1 of -4 to 4."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Text(),
            "score": np.float32,
            "label": tfds.features.ClassLabel(names=["negative", "positive"]),
        }
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        rows = rated(fetch(REVIEWS) / "reviews.tsv")
        return {name: self._generate_examples(rows, at) for name, at in dealt(len(rows), SIZES).items()}

    def _generate_examples(self, rows: Sequence[Rated], at: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
        for k in at:
            number, score, text = rows[k]
            yield number, {"text": text, "score": np.float32(score), "label": int(score > 0)}


def rated(path: Path) -> list[Rated]:
    """(number, mean rating, text) of every sentence rated at least 1 on either side; of equal texts, the first."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            (number, float(score), text)
            for number, score, text in csv.reader(file, "excel-tab", quoting=csv.QUOTE_NONE)
        ]
    first = {text.strip().casefold(): number for number, _, text in reversed(rows)}
    return [row for row in rows if abs(row[1]) >= 1 and first[row[2].strip().casefold()] == row[0]]
