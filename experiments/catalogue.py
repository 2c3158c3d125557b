"""Labelled texts and images from tensorflow-datasets, without TensorFlow where the data set itself needs none."""

import dataclasses
import importlib.util
import shutil
from typing import Any, Callable, Iterable

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.util import DownloadError

from experiments import assets, files
from experiments.columns import Texts
from experiments.digits import Mnist5k
from experiments.reviews import MovieReviews
from experiments.splits import SPLITS

FILE = f"file that ends in {', '.join(files.READERS)}"
Columns = tuple[Texts, list[Any]]
Pictures = tuple[Iterable[Any], list[int]]


def reviews() -> tuple[dict[str, Columns], tuple[str, ...]]:
    """The movie reviews, prepared in the cache; a damaged copy there is prepared anew.

    Raises:
      assets.Missing: they are not there, and could not be fetched.
    """
    return _prepared(MovieReviews, lambda builder: _texts(builder, "text", "label"))


def scores(name: str, text: str, score: str) -> dict[str, Columns]:
    """Texts and numbers: of the reviews, for "reviews", or as `public` finds them."""
    if name == "reviews":
        return _prepared(MovieReviews, lambda builder: _rated(builder, "text", "score"))
    return _published(name, FILE, lambda builder: _rated(builder, text, score))


def digits() -> tuple[dict[str, Pictures], tuple[str, ...]]:
    """The digits: as `reviews`, with images, (H, W, C) uint8, and numbers of labels."""

    def read(builder: Any) -> Any:
        splits, names = _pictures(builder, "image", "label")
        return {split: (list(pictures), found) for split, (pictures, found) in splits.items()}, names

    return _prepared(Mnist5k, read)


def _prepared(kind: Any, read: Callable[[Any], Any]) -> Any:
    """What `read` finds in a data set that is made here."""
    place = assets.home() / "datasets"
    for last in (False, True):
        try:
            with assets.alone(place):
                return read(kind(data_dir=str(place), file_format="array_record"))
        except Exception as error:  # a damaged record can raise anything
            if last or isinstance(error, assets.Missing):
                raise
            shutil.rmtree(place / kind.name, ignore_errors=True)
    raise AssertionError("the last attempt returns or raises")


def public(name: str, text: str, label: str) -> tuple[dict[str, Columns], tuple[str, ...]]:
    """A data set by the name that tensorflow-datasets gives it, such as "imdb_reviews" or "glue/sst2".

    Returns:
      Its splits with labels, each two columns: texts, which stay on the disk, and names of labels; and the names in
      order.

    Raises:
      ValueError: there is none of that name, it needs TensorFlow, it has no such columns, or it has no training split.
    """
    return _published(name, FILE, lambda builder: _texts(builder, text, label))


def images(name: str, image: str, label: str) -> tuple[dict[str, Pictures], tuple[str, ...]]:
    """A data set of images: as `public`, with images, (H, W, C) uint8, and numbers of labels."""
    return _published(name, "folder", lambda builder: _pictures(builder, image, label))


def _published(name: str, other: str, read: Callable[[Any], Any]) -> Any:
    """What `read` finds in a data set of a name; `other` says in a message what else the name could have been."""
    place = assets.home() / "datasets"
    try:
        with assets.alone(place):
            return read(tfds.builder(name, data_dir=str(place), file_format="array_record"))
    except (ImportError, NotImplementedError, tfds.core.DatasetNotFoundError) as error:
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"{name!r} is no {other}, and tensorflow-datasets cannot read a data set of that name without TensorFlow "
                f'({type(error).__name__}). If the name is right: pip install -e ".[tf]"'
            ) from error
        raise ValueError(f"{name!r} is no {other}, and no data set that can be read: {error}") from error
    except (OSError, DownloadError) as error:
        raise ValueError(f"{name!r}: the data set could not be had ({type(error).__name__}: {error})") from error


def _texts(builder: Any, text: str, label: str) -> tuple[dict[str, Columns], tuple[str, ...]]:
    sources, labels = _labelled(builder, text, label, TEXT, CLASS)
    names = tuple(builder.info.features[label].names)
    named = lambda k: names[k] if 0 <= k < len(names) else str(k)
    return {s: (Texts(sources[s], text), [named(k) for k in found]) for s, found in labels.items()}, names


def _rated(builder: Any, text: str, score: str) -> dict[str, Columns]:
    sources, found = _labelled(builder, text, score, TEXT, NUMBER)
    return {s: (Texts(sources[s], text), [float(x) for x in numbers]) for s, numbers in found.items()}


def _pictures(builder: Any, image: str, label: str) -> tuple[dict[str, Pictures], tuple[str, ...]]:
    sources, labels = _labelled(builder, image, label, IMAGE, CLASS)
    names = tuple(builder.info.features[label].names)
    if bad := [(s, k) for s, found in labels.items() for k in found if not 0 <= k < len(names)]:
        raise ValueError(f"{builder.name}, {bad[0][0]}: label {bad[0][1]} is none of its {len(names)} classes")
    return {s: ((row[image] for row in sources[s]), found) for s, found in labels.items()}, names


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a column has to hold.

    Attributes:
      flag: sets the name of the column.
      what: it holds, in a message.
      fits: whether a feature of a data set does.
      known: whether an entry says something.
    """

    flag: str
    what: str
    fits: Callable[[Any], bool]
    known: Callable[[Any], bool] = lambda _: True


TEXT = Kind("text", "a text", lambda feature: isinstance(feature, tfds.features.Text))
IMAGE = Kind("image", "an image", lambda feature: isinstance(feature, tfds.features.Image))
CLASS = Kind("label", "the labels of classes", lambda f: isinstance(f, tfds.features.ClassLabel), lambda k: k >= 0)
NUMBER = Kind("score", "numbers", lambda f: f.shape == () and np.issubdtype(f.np_dtype, np.number))


def _labelled(
    builder: Any, column: str, label: str, holds: Kind, labels: Kind
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The splits of a data set, and the labels in each; `column` holds what is to be classified or rated."""
    features = builder.info.features
    if lacking := [name for name in (column, label) if name not in features]:
        raise ValueError(
            f"{builder.name} has no column {' nor '.join(map(repr, lacking))}, only {', '.join(map(repr, features))}. "
            f"Name yours with --config.{holds.flag}= and --config.{labels.flag}="
        )
    for name, kind in ((column, holds), (label, labels)):
        if not kind.fits(features[name]):
            raise ValueError(f"{builder.name}: {name!r} is {features[name]!r}; expected {kind.what}")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    sources = {split: builder.as_data_source(split) for split in SPLITS if split in builder.info.splits}
    bare = {column: tfds.decode.SkipDecoding()}  # what labels are read without
    found = {split: [row[label] for row in builder.as_data_source(split, decoders=bare)] for split in sources}
    # Some test splits are published without labels, as -1.
    found = {split: values for split, values in found.items() if any(map(labels.known, values))}
    if "train" not in found:
        raise ValueError(f"{builder.name} has no training split, only {', '.join(builder.info.splits)}")
    return sources, found
