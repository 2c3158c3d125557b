"""Labelled images: the digits, any tensorflow-datasets data set of images, or a folder of one's own."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Iterable, Sequence

import grain
import numpy as np
from PIL import Image, ImageOps

from experiments import catalogue, files
from experiments.batches import Batch, filled
from experiments.data import Dataset, cut
from experiments.splits import SPLITS

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
DIGITS = "digits"
COLUMNS = ("image", "label")  # the settings that name them
MODES = {"1": "L", "L": "L", "RGB": "RGB", "P": "RGB"}  # what is read, and as what


@dataclasses.dataclass(frozen=True)
class Images:
    """Square images of one size and their labels, integers from 0."""

    pixels: np.ndarray  # (N, S, S, C) uint8, of one channel or of three
    labels: np.ndarray  # (N,) int32

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: Any) -> "Images":
        return Images(self.pixels[at], self.labels[at])


def is_folder(name: str) -> bool:
    """Whether a name is that of a folder; "digits" is not, whatever folder is called so."""
    return name != DIGITS and Path(name).is_dir()


def has_columns(name: str) -> bool:
    """Whether a data set has columns by name, as those of tensorflow-datasets have."""
    return name != DIGITS and not is_folder(name)


def load(name: str, size: int, image: str = "image", label: str = "label") -> Dataset[Images]:
    """A data set of images and labels.

    Args:
      name: "digits"; a folder; or what tensorflow-datasets calls one of its own. A folder holds one of images per class,
        or "train" and, if there are such, "validation" and "test" that do; "./digits" is one.
      size: of the images: the shorter side is scaled to it, and the middle of the longer one is kept.
      image, label: the columns of a data set of tensorflow-datasets.

    Returns:
      Its splits. Those that it does not have are cut from its training split (of a folder without splits, from all of
      it), always in the same way.

    Raises:
      ValueError: no such folder, column or data set, a class without an image, a file that is no image or beside the
        classes, or an image that has neither one channel nor three.
    """
    if is_folder(name):
        splits, names = _folder(Path(name), size)
        return cut(splits, names)
    if not files.is_name(name):
        raise ValueError(f"{name!r} is no folder, nor can it be the name of a data set of tensorflow-datasets")
    found, names = catalogue.digits() if name == DIGITS else catalogue.images(name, image, label)
    return cut({split: _stacked(f"{name}, {split}", *columns, size) for split, columns in found.items()}, names)


def digest(name: str) -> dict[str, str]:
    """What a folder of images holds, as a SHA-256 of the images that are read and their places; nothing of other names.

    Raises:
      ValueError: as `load` does, but for what is within a file.
    """
    if not is_folder(name):
        return {}
    made = hashlib.sha256()
    for path in sorted(path for split in _laid(Path(name)).values() for held in split.values() for path in held):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        made.update(f"{path.relative_to(name)}\0{content}\n".encode())
    return {"digest": made.hexdigest()}


def _folder(folder: Path, size: int) -> tuple[dict[str, Images], tuple[str, ...]]:
    laid, made = _laid(folder), {}
    for split, classes in laid.items():
        files = [(path, k) for k, held in enumerate(classes.values()) for path in held]
        pixels = [_opened(path, size) for path, _ in files]
        made[split] = _stacked(f"{folder}, {split}", pixels, [k for _, k in files], size)
    return made, tuple(laid["train"])


def _laid(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The images of each split and class, both in order."""
    splits = _splits(folder)
    classes = {split: _folders(place) for split, place in splits.items()}
    if len(classes["train"]) < 2:
        raise ValueError(
            f"{splits['train']} holds {len(classes['train'])} folders; expected one of images for each of two classes"
        )
    for split, found in classes.items():
        if other := sorted(set(found) ^ set(classes["train"])):
            raise ValueError(f"{splits[split]}: the classes {', '.join(other)} are in one split alone")
    return {split: {name: _files(place) for name, place in found.items()} for split, found in classes.items()}


def _splits(folder: Path) -> dict[str, Path]:
    """The folders of the splits, or the whole one as that of training."""
    inside = _folders(folder)
    if not set(SPLITS) & set(inside):
        return {"train": folder}
    if "train" not in inside or set(inside) - set(SPLITS):
        raise ValueError(
            f"{folder} holds the folders {', '.join(inside)}; expected train, and of validation and test those that there are"
        )
    return {split: inside[split] for split in SPLITS if split in inside}


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _folders(folder: Path) -> dict[str, Path]:
    """The folders of classes or of splits, by name."""
    found = _visible(folder)
    _refuse(folder, [path for path in found if not path.is_dir()], "folders alone, one of images for each class")
    return {path.name: path for path in found}


def _files(folder: Path) -> list[Path]:
    """The images of a class."""
    found, kinds = _visible(folder), f"files that end in {', '.join(SUFFIXES)}"
    others = [path for path in found if path.suffix.lower() not in SUFFIXES or not path.is_file()]
    _refuse(folder, others, f"images alone, {kinds}")
    if not found:
        raise ValueError(f"{folder} holds no image; expected {kinds}")
    return found


def _refuse(folder: Path, others: list[Path], expected: str) -> None:
    """Raises for what would be left out without a word."""
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise ValueError(f"{folder} holds {others[0].name}{more}; expected {expected}")


def _opened(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode in MODES:
                image.draft(MODES[image.mode], (size, size))
                return _fitted(ImageOps.exif_transpose(image).convert(MODES[image.mode]), size)
            found = f"{len(image.getbands())} channels ({image.mode})"
    except Exception as error:  # of a damaged file, or of one that is far too large, of any kind
        raise ValueError(f"{path} is no image that can be read ({type(error).__name__}: {error})") from error
    raise ValueError(f"{path} has {found}; expected 1 (grey) or 3 (RGB), of 8 bits")


def _fitted(image: Image.Image, size: int) -> np.ndarray:
    """The pixels, (S, S, C)."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)


def _stacked(where: str, images: Iterable[np.ndarray], labels: Sequence[int], size: int) -> Images:
    """Images of any size, (H, W, C) uint8, as one array; grey ones beside colours are coloured."""
    made = []
    for k, x in enumerate(images, 1):
        if x.ndim != 3 or x.shape[2] not in (1, 3) or x.dtype != np.uint8:
            raise ValueError(f"{where}, image {k} is {x.dtype}{list(x.shape)}; expected uint8 (H, W, C), C = 1 or 3")
        made.append(
            x
            if x.shape[:2] == (size, size)
            else _fitted(Image.fromarray(x.squeeze(-1) if x.shape[2] == 1 else x), size)
        )
    channels = max(x.shape[2] for x in made)
    pixels = np.stack([np.broadcast_to(x, (size, size, channels)) for x in made])
    return Images(pixels, np.asarray(labels, np.int32))


def batches(images: Images, size: int, steps: int | None = None, seed: Sequence[int] = (0,)) -> grain.MapDataset:
    """The images in batches.

    Args:
      images: which.
      size: per batch.
      steps: how many batches, of images drawn in one random order after another; None is every image once, in order, the
        last batch filled up with images of weight 0.
      seed: of the orders.

    Returns:
      A data set whose elements are `image` (size, S, S, C) uint8, `label` (size,) int32, `weight` (size,) float32 and
      `index` (size,), which image.

    Raises:
      ValueError: images drawn for fewer than one batch of them.
    """
    if steps is not None and len(images) < size:
        raise ValueError(f"{len(images)} images to draw from are fewer than a batch of {size}")
    count = len(images) if steps is None else steps * size
    order = np.arange(count) if steps is None else _orders(len(images), count, np.random.default_rng(seed))
    at = [order[k : k + size] for k in range(0, count, size)]
    return grain.MapDataset.source(at).map(lambda chosen: _batch(images, chosen, size))


def _orders(n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([rng.permutation(n) for _ in range(-(-count // n))])[:count]


def _batch(images: Images, chosen: np.ndarray, size: int) -> Batch:
    index, weight = filled(chosen, size)
    return {"image": images.pixels[index], "label": images.labels[index], "weight": weight, "index": index}
