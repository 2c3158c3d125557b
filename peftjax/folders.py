"""Folders that are there whole or not at all."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Iterator


@contextlib.contextmanager
def replacing(folder: Path, files: set[str]) -> Iterator[Path]:
    """A new folder to fill with these files; when it is complete it takes the place of the named one.

    A process that dies leaves the old folder or the new one, never a part of one; at worst the old one under a name
    that begins with a dot.

    Raises:
      ValueError: the named folder holds other files, or is none.
    """
    if folder.exists() and not (folder.is_dir() and {p.name for p in folder.iterdir()} <= files):
        raise ValueError(
            f"{folder} holds something else than an adapter, which saving would remove; choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{end}") for end in ("new", "old"))
    new.mkdir()
    try:
        yield new
        for path in (*(new / name for name in files), new):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
