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

SIZES = {"train": 4000, "validation": 500, "test": 500}
SEED = 0  # of the split, which stays the same whatever the seed of a run


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
        path = fetch(DIGITS) / "mnist_5k.csv.gz"
        ends = np.cumsum([0, *SIZES.values()])
        return {name: self._generate_examples(path, *ends[k : k + 2]) for k, name in enumerate(SIZES)}

    def _generate_examples(self, path: Path, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = table(path)
        for k in np.random.default_rng(SEED).permutation(len(rows))[start:stop]:
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
