"""Reading values of a page that several scripts share."""

from typing import Any

import ml_collections


def listed(names: Any) -> list[str]:
    """The names of a tuple of the page, or of a flag: "a,b", of which ml_collections makes one name, or numbers."""
    return [name.strip() for name in ",".join(map(str, names)).split(",")]


def check_numbers(c: ml_collections.ConfigDict, *names: str) -> None:
    """Raises unless these values of a page hold whole numbers."""
    for name in names:
        if not c[name] or not all(isinstance(x, int) for x in c[name]):
            raise ValueError(f"{name} {tuple(c[name])}: expected whole numbers, as --config.{name}=0,1")
