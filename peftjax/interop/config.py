"""Reading `adapter_config.json`: every option is known, of its type, and supported, or named in an error."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from peftjax.flat import near
from peftjax.interop import match
from peftjax.interop.tensors import unique_json

CONFIG = "adapter_config.json"

# Where an adapter came from, and what was decided before it was trained: nothing that it computes depends on them.
REMARKS = {
    *(
        "peft_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "task_type",
    ),
    *("runtime_config", "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "init_weights"),
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One key of a configuration.

    Attributes:
      default: its value where it is missing.
      valid: what it may be.
      expected: that in words.
      regexes: of its entries that peft reads as regexes, what it makes of each.
    """

    default: Any
    valid: Callable[[Any], bool]
    expected: str
    regexes: Callable[[Any], Mapping[str, str]] = lambda x: {}

    def faults(self, key: str, value: Any) -> list[str]:
        """What is wrong with the key's value, a line each."""
        if not self.valid(value):
            return [f"{key} is {value!r}, expected {self.expected}"]
        why = {entry: match.broken(regex) for entry, regex in self.regexes(value).items()}
        return [f"{key} has {entry!r}, which is no regex: {said}" for entry, said in why.items() if said is not None]


def is_whole(x: Any) -> bool:
    """Whether x is an integer, which a boolean is not."""
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Whether x is a number, and finite in float32."""
    return (is_whole(x) and abs(x) < 2**53) or (isinstance(x, float) and abs(x) < 2.0**128)


def _strings(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x)


def _table(x: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(x, dict) and all(map(valid, x.values()))


def whole(default: int | None, least: int = 0, needed: bool = False) -> Option:
    """An integer."""
    optional = default is None and not needed
    fits = lambda x: (is_whole(x) and least <= x < 2**31) or (optional and x is None)
    return Option(default, fits, f"an integer from {least} on")


def number(default: float) -> Option:
    """A number."""
    return Option(default, is_number, "a finite number of float32")


def flag(default: bool) -> Option:
    """A boolean."""
    return Option(default, lambda x: isinstance(x, bool), "true or false")


def text() -> Option:
    """A text, or none."""
    return Option(None, lambda x: x is None or isinstance(x, str), "a text")


def names(needed: bool = False) -> Option:
    """A regex, or a list of names."""
    empty: tuple[Any, ...] = ("", []) if needed else (None,)
    fits = lambda x: x not in empty if isinstance(x, str) or _strings(x) else not needed and x is None
    return Option(None, fits, "a regex or a list of names", lambda x: {x: x} if isinstance(x, str) else {})


def patterns() -> Option:
    """A regex, or a list of them."""
    regexes = lambda x: {each: match.of_layers(each) for each in ([x] if isinstance(x, str) else x or ())}
    return Option(None, lambda x: x is None or isinstance(x, str) or _strings(x), "a regex or a list of them", regexes)


def listed() -> Option:
    """A list of names, which may be regexes."""
    regexes = lambda x: {name: match.of_saved(name) for name in x or ()}
    return Option(None, lambda x: x is None or _strings(x), "a list of names", regexes)


def wholes() -> Option:
    """An integer, or a list of integers."""
    fits = lambda x: x is None or is_whole(x) or (isinstance(x, list) and all(map(is_whole, x)))
    return Option(None, fits, "an integer or a list of integers")


def by_end(valid: Callable[[Any], bool], expected: str) -> Option:
    """A table from the ends of modules' names, which are regexes, to values."""
    regexes = lambda x: {key: match.of_end(key) for key in x or ()}
    return Option({}, lambda x: x is None or _table(x, valid), f"a table from regexes to {expected}", regexes)


def one_of(default: Any, *choices: Any) -> Option:
    """One of some values; of equal ones, of the same type."""
    same = lambda x: any(type(x) is type(c) and x == c for c in choices)
    return Option(default, same, f"one of {', '.join(map(json.dumps, choices))}")


def read_page(folder: Path) -> dict[str, Any]:
    """The configuration in a folder, as it stands there.

    Raises:
      ValueError: it is missing, is no JSON object, or does not say which method it is of.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}; found {_contents(folder)}")
    try:
        page = unique_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(page, dict):
        raise ValueError(f"{path} holds a {type(page).__name__}, expected an object")
    return page


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "no folder of that name"
    return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder"


@contextlib.contextmanager
def about(where: Path) -> Iterator[None]:
    """Puts the file that is wrong before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_options(page: Mapping[str, Any], known: Mapping[str, Option]) -> tuple[dict[str, Any] | None, list[str]]:
    """The options of a page with their defaults, or None where one cannot be used; and every fault.

    A fault is an option of a wrong type, or one that is not supported and is not switched off; the others can be used.
    """
    wrong = [fault for key, value in page.items() if key in known for fault in known[key].faults(key, value)]
    wrong += [
        f"{key} is missing, expected {option.expected}"
        for key, option in known.items()
        if key not in page and not option.valid(option.default)
    ]
    others = {key: value for key, value in page.items() if key not in {*known, *REMARKS}}
    more = [
        f"{key}={value!r} is not supported (nearest that is: {near(key, known)})"
        for key, value in others.items()
        if value not in (None, False, 0, "", [], {})
    ]
    options = {key: page.get(key, option.default) for key, option in known.items()}
    return None if wrong else options, wrong + more


# What every method of peft says of the modules that it adapts.
TARGETS = {
    "target_modules": names(needed=True),
    "exclude_modules": names(),
    "layers_to_transform": wholes(),
    "layers_pattern": patterns(),
    "modules_to_save": listed(),
}
# Values by the ends of modules' names.
RANKS = by_end(lambda x: is_whole(x) and x > 0, "positive integers")
ALPHAS = by_end(is_number, "numbers")


def write_page(path: Path, page: Mapping[str, Any]) -> None:
    """Writes a configuration as peft does: sorted keys, two spaces."""
    path.write_text(json.dumps(page, indent=2, sort_keys=True))
