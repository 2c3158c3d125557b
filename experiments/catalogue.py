"""Labelled texts and images from tensorflow-datasets, without TensorFlow where the data set itself needs none."""

import importlib.util
import shutil
from typing import Any, Callable, Iterable

import tensorflow_datasets as tfds

from experiments import assets
from experiments.columns import Texts
from experiments.digits import Mnist5k
from experiments.reviews import MovieReviews

SPLITS = ("train", "validation", "test")
Columns = tuple[Texts, list[str]]
Pictures = tuple[Iterable[Any], list[int]]


def reviews() -> tuple[dict[str, Columns], tuple[str, ...]]:
    """The movie reviews, prepared in the cache; a damaged copy there is prepared anew.

    Raises:
      assets.Missing: they are not there, and could not be fetched.
    """
    return _prepared(MovieReviews, lambda builder: _texts(builder, "text", "label"))


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
    return _published(name, "file", lambda builder: _texts(builder, text, label))


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
                f'({type(error).__name__}). If the name is right: pip install "peftjax[tf]"'
            ) from error
        raise ValueError(f"{name!r} is no {other}, and no data set that can be read: {error}") from error


def _texts(builder: Any, text: str, label: str) -> tuple[dict[str, Columns], tuple[str, ...]]:
    sources, labels = _labelled(builder, text, label, "text", tfds.features.Text)
    names = tuple(builder.info.features[label].names)
    named = lambda k: names[k] if 0 <= k < len(names) else str(k)
    return {s: (Texts(sources[s], text), [named(k) for k in found]) for s, found in labels.items()}, names


def _pictures(builder: Any, image: str, label: str) -> tuple[dict[str, Pictures], tuple[str, ...]]:
    sources, labels = _labelled(builder, image, label, "image", tfds.features.Image)
    names = tuple(builder.info.features[label].names)
    if bad := [(s, k) for s, found in labels.items() for k in found if not 0 <= k < len(names)]:
        raise ValueError(f"{builder.name}, {bad[0][0]}: label {bad[0][1]} is none of its {len(names)} classes")
    return {s: ((row[image] for row in sources[s]), found) for s, found in labels.items()}, names


def _labelled(builder: Any, column: str, label: str, kind: str, feature: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The splits of a data set, and the labels in each; `column` holds what is to be classified."""
    features = builder.info.features
    if lacking := [name for name in (column, label) if name not in features]:
        raise ValueError(
            f"{builder.name} has no column {' nor '.join(map(repr, lacking))}, only {', '.join(map(repr, features))}. "
            f"Name yours with --config.{kind}= and --config.label="
        )
    if not isinstance(features[column], feature):
        raise ValueError(
            f"{builder.name}: {column!r} is {features[column]!r}; expected a{'n' * (kind == 'image')} {kind}"
        )
    if not isinstance(features[label], tfds.features.ClassLabel):
        raise ValueError(f"{builder.name}: {label!r} is {features[label]!r}; expected the labels of classes")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    sources = {split: builder.as_data_source(split) for split in SPLITS if split in builder.info.splits}
    bare = {column: tfds.decode.SkipDecoding()}  # what labels are read without
    labels = {split: [row[label] for row in builder.as_data_source(split, decoders=bare)] for split in sources}
    # Some test splits are published without labels, as -1.
    labels = {split: found for split, found in labels.items() if any(k >= 0 for k in found)}
    if "train" not in labels:
        raise ValueError(f"{builder.name} has no training split, only {', '.join(builder.info.splits)}")
    return sources, labels
