"""How deep in the model each leaf is, from the order in which the model uses its parameters."""

import itertools
import re
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import jax
import numpy as np

from peftjax.overlay import type_of
from peftjax.paths import flatten
from peftjax.roles import Role
from peftjax.tree import Entry, entries


class Span(NamedTuple):
    """The layers that a leaf belongs to: one, or several where layers are stacked along an axis."""

    first: int
    length: int


def rates(tuned: Any, roles: Mapping[str, Role], decay: float, block: Callable[[str], str] | None = None) -> Any:
    """How fast each array that trains should learn: `decay ** (n - 1 - k)` in layer k of n.

    Args:
      tuned: a tree with overlays.
      roles: what `peftjax.roles` found of the model.
      decay: in (0, 1].
      block: names the layer of a path.

    Returns:
      A tree like `partition(tuned)[0]` of numbers, and of arrays that broadcast to stacked ones.

    Raises:
      ValueError: as `peftjax.layerwise` does.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"expected a decay in (0, 1], found {decay}")
    where = spans(tuned, roles, block)
    total = max((s.first + s.length for s in where.values()), default=0)
    if total < 2:
        raise ValueError(f"the model has {total} layer: no number in its paths tells layers apart; pass `block=`")
    leaves = dict(flatten(tuned))
    rate = lambda e: _rate(e, leaves[e.path], where, roles.get(e.path), total, decay)
    found = [rate(e) if e.trains else None for e in entries(tuned)]
    return jax.tree.unflatten(jax.tree.structure(tuned), found)


def spans(tuned: Any, roles: Mapping[str, Role], block: Callable[[str], str] | None = None) -> dict[str, Span]:
    """The layers of each leaf that the model uses; layer 0 is used first.

    Args:
      tuned: a tree, with or without overlays.
      roles: what `peftjax.roles` found of the model.
      block: names the layer of a path.

    Returns:
      {path: Span}.

    Raises:
      ValueError: leaves that make layers together stack different numbers of them, or along two axes.
    """
    lengths = {path: _stacked(path, type_of(x).shape, roles[path]) for path, x in flatten(tuned) if path in roles}
    used = sorted((p for p in lengths if roles[p].op != "unused"), key=lambda path: roles[path].order)
    names = {path: block(path) for path in used} if block else _names(used, lengths)
    made: dict[str, Span] = {}
    start = 0
    for name in dict.fromkeys(names.values()):
        sizes = {lengths[path] for path in used if names[path] == name} - {1}
        if len(sizes) > 1:
            raise ValueError(f"leaves of the layers {name!r} stack different numbers of them: {sorted(sizes)}")
        made[name] = Span(start, max(sizes, default=1))
        start += made[name].length
    return {path: made[name] for path, name in names.items()}


def _stacked(path: str, shape: tuple[int, ...], role: Role) -> int:
    if role.axes.count("s") > 1:
        raise ValueError(f"{path} stacks layers along two axes ({role.axes}), so their order cannot be told")
    return shape[role.axes.index("s")] if "s" in role.axes else 1


def _names(used: Sequence[str], lengths: Mapping[str, int]) -> dict[str, str]:
    """Names the layer of each path: by its number, by its stack, or else as what lies between two such layers."""
    known: dict[str, str] = {}
    numbered = _numbered(used)
    for k, path in enumerate(used):
        if path in numbered:
            known[path] = numbered[path]
        elif lengths[path] > 1:
            last = used[k - 1] if k else ""
            follows = last not in numbered and lengths.get(last) == lengths[path]
            known[path] = known[last] if follows else f"stack {k}"
    places: dict[str, list[int]] = {}
    for k, path in enumerate(used):
        places.setdefault(known.get(path, ""), []).append(k)
    places.pop("", None)
    names: dict[str, str] = {}
    for k, path in enumerate(used):
        before: str | None = names[used[k - 1]] if k else None
        around = next((name for name, at in places.items() if at[0] < k < at[-1]), None)
        gap = before if before and before not in places else f"between {k}"
        names[path] = known.get(path) or around or gap
    return names


def _numbered(paths: Sequence[str]) -> dict[str, str]:
    """The outermost module of each path that has a number, and siblings of the same name with other numbers."""
    siblings: dict[tuple[str, str], set[str]] = {}
    modules = {path: list(itertools.accumulate(path.split("/")[:-1], "{}/{}".format)) for path in paths}
    stem = lambda module: (re.sub(r"\d+", "#", module.rpartition("/")[2]), module.rpartition("/")[0])
    for module in {m for found in modules.values() for m in found}:
        siblings.setdefault(stem(module), set()).add(module)
    alike = {m for group in siblings.values() if len(group) > 1 for m in group}
    return {path: next(m for m in found if m in alike) for path, found in modules.items() if alike & set(found)}


def _rate(e: Entry, leaf: Any, where: Mapping[str, Span], role: Role | None, total: int, decay: float) -> Any:
    if role is None or e.path not in where:
        raise ValueError(f"{e.path} trains, but has no role in the model, or is not used: were roles taken of another?")
    first, length = where[e.path]
    each = [decay ** (total - 1 - k) for k in range(first, first + length)]
    if "s" not in role.axes:
        return each[-1]
    axes = _axes(leaf, e.field)
    if (atom := (role.axes.index("s"),)) not in axes:
        raise ValueError(f"{e.key} serves {length} stacked layers at once, so it has no rate of its own in each")
    return np.array(each, np.float32).reshape([-1 if k == axes.index(atom) else 1 for k in range(e.value.ndim)])


def _axes(leaf: Any, field: str) -> tuple[Any, ...]:
    """The axes of a field, as the overlay that holds it labels them."""
    name, *rest = field.split("/")
    return _axes(leaf.base, "/".join(rest)) if name == "base" else leaf.labels().get(name, ())
