"""Labelled texts in a file of one's own: CSV, TSV or JSON lines."""

import csv
import json
from pathlib import Path
from typing import Any, Callable


def _csv(path: Path, delimiter: str = ",") -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for k, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {k} is no JSON: {error}") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {k}: expected an object, found {line[:40]}")
    return rows


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".jsonl": _jsonl,
}


def read(path: Path, text: str, label: str) -> tuple[list[Any], list[str]]:
    """The texts and the labels, as strings, in two columns of a file.

    Raises:
      ValueError: no such file or column, no rows, or a row without a label.
    """
    if not path.is_file() or path.suffix not in READERS:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    rows = READERS[path.suffix](path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    for k, row in enumerate(rows, 1):
        if lacking := [column for column in (text, label) if column not in row]:
            raise ValueError(
                f"{path}, row {k} has no column {' nor '.join(map(repr, lacking))}, only {', '.join(map(repr, row))}. "
                "Name yours with --config.text= and --config.label="
            )
        if row[label] is None or not str(row[label]).strip():
            raise ValueError(f"{path}, row {k}: expected a label in {label!r}, found {row[label]!r}")
    return [row[text] for row in rows], [str(row[label]).strip() for row in rows]
