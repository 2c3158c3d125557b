"""The only file that knows which jax is running."""

import contextlib
from typing import Any, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def type_of(x: Any) -> Any:
    """The full type of an array: shape, dtype, weak type, sharding and varying axes."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


def is_traced(x: Any) -> bool:
    """Whether x is a tracer of some transformation."""
    return isinstance(x, jax.core.Tracer)


def single(eqn: Any, operands: Sequence[Any], debug_info: Any, named: bool = True) -> list[Any]:
    """Runs one equation on plain operands, as JAX itself would; under its own name stack, or (not `named`) none."""
    if not named:
        info = eqn.source_info
        eqn = eqn.replace(source_info=info.replace(name_stack=type(info.name_stack)()))
    seen = {v: x for v, x in zip(eqn.invars, operands) if not isinstance(v, jex.Literal)}
    parts = dict(constvars=[], invars=list(seen), outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects)
    jaxpr = jex.Jaxpr(**parts, debug_info=debug_info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*seen.values())


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carries."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry = params["ft_in"].unpack()[:2]
    return len(consts), len(carry)


@contextlib.contextmanager
def scope(eqn: Any) -> Iterator[None]:
    """The equation's name stack, for operations that a rule puts in its place."""
    name = str(eqn.source_info.name_stack)
    with jax.named_scope(name) if name else contextlib.nullcontext():
        yield


def is_symbolic_zero(tangent: Any) -> bool:
    """Whether a custom derivative rule was handed a tangent that is zero by construction."""
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def is_unspecified(sharding: Any) -> bool:
    """Whether a jit region leaves this sharding to the compiler."""
    return not isinstance(sharding, jax.sharding.Sharding)


def explicit_spec(x: Any) -> Any:
    """The partition of x's dimensions, where its mesh has explicit axes, else None."""
    sharding: Any = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return tuple(sharding.spec) + (None,) * (jnp.ndim(x) - len(sharding.spec))


def is_spread(x: Any) -> bool:
    """Whether x lies on a mesh of several devices, whatever its partition there, which only explicit axes tell."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    sizes = () if mesh is None or mesh.empty else zip(mesh.axis_types, mesh.shape.values())
    return any(n > 1 for kind, n in sizes if kind is not AxisType.Manual)


def product_sharding(x: Any, w: Any, xs: Sequence[Any], ws: Sequence[Any], out: Sequence[Any]) -> Any:
    """Under explicit axes: where each axis of a product lies, from its operands' axes; None elsewhere."""
    specs = [(x, xs, explicit_spec(x)), (w, ws, explicit_spec(w))]
    if all(spec is None for _, _, spec in specs):
        return None
    where: dict[Any, Any] = {}
    for _, labels, spec in reversed(specs):
        where.update({a: s for a, s in zip(labels, spec or ()) if s is not None})
    used: set[str] = set()
    entries = [_unused(where.get(a), used) for a in out]
    mesh = next(jax.typeof(v).sharding.mesh for v, _, spec in specs if spec is not None)
    return NamedSharding(mesh, PartitionSpec(*entries))


def _unused(entry: Any, used: set[str]) -> Any:
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    if not names or used & set(names):
        return None
    used.update(names)
    return entry


def joins_rows(x: Any) -> bool:
    """Whether to join the axes of rows of a product: XLA on CPU then reads the gradient's operands as they lie.

    Elsewhere nothing is gained, and joining two sharded axes would cost a gather.
    """
    return jax.default_backend() == "cpu" and explicit_spec(x) is None


def take(x: Any, at: Any, axis: int, **options: Any) -> Any:
    """x where integers point along an axis, in whose place their axes stand; all lies as it did, under explicit axes."""
    xs, new = list(range(jnp.ndim(x))), [("at", k) for k in range(jnp.ndim(at))]
    lies = product_sharding(x, at, [*xs[:axis], "gone", *xs[axis + 1 :]], new, [*xs[:axis], *new, *xs[axis + 1 :]])
    return x.at[(*(slice(None),) * axis, at)].get(out_sharding=lies, **options)


def beside(x: Any, base: Any, axes: Sequence[int]) -> Any:
    """x, whose dimensions are these axes of a base, laid out as they are, where the mesh has explicit axes."""
    spec = explicit_spec(base)
    if spec is None:
        return x
    return jax.sharding.reshard(
        x, NamedSharding(jax.typeof(base).sharding.mesh, PartitionSpec(*(spec[k] for k in axes)))
    )


def like(y: Any, kind: Any) -> Any:
    """y laid out as a type with explicit axes says; y itself elsewhere."""
    if explicit_spec(y) is None or kind.sharding.mesh.empty or jax.typeof(y).sharding == kind.sharding:
        return y
    return jax.sharding.reshard(y, kind.sharding)


def agreed(told: Any, x: Any) -> Any:
    """told where all devices say so over which x, inside `shard_map`, is the same; told itself elsewhere."""
    names = _varying(told) - _varying(x)
    return lax.pmin(told.astype(jnp.int32), tuple(sorted(names))).astype(bool) if names else told


def _varying(x: Any) -> frozenset[str]:
    kind: Any = jax.typeof(x)
    return frozenset(kind.manual_axis_type.varying) if hasattr(kind, "manual_axis_type") else kind.vma


def whole(x: Any, start: int, count: int) -> Any:
    """x with `count` dimensions from `start` on whole on every device, where its mesh has explicit axes; else x."""
    spec = explicit_spec(x)
    if spec is None or not any(spec[start : start + count]):
        return x
    entries = (*spec[:start], *(None,) * count, *spec[start + count :])
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*entries)))


def gathered(x: Any) -> Any:
    """x whole on every device, where its mesh has explicit axes (a decomposition refuses a matrix in parts); else x."""
    return whole(x, 0, jnp.ndim(x))
