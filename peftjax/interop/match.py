"""Which modules a configuration of Hugging Face peft means."""

import re
from typing import Any, Iterable, Mapping


def broken(regex: str) -> str | None:
    """Why this is no regex, or None where it is one."""
    try:
        re.compile(regex)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def of_saved(name: str) -> str:
    """The regex that `modules_to_save` is where peft leaves out what it adapts no more."""
    return rf"(^|.*\.){name}($|\..*)"


def of_layers(pattern: str) -> str:
    """The regex that an entry of `layers_pattern` is, whose last group is the layer's number."""
    return rf"(?:^|.*?\.){pattern}\.(\d+)\."


def of_end(key: str) -> str:
    """The regex that an entry of `rank_pattern` or `alpha_pattern` is."""
    return rf"(.*\.)?({key})$"


def targeted(module: str, options: Mapping[str, Any]) -> bool:
    """Whether the options name a module to adapt, by peft's rules."""
    excluded, saved = options.get("exclude_modules") or (), options.get("modules_to_save") or ()
    if named(module, excluded) or any(re.match(of_saved(name), module) for name in saved):
        return False
    targets = options["target_modules"]
    return named(module, targets) and (isinstance(targets, str) or _in_layers(module, options))


def named(module: str, targets: str | Iterable[str]) -> bool:
    """A string is a regex for the whole name, a list holds names or their endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _in_layers(module: str, options: Mapping[str, Any]) -> bool:
    wanted = layers_of(options)
    return not wanted or layer_of(module, options) in wanted


def layers_of(options: Mapping[str, Any]) -> list[int]:
    """The numbers that `layers_to_transform` says; none where all layers are meant."""
    wanted = options.get("layers_to_transform")
    return [wanted] if isinstance(wanted, int) else wanted or []


def layer_of(module: str, options: Mapping[str, Any]) -> int | None:
    """The number of the layer that a module is in, as `layers_pattern` finds it."""
    patterns = options.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(regex, module) for regex in [*map(of_layers, patterns)] or [r".*?\.[^.]*\.(\d+)\."])
    return next((int(match[match.re.groups]) for match in found if match), None)


def saved(module: str, names: Iterable[str]) -> bool:
    """Whether `modules_to_save` names a module, or one that it belongs to."""
    parts = module.split(".")
    return any(".".join(parts[:k]).endswith(name) for k in range(1, len(parts) + 1) for name in names)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first regex that matches the end of a module's name."""
    return next((v for key, v in patterns.items() if re.match(of_end(key), module)), default)


def targets_of(chosen: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """The shortest `target_modules` that names these modules and no others: last words, or else whole names.

    Raises:
      ValueError: a module's whole name is the ending of another's, which is not chosen.
    """
    wanted, everything = set(chosen), set(all_modules)
    everything |= {".".join(m.split(".")[:k]) for m in everything for k in range(1, m.count(".") + 1)}
    for names in ({m.rpartition(".")[2] for m in wanted}, wanted):
        if {m for m in everything if named(m, names)} == wanted:
            return sorted(names)
    more = sorted(m for m in everything if named(m, wanted) and m not in wanted)
    raise ValueError(f"no list of endings names {sorted(wanted)} and leaves out {more}")


def patterns_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The shortest table of regexes that gives these modules their values."""
    made: dict[str, Any] = {}
    for value in dict.fromkeys(v for v in values.values() if v != default):
        made |= {re.escape(name): value for name in targets_of([m for m, v in values.items() if v == value], values)}
    return made
