"""Choosing paths by pattern, and saying what a pattern missed."""

import re
from typing import Callable, Sequence

from peftjax.flat import nearest


def matches(target: str, path: str, suffix: bool) -> bool:
    """Whether a regex fullmatches a path or its module's path; with `suffix`, whether a name ends one of them."""
    places = (path, path.rpartition("/")[0])
    if suffix:
        return any(place == target or place.endswith("/" + target) for place in places)
    return any(re.fullmatch(target, place) for place in places)


def chosen(targets: str | Sequence[str] | Callable[[str], bool], paths: Sequence[str]) -> set[str]:
    """The paths that targets name: a regex, a sequence of suffixes, or a predicate.

    Raises:
      ValueError: a regex or a suffix names no path.
    """
    if callable(targets):
        return {path for path in paths if targets(path)}
    suffix = not isinstance(targets, str)
    found: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        hits = {path for path in paths if matches(target, path, suffix)}
        if not hits:
            raise ValueError(f"{target!r} matches no path; nearest: {nearest(target, paths)}")
        found |= hits
    return found
