"""A batch in parts, of which each device holds its share."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from peftjax import compat


def split(batch: Any, parts: int) -> Any:
    """Cuts the examples (axis 0) of every array into parts: (n, ...) becomes (parts, n / parts, ...).

    Part k holds the examples k, k + parts, k + 2 parts...: every device keeps the examples that it has, for the first
    factor of an axis is the one that a mesh splits. Arrays without axes are repeated.
    """
    return jax.tree.map(lambda x: _parts(x, parts), batch)


def _parts(x: Any, parts: int) -> Any:
    if not x.ndim:
        return jax.lax.broadcast(x, (parts,))
    spec = compat.explicit_spec(x)
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    lies = None
    if spec is not None:
        lies = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(spec[0], None, *spec[1:]))
    return jax.lax.reshape(x, shape, out_sharding=lies).swapaxes(0, 1)
