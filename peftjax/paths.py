"""Names of leaves: the path of a leaf in a tree, as one string."""

from typing import Any, Sequence

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from peftjax.overlay import is_overlay


def _name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name) | SequenceKey(idx=name):
            return str(name)
    return str(key)


def path_of(keys: Sequence[Any]) -> str:
    """The path of a leaf: its keys, indices and attributes, joined by "/".

    The attribute by which a box holds its array (`.value` of `nn.Partitioned` or of an `nnx.Variable`) is left out.

    Args:
        keys: a key path, as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
        A string such as "encoder/layer/0/kernel".

    Example:
        >>> from jax.tree_util import tree_flatten_with_path
        >>> [path_of(keys) for keys, _ in tree_flatten_with_path({"dense": {"kernel": 1.0}, "scales": [2.0]})[0]]
        ['dense/kernel', 'scales/0']
    """
    boxed = bool(keys) and keys[-1] == GetAttrKey("value")
    return "/".join(map(_name, keys[:-1] if boxed else keys))


def flatten(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, in tree order; an overlay is one leaf.

    Args:
        tree: a pytree of arrays and overlays.

    Returns:
        A list of (path, leaf).

    Example:
        >>> flatten({"dense": {"kernel": 1.0, "bias": 0.0}})
        [('dense/bias', 0.0), ('dense/kernel', 1.0)]
    """
    return [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_overlay)[0]]
