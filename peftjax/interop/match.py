"""Which modules a configuration of Hugging Face peft means."""

import re
from typing import Any, Iterable, Mapping


def targeted(module: str, options: Mapping[str, Any]) -> bool:
    """Whether the options name a module to adapt, by peft's rules."""
    excluded, saved = options.get("exclude_modules") or (), options.get("modules_to_save") or ()
    if _named(module, excluded) or any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    targets = options["target_modules"]
    return _named(module, targets) and (isinstance(targets, str) or _in_layers(module, options))


def _named(module: str, targets: str | Iterable[str]) -> bool:
    """A string is a regex for the whole name, a list holds names or their endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _in_layers(module: str, options: Mapping[str, Any]) -> bool:
    wanted = options.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = options.get("layers_pattern") or [r"[^.]*"]
    starts = r"(?:^|.*?\.)" if options.get("layers_pattern") else r".*?\."
    found = (
        re.match(rf"{starts}{p}\.(\d+)\.", module) for p in ([patterns] if isinstance(patterns, str) else patterns)
    )
    number = next((int(match[1]) for match in found if match), None)
    return number is not None and number in ([wanted] if isinstance(wanted, int) else wanted)


def saved(module: str, names: Iterable[str]) -> bool:
    """Whether `modules_to_save` names a module, or one that it belongs to."""
    parts = module.split(".")
    return any(".".join(parts[:k]).endswith(name) for k in range(1, len(parts) + 1) for name in names)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first regex that matches the end of a module's name."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def targets_of(chosen: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """The shortest `target_modules` that names these modules and no others: last words, or else whole names.

    Raises:
      ValueError: a module's whole name is the ending of another's, which is not chosen.
    """
    wanted, everything = set(chosen), set(all_modules)
    everything |= {".".join(m.split(".")[:k]) for m in everything for k in range(1, m.count(".") + 1)}
    for names in ({m.rpartition(".")[2] for m in wanted}, wanted):
        if {m for m in everything if _named(m, names)} == wanted:
            return sorted(names)
    more = sorted(m for m in everything if _named(m, wanted) and m not in wanted)
    raise ValueError(f"no list of endings names {sorted(wanted)} and leaves out {more}")


def patterns_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The shortest table of regexes that gives these modules their values."""
    made: dict[str, Any] = {}
    for value in dict.fromkeys(v for v in values.values() if v != default):
        made |= {re.escape(name): value for name in targets_of([m for m, v in values.items() if v == value], values)}
    return made
