"""What a run leaves behind: a line in a file of results."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Mapping

import jax

PACKAGES = ("peftjax", "jax", "flax", "optax", "numpy", "tokenizers", "tensorflow-datasets", "scikit-learn")


def append(path: Path, config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Appends a line of JSON: when, the commit, versions, the device, the configuration and the results.

    A last row that is half written is taken out first: the new one would lie on its line, and both would be lost.
    """
    row = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "cores": _cores(),
        },
        "config": dict(config),
        "results": dict(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def replace(path: Path, content: str | bytes) -> None:
    """Writes a whole file; where that stops half-way, what was there before stays."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def _cores() -> int | None:
    """How many cores this process may use: they are what its seconds were measured on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; none where there is no file.

    A last row that is half written, by a run that was killed meanwhile, is taken out of the file; the others stay.

    Raises:
      ValueError: another row is no JSON object.
    """
    _mend(path)
    rows = [_row(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if bad := [k for k, row in enumerate(rows, 1) if row is None]:
        raise ValueError(f"{path}, line {bad[0]} is no row of results; expected a JSON object on each line")
    return [row for row in rows if row is not None]


def _mend(path: Path) -> None:
    """Ends the last row if that is all it lacks, or takes it out; the rows before it are not written again."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            if _row(data[whole:].decode(errors="replace")):
                file.seek(len(data))
                file.write(b"\n")
            else:
                file.truncate(whole)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def commit() -> str:
    """The commit of this code, with "+" where files that git knows were changed since; "unknown" without git."""
    here = Path(__file__).parent
    git = lambda *args: subprocess.run(
        ["git", *args], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
