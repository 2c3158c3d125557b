"""What is wrong with a folder, found part by part and raised as one error."""

from typing import Callable, Iterable, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Faults:
    """What was found so far: headings, each with the lines below it."""

    def __init__(self) -> None:
        self._said: dict[str, list[str]] = {}

    def add(self, heading: str, lines: Iterable[str]) -> None:
        """Adds lines below a heading, if there are any."""
        if found := list(lines):
            self._said.setdefault(heading, []).extend(found)

    def of(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `make` gives of these, or None where it raises a ValueError, which is added."""
        try:
            return make(*args, **kwargs)
        except ValueError as error:
            self._said.setdefault(str(error), [])
            return None

    def none(self, value: T | None) -> T:
        """The value, where nothing is wrong.

        Raises:
          ValueError: lists everything that is.
        """
        if value is None or self._said:
            raise ValueError("\n".join(_listed(heading, lines) for heading, lines in self._said.items()))
        return value


def _listed(heading: str, lines: Iterable[str]) -> str:
    return "\n  ".join((f"{heading}:", *lines)) if lines else heading
