"""Choosing leaves by pattern, by name, by role, and saying what a pattern missed."""

import difflib
import re
from typing import Any, Callable, Iterator, Mapping, Sequence, TypeVar

import jax.numpy as jnp

from peftjax.overlay import is_overlay, type_of
from peftjax.paths import flatten
from peftjax.patterns import matches
from peftjax.roles import Role, Roles

T = TypeVar("T")
Targets = str | Sequence[str] | Callable[[str, Role | None], bool]

ALL_LINEAR = "all-linear"
KERNELS = ("linear", "conv", "embedding")


def choose(
    targets: Targets,
    params: Any,
    roles: Roles | None = None,
    exclude: Targets = (),
    taken: Sequence[str] = (),
    kernels: bool = False,
) -> list[str]:
    """The leaves that `targets` names, in tree order.

    Args:
        targets: a regex, fullmatched on a leaf's path or on its module's path; a sequence of names, each of which a
            leaf's path or its module's path equals or ends with, after a "/"; a predicate of the path and its `Role`;
            or "all-linear": every linear and convolution kernel but the output head and `taken`.
        params: the tree.
        roles: what `peftjax.roles` found. Without it, "all-linear" is every leaf of two axes not named an embedding.
        exclude: leaves to leave out, in the same forms; wins over `targets`.
        taken: paths that something else trains already.
        kernels: whether only kernels are wanted: a module's name then stands for its kernel, not for its bias too.

    Returns:
        The paths.

    Raises:
        ValueError: a pattern or a name that matches nothing, or no kernel where `kernels` wants one; nothing is left;
            a leaf that the model never uses, unless `exclude` leaves it out; without roles, "all-linear" of a tree with
            a leaf of more than two axes.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
        >>> params = {"attention": {"query": layer, "value": layer}, "mlp": layer}
        >>> choose(("query", "mlp"), params, exclude=".*bias")
        ['attention/query/kernel', 'mlp/kernel']
        >>> choose(".*(query|value)", params, kernels=True)
        ['attention/query/kernel', 'attention/value/kernel']
    """
    types = {path: type_of(leaf) for path, leaf in flatten(params) if hasattr(leaf, "shape") or is_overlay(leaf)}
    known: Mapping[str, Role] = roles if roles is not None else {}
    able = [path for path in types if not kernels or _may_be_kernel(types[path], known.get(path))]
    if targets == ALL_LINEAR:
        found = {path for path in types if _is_linear(path, types[path], known.get(path))} - set(taken)
    else:
        found = _named(targets, list(types), able, known)
    out = _named(exclude, list(types), list(types), known)
    if targets == ALL_LINEAR and roles is None:
        if wide := [path for path in types if _is_wide(path, types[path]) and path not in out]:
            said = needs_roles(wide[0], types[wide[0]])
            raise ValueError(f"{said}, name 2-axis kernels in `targets`, or `exclude` it")
    left = found - out
    if not left:
        raise ValueError(_nothing(targets, exclude, taken, found, known))
    if idle := [path for path in types if path in left and _is_unused(known.get(path)) and _is_floating(types[path])]:
        raise ValueError(
            f"{', '.join(idle[:3])}: never used by the model, so what would train there could change nothing; `exclude` "
            f"what of targets={targets!r} is not used"
        )
    return [path for path in types if path in left]


def needs_roles(path: str, kind: Any) -> str:
    """What is said of a leaf of so many axes that their number does not tell what they are."""
    return (
        f"{path} has {len(kind.shape)} axes, and only roles can tell inputs from outputs; pass "
        "`roles=peftjax.roles(fn, params, batch)`"
    )


def _is_wide(path: str, kind: Any) -> bool:
    return len(kind.shape) > 2 and _is_floating(kind) and "embed" not in path.rpartition("/")[2]


def _is_linear(path: str, kind: Any, role: Role | None) -> bool:
    if role is None:
        matrix = len(kind.shape) == 2 and _is_floating(kind)
        return matrix and "embed" not in path.rpartition("/")[2]
    return role.op in ("linear", "conv") and not role.head and {"i", "o"} <= set(role.axes)


def _named(targets: Targets, paths: Sequence[str], able: Sequence[str], roles: Mapping[str, Role]) -> set[str]:
    """The able leaves that targets name; each pattern has to name one."""
    if callable(targets):
        return {path for path in able if targets(path, roles.get(path))}
    if targets == ALL_LINEAR:
        raise ValueError(f"exclude={targets!r}: expected a pattern, a sequence of names, or a predicate")
    suffix = not isinstance(targets, str)
    found: set[str] = set()
    for target in (targets,) if isinstance(targets, str) else targets:
        named = [path for path in paths if matches(target, path, suffix)]
        hits = set(named) & set(able)
        if not hits:
            raise ValueError(_no_kernel(target, named, able, roles) if named else _missed(target, paths, suffix))
        found |= hits
    return found


def _missed(target: str, paths: Sequence[str], suffix: bool) -> str:
    kind = "the end of a leaf's path or of its module's path" if suffix else "a regex for the whole of either path"
    said = f"{target!r} matches no leaf; expected {kind}; closest: {', '.join(closest(target, paths)) or 'none'}"
    if not suffix and any(matches(target, path, suffix=True) for path in paths):
        said += f". As a name rather than a regex: ({target!r},), or '.*{target}'"
    return said


def _no_kernel(target: str, named: Sequence[str], able: Sequence[str], roles: Mapping[str, Role]) -> str:
    near = ", ".join(closest(target, able)) or "none"
    unused = all(_is_unused(roles.get(path)) for path in named)
    why = "which the model never uses" if unused else "which is no kernel"
    return f"{target!r} matches {', '.join(named[:3])}, {why}; expected a kernel; closest kernels: {near}"


def _nothing(targets: Any, exclude: Any, taken: Any, found: set[str], roles: Mapping[str, Role]) -> str:
    if found:
        return f"nothing is left of targets={targets!r}: exclude={exclude!r} leaves out {', '.join(sorted(found)[:3])}"
    if targets != ALL_LINEAR:
        return f"targets={targets!r} matches no leaf; expected a predicate that is true of one at least"
    heads = [path for path, role in roles.items() if role.head]
    said = f"the output head {heads[0]}" if heads else "no output head"
    unclear = "".join(f"; in {path}, {role.unclear}" for path, role in roles.items() if role.unclear)
    return f"targets='all-linear' finds no kernel but {said}, embeddings, and {len(taken)} leaves that train already{unclear}"


def closest(target: str, paths: Sequence[str], count: int = 3) -> list[str]:
    """The paths most like a pattern, for an error message.

    Args:
        target: what was looked for; a regex's special characters do not count.
        paths: what there is.
        count: how many at most.

    Returns:
        Some of the paths, the closest first.

    Example:
        >>> closest("qeury", ["layer/query/kernel", "layer/value/kernel"], 1)
        ['layer/query/kernel']
    """
    name = re.sub(r"[^A-Za-z0-9_/]+", "", target.replace(".*", ""))
    ends = {end for path in paths for end in _ends(path)}
    like = {end: difflib.SequenceMatcher(None, name, end).ratio() for end in ends}
    best = {path: max(like[end] for end in _ends(path)) for path in paths}
    return [path for path in sorted(paths, key=lambda path: -best[path]) if best[path] > 0.3][:count]


def _ends(path: str) -> Iterator[str]:
    for whole in (path, path.rpartition("/")[0]):
        parts = whole.split("/")
        yield from ("/".join(parts[k:]) for k in range(len(parts)))


def is_kernel(kind: Any, role: Role | None) -> bool:
    """Whether a leaf is a kernel: by its role, or without one, by having two axes at least.

    Args:
        kind: its type, an array or anything with a shape.
        role: its role, if that is known.

    Returns:
        Whether something multiplies it that way.

    Example:
        >>> import jax.numpy as jnp
        >>> is_kernel(jnp.ones((2, 3)), None), is_kernel(jnp.ones(3), None)
        (True, False)
    """
    return len(kind.shape) >= 2 if role is None else role.op in KERNELS


def _is_unused(role: Role | None) -> bool:
    return role is not None and role.op == "unused"


def _is_floating(kind: Any) -> bool:
    return jnp.issubdtype(kind.dtype, jnp.floating)


def _may_be_kernel(kind: Any, role: Role | None) -> bool:
    """Whether it is a kernel, or would be one to a model that used it."""
    return is_kernel(kind, role) or _is_unused(role) and len(kind.shape) >= 2 and _is_floating(kind)


def check_patterns(patterns: Sequence[str], paths: Sequence[str]) -> None:
    """Raises unless each regex fullmatches the path, or the module's path, of one of these leaves.

    Args:
        patterns: regexes.
        paths: the leaves that may be meant.

    Raises:
        ValueError: one of the patterns matches nothing.

    Example:
        >>> check_patterns([".*query"], ["layer/query/kernel"])
    """
    for pattern in patterns:
        if not any(matches(pattern, path, suffix=False) for path in paths):
            near = ", ".join(closest(pattern, paths) or paths[:3]) or "none"
            raise ValueError(f"{pattern!r} matches none of the {len(paths)} leaves that it may name; closest: {near}")


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first regex that fullmatches a leaf's path or its module's path, else the default.

    Args:
        patterns: regex -> value; the first match wins.
        path: the leaf's path.
        default: the value where none matches.

    Returns:
        The value.

    Example:
        >>> pattern_value({".*query": 16}, "layer/query/kernel", 8)
        16
    """
    return next((value for pattern, value in patterns.items() if matches(pattern, path, suffix=False)), default)
