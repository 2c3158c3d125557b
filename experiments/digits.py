"""Five thousand handwritten digits, 500 of each (a part of MNIST, LeCun et al. 1998), as a tensorflow-datasets builder.

TensorFlow is not needed, and is not imported.
"""

import gzip
import io
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments.assets import DIGITS, fetch
from experiments.splits import dealt

SIZES = {"train": 4000, "validation": 500, "test": 500}


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """Images of 28 x 28 grey pixels, and the digit."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(names=[str(k) for k in range(10)]),
        }
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        rows = table(fetch(DIGITS) / "mnist_5k.csv.gz")
        return {name: self._generate_examples(rows, at) for name, at in dealt(len(rows), SIZES).items()}

    def _generate_examples(self, rows: np.ndarray, at: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
        for k in at:
            yield str(k), {"image": _png(rows[k, :-1].reshape(28, 28)), "label": int(rows[k, -1])}


def table(path: Path) -> np.ndarray:
    """The rows of the file, (5000, 785) uint8: the pixels of an image, then its digit."""
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",").astype(np.uint8)


def _png(pixels: np.ndarray) -> io.BytesIO:
    """The file of an image: given bytes, tensorflow-datasets needs no TensorFlow to write one."""
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "png")
    held.seek(0)
    return held
