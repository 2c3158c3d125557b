"""Labelled texts from tensorflow-datasets, without TensorFlow where the data set itself needs none."""

import importlib.util
import shutil
from typing import Any

import tensorflow_datasets as tfds

from experiments import assets
from experiments.columns import Texts
from experiments.reviews import MovieReviews

SPLITS = ("train", "validation", "test")
Columns = tuple[Texts, list[str]]


def reviews() -> tuple[dict[str, Columns], tuple[str, ...]]:
    """The movie reviews, prepared in the cache; a damaged copy there is prepared anew.

    Raises:
      assets.Missing: they are not there, and could not be fetched.
    """
    place = assets.home() / "datasets"
    for last in (False, True):
        try:
            with assets.alone(place):
                return _columns(MovieReviews(data_dir=str(place), file_format="array_record"), "text", "label")
        except Exception as error:  # a damaged record can raise anything
            if last or isinstance(error, assets.Missing):
                raise
            shutil.rmtree(place / MovieReviews.name, ignore_errors=True)
    raise AssertionError("the last attempt returns or raises")


def public(name: str, text: str, label: str) -> tuple[dict[str, Columns], tuple[str, ...]]:
    """A data set by the name that tensorflow-datasets gives it, such as "imdb_reviews" or "glue/sst2".

    Returns:
      Its splits with labels, each two columns: texts, which stay on the disk, and names of labels; and the names in
      order.

    Raises:
      ValueError: there is none of that name, it needs TensorFlow, it has no such columns, or it has no training split.
    """
    place = assets.home() / "datasets"
    try:
        with assets.alone(place):
            return _columns(tfds.builder(name, data_dir=str(place), file_format="array_record"), text, label)
    except (ImportError, NotImplementedError, tfds.core.DatasetNotFoundError) as error:
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"{name!r} is no file, and tensorflow-datasets cannot read a data set of that name without TensorFlow "
                f'({type(error).__name__}). If the name is right: pip install "peftjax[tf]"'
            ) from error
        raise ValueError(f"{name!r} is no file, and no data set that can be read: {error}") from error


def _columns(builder: Any, text: str, label: str) -> tuple[dict[str, Columns], tuple[str, ...]]:
    features = builder.info.features
    if lacking := [column for column in (text, label) if column not in features]:
        raise ValueError(
            f"{builder.name} has no column {' nor '.join(map(repr, lacking))}, only {', '.join(map(repr, features))}. "
            "Name yours with --config.text= and --config.label="
        )
    if not isinstance(features[text], tfds.features.Text):
        raise ValueError(f"{builder.name}: {text!r} is {features[text]!r}; expected a text")
    if not isinstance(features[label], tfds.features.ClassLabel):
        raise ValueError(f"{builder.name}: {label!r} is {features[label]!r}; expected the labels of classes")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    names = tuple(features[label].names)
    sources = {split: builder.as_data_source(split) for split in SPLITS if split in builder.info.splits}
    labels = {split: [row[label] for row in source] for split, source in sources.items()}
    # Some test splits are published without labels, as -1.
    labels = {split: found for split, found in labels.items() if any(k >= 0 for k in found)}
    if "train" not in labels:
        raise ValueError(f"{builder.name} has no training split, only {', '.join(builder.info.splits)}")
    named = lambda k: names[k] if 0 <= k < len(names) else str(k)
    return {s: (Texts(sources[s], text), [named(k) for k in found]) for s, found in labels.items()}, names
