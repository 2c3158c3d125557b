"""Rows in a file of one's own: CSV, TSV or JSON lines."""

import csv
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, Callable

csv.field_size_limit(sys.maxsize)  # a cell may hold a whole document


def _csv(path: Path, text: str, delimiter: str = ",") -> list[dict[str, Any]]:
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns = lines.fieldnames or []
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{path} has {len(columns)} columns, of which several are called {', '.join(twice)}")
    rows = []
    try:
        for k, row in enumerate(lines, 1):
            if None in row:
                raise ValueError(
                    f"{path}, row {k} has {len(columns) + len(row[None])} cells, and there are {len(columns)} columns; "
                    f"expected quotes around a text that holds {delimiter!r}"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}") from error
    return rows


def _jsonl(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for k, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {k} is no JSON: {error}") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {k}: expected an object, found {line[:40]}")
    return rows


READERS: dict[str, Callable[[Path, str], list[dict[str, Any]]]] = {
    ".csv": _csv,
    ".tsv": lambda path, text: _csv(path, text, "\t"),
    ".jsonl": _jsonl,
}


def is_name(name: str) -> bool:
    """Whether tensorflow-datasets could call a data set so, such as "glue/sst2:1.0.0"."""
    return re.fullmatch(r"\w+([/:][\w.*=,-]+)*", name) is not None


def is_path(name: str) -> bool:
    """Whether a name is that of a file; "reviews" is not, whatever file is called so."""
    return name != "reviews" and (Path(name).suffix in READERS or Path(name).is_file() or not is_name(name))


def digest(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
      ValueError: no such file.
    """
    return hashlib.sha256(_content(path)).hexdigest()


def _content(path: Path) -> bytes:
    if not path.is_file() or path.suffix not in READERS:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    return path.read_bytes()


def rows(path: Path, **columns: str) -> list[dict[str, Any]]:
    """The rows of a file, which have all of some columns.

    Args:
      path: the file.
      **columns: their names, by the flags that set these.

    Raises:
      ValueError: no such file or column, no rows, or a file that cannot be read.
    """
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    found = READERS[path.suffix](path, text)
    if not found:
        raise ValueError(f"{path} has no rows")
    for k, row in enumerate(found, 1):
        if lacking := [column for column in columns.values() if column not in row]:
            raise ValueError(
                f"{path}, row {k} has no column {' nor '.join(map(repr, lacking))}, only {', '.join(map(repr, row))}. "
                f"Name yours with {' and '.join(f'--config.{flag}=' for flag in columns)}"
            )
    return found


def read(path: Path, text: str, label: str, flag: str = "label") -> tuple[list[Any], list[str]]:
    """The texts and the labels, as strings, in two columns of a file; `flag` names the second one in messages.

    Raises:
      ValueError: no such file or column, no rows, or a row without a label.
    """
    found = rows(path, **{"text": text, flag: label})
    for k, row in enumerate(found, 1):
        if row[label] is None or not str(row[label]).strip():
            raise ValueError(f"{path}, row {k}: expected a {flag} in {label!r}, found {row[label]!r}")
    return [row[text] for row in found], [str(row[label]).strip() for row in found]
