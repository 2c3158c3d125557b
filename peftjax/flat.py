"""What trains as a flat dictionary, and back, strictly."""

from typing import Any, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import compat
from peftjax.targets import closest
from peftjax.tree import entries


def extract(tuned: Any) -> dict[str, Any]:
    """Names what trains.

    Args:
      tuned: a tree with overlays.

    Returns:
      {"path/field": array}. Of two overlays on one leaf, the outer's fields are `path/field`, the inner's
      `path/base/field`. An array that others refer to is there once. Nothing is copied.

    Raises:
      ValueError: two leaves share a path.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.extract(tuned)
      {'b/value': Array([1., 1.], dtype=float32)}
    """
    return unique((e.key, e.value) for e in entries(tuned) if e.trains)


def insert(tuned: Any, flat: Mapping[str, Any]) -> Any:
    """Puts named arrays in the place of what trains: the inverse of `extract`, and strict.

    Args:
      tuned: a tree with overlays.
      flat: an array for every name that `extract(tuned)` has, of its shape and dtype. NumPy arrays are copied to where
          the old arrays lie.

    Returns:
      The tree with new values.

    Raises:
      ValueError: lists every missing, unknown, misshapen, or not finite entry, and every other dtype.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.extract(pj.insert(tuned, {"b/value": jnp.zeros(2)}))
      {'b/value': Array([0., 0.], dtype=float32)}
    """
    keys = [e.key for e in entries(tuned) if e.trains]
    if not isinstance(flat, Mapping):
        first = next(iter(keys), "path/field")
        raise ValueError(
            f"expected a dictionary as `extract` makes it, {{{first!r}: array, ...}}, found {type(flat).__name__}; the two "
            "parts of `partition` are put together by `combine(trainable, frozen)`"
        )
    return replaced(tuned, set(keys), flat)


def replaced(tuned: Any, keys: set[str], flat: Mapping[str, Any]) -> Any:
    """The tree with the arrays of `flat`, which has these keys and no others, in the place of those it has."""
    old = entries(tuned)
    faults = misfits(unique((e.key, e.value) for e in old if e.key in keys), flat)
    if faults:
        raise ValueError("the entries do not fit this tree:\n  " + "\n  ".join(faults))
    values = [_placed(flat[e.key], e.value) if e.key in keys else e.value for e in old]
    return jax.tree.unflatten(jax.tree.structure(tuned), values)


def misfits(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is wrong with arrays that should have these names, shapes and dtypes, a line each."""
    faults = [f"missing: {key}" for key in expected if key not in found]
    faults += [f"unknown: {key} (nearest: {near(key, expected)})" for key in found if key not in expected]
    both = [key for key in expected if key in found]
    for key in both:
        is_, should = found[key], expected[key]
        if not hasattr(is_, "dtype"):
            faults.append(f"not an array: {key} is a {type(is_).__name__}")
        elif is_.shape != should.shape:
            faults.append(f"shape: {key} is {tuple(is_.shape)}, expected {tuple(should.shape)}")
        elif is_.dtype != should.dtype:
            faults.append(f"dtype: {key} is {is_.dtype}, expected {should.dtype}")
    return faults + [f"not finite: {key}" for key in not_finite((key, found[key]) for key in both)]


def not_finite(named: Iterable[tuple[str, Any]]) -> list[str]:
    """The names of the arrays that hold a NaN or an infinity; arrays that have no value yet are passed over."""
    known = [(k, x) for k, x in named if isinstance(x, (jax.Array, np.ndarray)) and not compat.is_traced(x)]
    with jax.ensure_compile_time_eval():
        flags = {k: _finite(x) for k, x in known if jnp.issubdtype(x.dtype, jnp.inexact)}
        return [k for k, fine in jax.device_get(flags).items() if not fine]


def _finite(x: jax.Array | np.ndarray) -> Any:
    """Whether all of an array is finite, asked where the array lies: a file's is not sent to a device for it."""
    return np.isfinite(x).all() if isinstance(x, np.ndarray) else _finite_on_devices(x)


@jax.jit
def _finite_on_devices(x: Any) -> Any:
    return jnp.isfinite(x).all()


def near(name: str, names: Iterable[str]) -> str:
    """The closest names, for an error message."""
    return ", ".join(closest(name, list(names))) or "none"


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of these pairs, whose names must differ."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"two arrays of this tree have the path {key!r}: rename one of the keys that hold a '/'")
        made[key] = value
    return made


def _placed(new: Any, old: Any) -> Any:
    if isinstance(new, jax.Array):
        return new
    named = isinstance(old, jax.Array) and isinstance(old.sharding, jax.sharding.NamedSharding)
    return jax.device_put(np.array(new), old.sharding if named else None)
