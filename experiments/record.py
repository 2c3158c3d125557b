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
    """Appends a line of JSON: when, the commit, versions, the device, the configuration and the results."""
    row = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "cores": os.cpu_count(),
        },
        "config": dict(config),
        "results": dict(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


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
