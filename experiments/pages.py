"""The flag --config, and reading values of a page that several scripts share."""

import difflib
import functools
from pathlib import Path
from typing import Any, Mapping

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments import recipes

NEW = {"lock_config": False, "accept_new_attributes": True}


def define(name: str, values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None) -> None:
    """Defines --config, by default a page in configs/; `read` gives it, with what other flags say."""
    page = str(Path(__file__).parent / "configs" / name)
    config_flags.DEFINE_config_file("config", page, flag_values=values, sys_argv=argv, **NEW)


def read(values: flags.FlagValues = flags.FLAGS) -> ml_collections.ConfigDict:
    """The page that flags give. The block of a method takes what peftjax's function does, on the page or not.

    Raises:
      ValueError: a flag of a setting that is not on the page, and is no argument of a method.
    """
    plain = flags.FlagValues()
    flag: Any = values["config"]
    config_flags.DEFINE_config_file("config", flag.config_filename, flag_values=plain, sys_argv=[""])
    for path, x in flag.override_values.items():
        *blocks, name = path.split(".")
        held: Any = plain["config"].value
        for block in blocks:
            held = held[block]
        if name not in held and len(blocks) == 1 and blocks[0] in recipes.METHODS:
            recipes.check(blocks[0], {name: x})
        elif name not in held:
            nearest = "".join(f"; the nearest is {near}" for near in difflib.get_close_matches(name, held, 1))
            raise ValueError(f"--config.{path}: the page has no such setting{nearest}")
    flag.value.lock()
    return flag.value


def refuse(replaced: Mapping[str, str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Raises for a flag that a script would not heed.

    Args:
      replaced: settings, or blocks of them, and why they say nothing.
      values: where the flags are.
    """
    flag: Any = values["config"]
    for path in flag.override_values:
        for name, why in replaced.items():
            if path == name or path.startswith(f"{name}."):
                raise ValueError(f"--config.{path}= would change nothing here: {why}")


def listed(names: Any) -> list[str]:
    """The names of a tuple of the page, or of a flag: "a,b", of which ml_collections makes one name, or numbers."""
    return [name.strip() for name in ",".join(map(str, names)).split(",")]


def check_numbers(c: ml_collections.ConfigDict, *names: str, kind: type | tuple[type, ...] = int) -> None:
    """Raises unless these values of a page, such as "seeds" or "rates.lora", hold numbers: whole ones, or of another kind."""
    for name in names:
        found: Any = functools.reduce(lambda held, part: held[part], name.split("."), c)
        found = found if isinstance(found, (tuple, list)) else (found,)
        if not found or not all(isinstance(x, kind) and not isinstance(x, bool) for x in found):
            said = ("whole numbers", "0,1") if kind is int else ("numbers", "0.001,0.01")
            raise ValueError(f"{name} {tuple(found)}: expected {said[0]}, as --config.{name}={said[1]}")
