"""A file of results in which every run is found again by its settings: what is there is not done again."""

import hashlib
import json
from pathlib import Path
from typing import Any, Mapping

from experiments import record


def mark(settings: Mapping[str, Any]) -> str:
    """Eight characters that tell a run's settings from others, for the name of its folder."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Ledger:
    """Runs and their results, a line each; a last line that is half written is taken out.

    Args:
      path: of the file, which need not be there.
      version: of what the lines hold.

    Raises:
      ValueError: a line that is none of results, or of another version.
    """

    def __init__(self, path: Path, version: int):
        self.path, self._version = path, version
        self._rows = record.read(path)
        for k, row in enumerate(self._rows, 1):
            if (found := row.get("config", {}).get("version")) != version:
                raise ValueError(
                    f"{path}, line {k} is of version {found}; expected {version}: move the file away, or give --config.out="
                )

    def find(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The results of the run with these settings, if it was done."""
        wanted = self._settings(settings)
        return next((row["results"] for row in self._rows if row["config"] == wanted), None)

    def add(self, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Writes the results of a run."""
        record.append(self.path, self._settings(settings), results)
        self._rows.append({"config": self._settings(settings), "results": json.loads(json.dumps(dict(results)))})

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """As JSON reads them again."""
        return json.loads(json.dumps({"version": self._version, **settings}))
