"""Between the paths of a tree and the names of a torch model's parameters."""

import dataclasses
import itertools
import re
from typing import Any, Iterator, Mapping

from peftjax.flat import near
from peftjax.overlay import short, type_of
from peftjax.paths import flatten
from peftjax.roles import Role, Roles

Names = Mapping[str, str] | None

# What torch calls "weight".
WEIGHTS = {"kernel", "scale", "embedding"}


@dataclasses.dataclass(frozen=True)
class Spot:
    """One parameter of the torch model: its name, the leaf that holds it, and where along the leaf's stacked axes."""

    name: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    role: Role

    @property
    def module(self) -> str:
        """The module it belongs to: its name without the last word."""
        return self.name.rpartition(".")[0]

    @property
    def is_kernel(self) -> bool:
        """Whether a module contracts or looks up with it."""
        return self.role.op in ("linear", "conv", "embedding") and {"i", "o"} <= set(self.role.axes)

    @property
    def is_tied(self) -> bool:
        """Whether a table is used as the head, too."""
        return self.role.op == "embedding" and len(set(self.role.uses)) > 1

    def of_module(self, last: str) -> str:
        """The name of another tensor of the same module."""
        return f"{self.module}.{last}" if self.module else last


def spots(params: Any, roles: Roles, names: Names = None) -> dict[str, Spot]:
    """Every parameter of a tree by its torch name.

    By default a leaf is called by its path: `encoder/layer/0/query/kernel` is `encoder.layer.0.query.weight`; `kernel`,
    `scale` and `embedding` are `weight`, and a first `params` is left out. `names` says otherwise: a path, or a regex
    that fullmatches paths, to its name, a torch name or a path, where `\\1` is the regex's first group; the first entry
    that matches counts. In a name, `{layer}` stands for the number along the leaf's stacked axis (that of a scan), and
    `{expert}` for that along its batch axis.

    Raises:
      ValueError: lists the leaves that no entry names, entries that match no leaf, names that two leaves share, and
        leaves that stack several parameters under one name.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> params = {"mlp": {"kernel": jnp.ones((4, 3))}}
      >>> roles = pj.roles(lambda params, x: x @ params["mlp"]["kernel"], params, jnp.ones((1, 4)))
      >>> list(spots(params, roles)), list(spots(params, roles, {"(.*)": r"encoder.\\1"}))
      (['mlp.weight'], ['encoder.mlp.weight'])
    """
    found: dict[str, Spot] = {}
    faults: list[str] = []
    leaves = flatten(params)
    paths = [path for path, _ in leaves]
    unused = dict.fromkeys(names or {})
    for path, leaf in leaves:
        if path not in roles:
            raise ValueError(f"{path} is not among the roles; they were taken of another tree")
        entry = _entry(names, path)
        unused.pop(entry or "", None)
        if names is not None and entry is None:
            faults.append(f'{path} is named by no entry of `names` (for the default, add "(.*)": r"\\1")')
            continue
        shape, role = type_of(leaf).shape, roles[path]
        for index in _positions(shape, role):
            try:
                name = _name(path, entry, names, _numbers(role, index))
            except (KeyError, IndexError, ValueError, re.error) as error:
                faults.append(f"{path}: {names and names[str(entry)]!r} is no name ({type(error).__name__}: {error})")
                break
            if name in found:
                other = found[name].path
                more = "; put {layer} or {expert} in its name" if other == path else ""
                faults.append(f"{name} is the name of two parameters, {other} and {path} {short(leaf)}{more}")
                break
            found[name] = Spot(name, path, index, shape, role)
    faults += [f"{entry!r} matches no path (nearest: {near(entry, paths)})" for entry in unused]
    if faults:
        raise ValueError("`names` is no one-to-one mapping of this tree:\n  " + "\n  ".join(faults))
    return found


def _entry(names: Names, path: str) -> str | None:
    if names is None or path in names:
        return path if names else None
    for pattern in names:
        try:
            if re.fullmatch(pattern, path):
                return pattern
        except re.error as error:
            raise ValueError(f"`names`: {pattern!r} is no regex: {error}") from None
    return None


def _name(path: str, entry: str | None, names: Names, numbers: Mapping[str, int]) -> str:
    if names and entry is not None:
        match = re.fullmatch(entry, path)
        path = names[entry] if match is None else match.expand(names[entry])
        path = path.format(**numbers)
    parts = [part for part in re.split("[/.]", path.removeprefix("params/")) if part]
    return ".".join([*parts[:-1], "weight" if parts[-1] in WEIGHTS else parts[-1]])


def _positions(shape: tuple[int, ...], role: Role) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(n) for n, letter in zip(shape, role.axes) if letter in "sb"))


def _numbers(role: Role, index: tuple[int, ...]) -> dict[str, int]:
    letters = [letter for letter in role.axes if letter in "sb"]
    return {{"s": "layer", "b": "expert"}[letter]: n for letter, n in zip(letters, index)}


def modules(found: Mapping[str, Spot]) -> dict[str, list[Spot]]:
    """The parameters of each module that has any."""
    made: dict[str, list[Spot]] = {}
    for spot in found.values():
        made.setdefault(spot.module, []).append(spot)
    return made
