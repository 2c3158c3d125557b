"""Whether a pattern names a path."""

import re


def matches(target: str, path: str, suffix: bool) -> bool:
    """Whether a regex fullmatches a path or its module's path; with `suffix`, whether a name ends one of them.

    Raises:
      ValueError: the target is no regex.
    """
    places = (path, path.rpartition("/")[0])
    if suffix:
        return any(place == target or place.endswith("/" + target) for place in places)
    try:
        return any(re.fullmatch(target, place) for place in places)
    except re.error as error:
        raise ValueError(f"{target!r} is no regex: {error}; a regex for any ending is '.*' and the ending") from None
