"""The options of methods: each has the type that its factory annotates, and what is saved of it is plain."""

import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin

NAMES = {int: "an integer", float: "a finite number", str: "a string", bool: "True or False", type(None): "None"}


def check_options(factory: str, options: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raises unless each option is of the type that is annotated, and its numbers are finite.

    Args:
        factory: the name of what takes the options.
        options: their values.
        kinds: their types; of those that are no numbers, strings, sequences, mappings or functions, nothing is asked.

    Raises:
        ValueError: names the option, what was found and what was expected; also of an alpha of 0, with which nothing
            that trains could act.

    Example:
        >>> check_options("lora", {"rank": 2.5}, {"rank": int})
        Traceback (most recent call last):
        ...
        ValueError: lora: rank=2.5; expected an integer
    """
    for name, value in options.items():
        if not _fits(value, kinds[name]):
            raise ValueError(f"{factory}: {name}={value!r}; expected {_said(kinds[name])}")
        numbers = list(value.values()) if isinstance(value, Mapping) else [value]
        if name in ("alpha", "alpha_pattern") and any(n == 0 and n is not None for n in numbers):
            raise ValueError(f"{factory}: {name}={value!r}; expected no 0: what trains could change nothing")


def _fits(value: Any, kind: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in args)
    if origin is Sequence:
        many = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return many and all(_fits(each, args[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if origin is Callable:
        return callable(value)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, kind) if kind in NAMES else True


def _said(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", or ".join(map(_said, args))
    if origin is Sequence:
        return f"a sequence of {_many(args[0])}"
    if origin is Mapping:
        return f"a mapping of {_many(args[0])} to {_many(args[1])}"
    return "a function" if origin is Callable else NAMES.get(kind, str(kind))


def _many(kind: Any) -> str:
    noun, of, rest = _said(kind).partition(" ")[2].partition(" of ")
    return f"{noun}s{of}{rest}"


def plain(value: Any) -> Any:
    """An option's value as Python's own numbers, tuples and dictionaries, as far as it is made of such."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, Collection) and not isinstance(value, (str, bytes, set, frozenset)):
        return tuple(map(plain, value))
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
