"""Where a base model lies on a mesh: by rules over paths, or by what Flax's own metadata say."""

import math
import re
import sys
from typing import Any, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from peftjax.flat import near
from peftjax.paths import flatten, path_of
from peftjax.sharding import BATCH_AXES, Misfit, axes_of, check_axes, fitted, tell

NNX_NAMES = ("out_sharding", "sharding_names", "sharding")  # by age of Flax, the newest first
Rules = Sequence[tuple[str, PartitionSpec] | list[Any]]


def make_mesh(axes: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from its axes in words, such as "data:2,fsdp:2,model:2".

    Args:
      axes: names and sizes; one size may be -1, for all devices that are left.
      devices: by default all that JAX has.

    Returns:
      The mesh, its axes Auto: the compiler chooses where results lie.

    Raises:
      ValueError: words that are no axes, a name twice, sizes that are none, or that do not multiply to the number of
        devices.

    Example:
      >>> dict(make_mesh("data:-1,model:1", jax.devices()[:1]).shape)
      {'data': 1, 'model': 1}
    """
    found = np.asarray(jax.devices() if devices is None else devices)
    pairs = re.findall(r"([A-Za-z_]\w*):(-?\d+)", axes)
    if not pairs or ",".join(f"{name}:{size}" for name, size in pairs) != axes.replace(" ", ""):
        raise ValueError(f"mesh {axes!r}: expected names and sizes, as in 'data:2,model:4'")
    names, sizes = [name for name, _ in pairs], [int(size) for _, size in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"mesh {axes!r} names an axis twice")
    if sizes.count(-1) > 1 or any(size < 1 for size in sizes if size != -1):
        raise ValueError(f"mesh {axes!r}: expected sizes of 1 or more, of which one may be -1, for what is left")
    if -1 in sizes:
        known = -math.prod(sizes)
        if found.size % known:
            raise ValueError(f"mesh {axes!r}: {known} does not divide {found.size}, the number of devices")
        sizes[sizes.index(-1)] = found.size // known
    if math.prod(sizes) != found.size:
        raise ValueError(
            f"mesh {axes!r}: the sizes multiply to {math.prod(sizes)}, expected {found.size}, the number of devices"
        )
    return Mesh(found.reshape(sizes), names)


def by_rules(rules: Rules, params: Any, mesh: Mesh) -> Any:
    """The partition of every leaf of a base model, from rules over paths.

    Args:
      rules: pairs of a regex, fullmatched on a leaf's path, and a `PartitionSpec`, or its entries in a list as JSON has
        them; the first that matches wins. A leaf that none matches is replicated.
      params: the base's tree; shapes are enough.
      mesh: the devices. An axis of a leaf that it does not divide is replicated, and a warning lists them all.

    Returns:
      A tree of `PartitionSpec`, for `peftjax.train_state`.

    Raises:
      ValueError: a rule that is no such pair, or wins no leaf; a spec of more entries than its leaf has axes, of an
        axis twice, or of one that the mesh does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = make_mesh("model:1", jax.devices()[:1])
      >>> specs = by_rules([("w", PartitionSpec(None, "model"))], {"w": jnp.ones((2, 4)), "b": jnp.ones(4)}, mesh)
      >>> tuple(specs["w"]), tuple(specs["b"])
      ((None, 'model'), ())
    """
    pairs = [_pair(rule) for rule in rules]
    for pattern, spec in pairs:
        check_axes(f"rule {pattern!r}", spec, mesh)
    paths = [path for path, _ in flatten(params)]
    won = {path: next((k for k, rule in enumerate(pairs) if re.fullmatch(rule[0], path)), None) for path in paths}
    if idle := [pattern for k, (pattern, _) in enumerate(pairs) if k not in won.values()]:
        raise ValueError(f"these rules win no leaf: {', '.join(_idle(pattern, paths) for pattern in idle)}")
    spec_of = {path: PartitionSpec() if k is None else pairs[k][1] for path, k in won.items()}
    return _fitting([spec_of[path] for path in paths], params, mesh)


def _pair(rule: Any) -> tuple[str, PartitionSpec]:
    """The two parts of a rule."""
    is_pair = isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)
    if not is_pair or not isinstance(rule[1], (PartitionSpec, tuple, list)):
        raise ValueError(
            f"rule {rule!r}: expected a pair of a regex and a spec, such as ('.*/kernel', PartitionSpec(None, 'model'))"
        )
    try:
        re.compile(rule[0])
    except re.error as error:
        raise ValueError(f"rule {rule[0]!r}: expected a regex, such as '.*/kernel' ({error})") from error
    return rule[0], PartitionSpec(*(tuple(entry) if isinstance(entry, list) else entry for entry in rule[1]))


def _idle(pattern: str, paths: Sequence[str]) -> str:
    """A rule that wins no leaf, and why."""
    if (taken := next((path for path in paths if re.fullmatch(pattern, path)), None)) is not None:
        return f"{pattern!r} (one before it took {taken})"
    return f"{pattern!r} (nearest: {near(pattern, paths)})"


def within(rules: Rules, mesh: Mesh, batch_axes: Sequence[str] = BATCH_AXES) -> Rules:
    """The rules with only the axes that a mesh has, so that one page of rules serves every mesh.

    Args:
      rules: as `by_rules` has them.
      mesh: the devices.
      batch_axes: the axes over which examples are split, as `peftjax.make_train_step` has them.

    Raises:
      ValueError: a rule that is no pair, or an axis of the mesh, of more than one device, that splits neither weights
        nor examples.

    Example:
      >>> mesh = make_mesh("data:1", jax.devices()[:1])
      >>> [tuple(spec) for _, spec in within([("w", PartitionSpec("data", "model"))], mesh)]
      [('data', None)]
    """
    pairs = [_pair(rule) for rule in rules]
    used = {*batch_axes, *(name for _, spec in pairs for entry in spec for name in axes_of(entry))}
    if idle := [name for name, size in mesh.shape.items() if size > 1 and name not in used]:
        raise ValueError(
            f"nothing is split over the axis {idle[0]!r} of the mesh ({', '.join(mesh.axis_names)}): its devices would all do "
            f"the same; expected axes among {', '.join(sorted(used))}"
        )

    def kept(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(name for name in entry if name in mesh.axis_names) or None
        return entry if entry in mesh.axis_names else None

    return [(pattern, PartitionSpec(*map(kept, spec))) for pattern, spec in pairs]


def by_metadata(params: Any, mesh: Mesh, axes: Mapping[str, Any] | None = None) -> Any:
    """The partition of every leaf of a base model, from its own metadata: `nn.Partitioned` boxes, NNX variables.

    Args:
      params: the base's tree, with its boxes.
      mesh: as in `by_rules`.
      axes: what the model's names of axes are on the mesh, as `{"embed": "fsdp", "mlp": "model"}`; names that are axes
        of the mesh need no entry.

    Returns:
      A tree of `PartitionSpec` in the place of arrays, for `peftjax.train_state`.

    Raises:
      ValueError: no leaf has metadata, or a name that is no axis of the mesh, and has no entry in `axes`.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> mesh = make_mesh("model:1", jax.devices()[:1])
      >>> specs = by_metadata({"w": nn.Partitioned(jnp.ones((2, 4)), (None, "mlp"))}, mesh, {"mlp": "model"})
      >>> tuple(specs["w"].value)
      (None, 'model')
    """
    boxes = jax.tree.leaves(params, is_leaf=_is_box)
    if not any(map(_is_box, boxes)):
        raise ValueError("no leaf says where it lies: expected `nn.Partitioned` boxes, or NNX variables with metadata")
    said = lambda x: PartitionSpec(*(_named(name, mesh, axes or {}) for name in _names(x)))
    return _fitting([said(x) for x in boxes for _ in jax.tree.leaves(x)], params, mesh)


def _is_box(x: Any) -> bool:
    return hasattr(x, "get_partition_spec") or (_nnx() is not None and isinstance(x, _nnx().Variable))


def _nnx() -> Any:
    """Flax's NNX where it has been imported: only then may a tree hold its variables."""
    return getattr(sys.modules.get("flax"), "nnx", None)


def _names(x: Any) -> tuple[Any, ...]:
    if not _is_box(x):
        return ()
    if not hasattr(x, "get_metadata"):
        return tuple(x.names)
    metadata = x.get_metadata()
    return tuple(next((metadata[name] for name in NNX_NAMES if metadata.get(name)), ()))


def _named(name: Any, mesh: Mesh, axes: Mapping[str, Any]) -> Any:
    if isinstance(name, (tuple, list)):
        return tuple(_named(n, mesh, axes) for n in name)
    if name is None or name in axes:
        return axes.get(name) if name is not None else None
    if name in mesh.axis_names:
        return name
    raise ValueError(
        f"the model names an axis {name!r}, which the mesh ({', '.join(mesh.axis_names)}) does not have; give it one "
        f"with axes={{{name!r}: ...}}, or None to replicate it"
    )


def _fitting(specs: Sequence[PartitionSpec], params: Any, mesh: Mesh) -> Any:
    """The specs in the place of arrays, as far as the mesh divides these."""
    misfits: list[Misfit] = []
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    made = []
    for (where, x), spec in zip(leaves, specs, strict=True):
        path = path_of(where)
        made.append(fitted(path, x, spec, mesh, misfits))
    tell(misfits, 4)
    return jax.tree.unflatten(tree, made)
