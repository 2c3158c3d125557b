"""Where a tuned tree lies on a mesh: the partition of every field of an overlay, from that of its base."""

import math
import warnings
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftjax import compat
from peftjax.flat import near
from peftjax.overlay import Overlay
from peftjax.paths import flatten, path_of
from peftjax.tree import map_leaves, strip

BATCH_AXES = ("data", "fsdp")  # of a mesh: what examples are split over, unless it is said


class Misfit(NamedTuple):
    """A dimension of an array that a mesh does not divide."""

    name: str
    dim: int
    size: int
    axes: Any
    ways: int

    def __str__(self) -> str:
        return f"{self.name}, axis {self.dim} of {self.size}, over {self.axes!r} in {self.ways}"


def specs(tuned: Any, base_specs: Any, mesh: Mesh | None = None) -> Any:
    """The partition of every array of a tuned tree: an axis of a field lies where that axis of its base lies.

    A rank, and every other axis that is the overlay's own, is replicated: so A of a kernel split by columns is whole on
    every device, and B is split as the kernel is.

    Args:
      tuned: a tree with overlays; shapes are enough.
      base_specs: a tree of `PartitionSpec` like `strip(tuned)`, or a prefix of it: one spec may stand for a whole
        subtree. None means replicated.
      mesh: where given, an axis of an array that it does not divide is replicated, as in the fields on a base so split,
        and a warning lists them all.

    Returns:
      `tuned` with a `PartitionSpec` in the place of every array.

    Raises:
      ValueError: a spec has more entries than its array has axes, or names an axis twice, or one that the mesh does not
        have; or the trees differ, and which paths are missing or unknown.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> from jax.sharding import PartitionSpec as P
      >>> tuned = pj.lora(rank=2).init(jax.random.key(0), {"w": jnp.ones((4, 8))})
      >>> made = specs(tuned, {"w": P("data", "model")})["w"]
      >>> tuple(made.base), tuple(made.a), tuple(made.b)
      (('data', 'model'), ('data', None), (None, 'model'))
    """
    named = dict(flatten(_spread(base_specs, strip(tuned))))
    misfits: list[Misfit] = []

    def placed(path: str, leaf: Any) -> Any:
        bottom = leaf.bottom if isinstance(leaf, Overlay) else leaf
        spec = fitted(path, bottom, named[path], mesh, misfits)
        if not isinstance(leaf, Overlay):
            return spec
        return _overlay(leaf, entries_of(spec, bottom), path, mesh, misfits)

    made = map_leaves(placed, tuned)
    tell(misfits, 3)
    return made


def shardings(tuned: Any, mesh: Mesh, base_specs: Any) -> Any:
    """The `NamedSharding` of every array of a tuned tree, for `jax.device_put`, `jax.jit` and checkpoints.

    Args:
      tuned, base_specs: as `specs` reads them.
      mesh: the devices.

    Returns:
      `tuned` with a `NamedSharding` in the place of every array.

    Raises:
      ValueError: as `specs` says.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> from jax.sharding import PartitionSpec as P
      >>> tuned = pj.lora(rank=2).init(jax.random.key(0), {"w": jnp.ones((4, 8))})
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> placed = jax.device_put(tuned, shardings(tuned, mesh, {"w": P(None, "model")}))
      >>> tuple(placed["w"].b.sharding.spec)
      (None, 'model')
    """
    made = specs(tuned, base_specs, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), made, is_leaf=_is_spec)


def placed(overlay: Any) -> Any:
    """The overlay with its own fields laid out as its base is.

    Args:
      overlay: an overlay. On a base that lies on several devices, the axes of its fields take the base's partition; in
        a traced program they do under explicit axes, where the base's type says it. Elsewhere nothing is moved.

    Returns:
      The overlay.
    """
    found = _layout(overlay.bottom) if isinstance(overlay, Overlay) else None
    if found is None:
        return overlay
    mesh, entries, move = found
    put = lambda spec, x: move(x, NamedSharding(mesh, spec))
    wanted = _fields(overlay, entries, "", mesh, [])
    moved = lambda name: jax.tree.map(put, wanted[name], getattr(overlay, name), is_leaf=_is_spec)
    return overlay.replace(**{name: moved(name) for name in wanted})


def _layout(bottom: Any) -> Any:
    """The mesh and the partition of a base, and how to move a field there; None where there is none to follow."""
    if compat.is_traced(bottom):
        spec = compat.explicit_spec(bottom)
        return None if spec is None else (jax.typeof(bottom).sharding.mesh, spec, jax.sharding.reshard)
    sharding = bottom.sharding if isinstance(bottom, jax.Array) else None
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return None
    return sharding.mesh, entries_of(sharding.spec, bottom), jax.device_put


def _overlay(x: Any, entries: tuple[Any, ...], path: str, mesh: Any, misfits: list[Misfit]) -> Any:
    """The overlay with the partition of each of its arrays, and of what it stands on, in their places."""
    if not isinstance(x, Overlay):
        return PartitionSpec(*entries)
    below = _overlay(x.base, entries, f"{path}/base", mesh, misfits)
    return x.replace(base=below, **_fields(x, entries, path, mesh, misfits))


def _fields(x: Overlay, entries: tuple[Any, ...], path: str, mesh: Any, misfits: list[Misfit]) -> dict[str, Any]:
    """The partition of each of an overlay's own arrays, by the name of the field."""
    labels = x.labels()

    def specs_of(name: str) -> Any:
        spec = lambda y: _field(f"{path}/{name}", y, labels.get(name), entries, mesh, misfits)
        return jax.tree.map(spec, getattr(x, name))

    return {name: specs_of(name) for name, kind in x.kinds.items() if kind != "static" and name != "base"}


def _field(where: str, x: Any, axes: Any, entries: tuple[Any, ...], mesh: Any, misfits: list[Misfit]) -> PartitionSpec:
    if axes is None:
        return PartitionSpec()
    if len(axes) != x.ndim:
        raise ValueError(f"{where} has {x.ndim} axes, and its overlay names {len(axes)}: {axes}")
    return fitted(where, x, [entries[a[0]] if isinstance(a, tuple) else None for a in axes], mesh, misfits)


def fitted(
    name: str, x: Any, entries: Sequence[Any] | PartitionSpec, mesh: Any, misfits: list[Misfit]
) -> PartitionSpec:
    """The spec of these entries, one an axis of x; an axis that the mesh does not divide is replicated, and noted."""
    if len(entries) > jnp.ndim(x):
        raise ValueError(
            f"{name}: {entries} has {len(entries)} entries, expected at most {jnp.ndim(x)}, for {jnp.shape(x)}"
        )
    if mesh is not None:
        check_axes(name, entries, mesh)
    kept = list(entries)
    for k, entry in enumerate(entries):
        ways = math.prod(mesh.shape[axis] for axis in axes_of(entry)) if mesh is not None else 1
        if x.shape[k] % ways:
            misfits.append(Misfit(name, k, x.shape[k], entry, ways))
            kept[k] = None
    return PartitionSpec(*kept)


def check_axes(where: str, spec: Sequence[Any] | PartitionSpec, mesh: Any) -> None:
    """Raises where a spec names an axis that the mesh does not have, or one twice."""
    used = [name for entry in spec for name in axes_of(entry)]
    if unknown := [name for name in used if name not in mesh.axis_names]:
        raise ValueError(f"{where}: the mesh has no axis {unknown[0]!r}; expected one of {', '.join(mesh.axis_names)}")
    if twice := [name for k, name in enumerate(used) if name in used[:k]]:
        raise ValueError(f"{where}: {PartitionSpec(*spec)} names the axis {twice[0]!r} twice, expected it once at most")


def tell(misfits: Sequence[Misfit], depth: int) -> None:
    """Warns of what is replicated, as of the caller so many calls above."""
    if misfits:
        said = "; ".join(map(str, misfits))
        warnings.warn(f"replicated, for the mesh does not divide them: {said}", stacklevel=depth)


def axes_of(entry: Any) -> tuple[str, ...]:
    """The axes of a mesh that an entry of a spec names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def entries_of(spec: Any, base: Any) -> tuple[Any, ...]:
    """The entries of a spec, one an axis of its array."""
    return (*spec, *(None,) * (base.ndim - len(spec)))


def _spread(base_specs: Any, base: Any) -> Any:
    """A spec in the place of every array of the base, from a prefix of its tree."""
    whole = jax.tree_util.tree_map_with_path(_whole, base_specs, is_leaf=lambda x: x is None)
    try:
        return jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), whole, base)
    except ValueError as error:
        raise ValueError(
            "the specs do not fit the base, expected one (or None) for every leaf or subtree of it:\n  "
            + "\n  ".join(_strays(whole, base) or [str(error)])
        ) from error


def _whole(where: Any, spec: Any) -> PartitionSpec:
    if spec is not None and not _is_spec(spec):
        raise ValueError(f"the specs hold {spec!r} at {path_of(where)!r}, expected a PartitionSpec (or None)")
    return PartitionSpec() if spec is None else spec


def _strays(whole: Any, base: Any) -> list[str]:
    """The leaves on which no spec stands, and the specs that stand on nothing, a line each."""
    have, paths = ([path for path, _ in flatten(tree)] for tree in (whole, base))
    empty = jax.tree_util.tree_leaves_with_path(base, is_leaf=lambda x: not jax.tree.leaves(x))
    stands = lambda spec, path: path == spec or path.startswith(f"{spec}/")
    lost = [f"missing: {path}" for path in paths if not any(stands(spec, path) for spec in have)]
    strange = [spec for spec in have if not any(stands(spec, path_of(where)) for where, _ in empty)]
    return lost + [f"unknown: {spec} (nearest: {near(spec, paths)})" for spec in strange]


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
