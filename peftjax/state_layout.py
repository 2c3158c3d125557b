"""Where the arrays of a train state lie."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from peftjax.overlay import is_key


def abstract(x: Any) -> bool:
    """Whether x is a type without values."""
    return isinstance(x, jax.ShapeDtypeStruct)


def on(mesh: Mesh, x: Any) -> bool:
    """Whether x, an array or an abstract one, lies on the devices of a mesh."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return False
    return sharding.mesh is mesh or sharding.mesh.devices.tolist() == mesh.devices.tolist()


def put(x: Any, sharding: NamedSharding) -> Any:
    """x laid out as a sharding says: each process gives the parts that its devices hold."""
    if abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    if is_key(x):
        data = np.asarray(jax.random.key_data(x))
        key = jax.make_array_from_callback(data.shape, sharding, lambda part: data[part])
        return jax.random.wrap_key_data(key, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def like_trainable(opt_state: Any, trainable: Any, other: NamedSharding) -> Any:
    """For every array of an optimizer's state, the sharding of the parameter that it belongs to.

    It belongs to one whose path ends its own, and whose shape it has: moments do. The rest, as counts, lies as `other`.
    """
    found = {tuple(path): x for path, x in jax.tree_util.tree_leaves_with_path(trainable)}

    def lies(path: Any, x: Any) -> Any:
        ends = (found.get(tuple(path[k:])) for k in range(len(path)))
        owner = next((y for y in ends if y is not None), None)
        return other if owner is None or owner.shape != x.shape else owner.sharding

    return jax.tree_util.tree_map_with_path(lies, opt_state)
