"""Trained copies: an overlay that stands for its own array, and methods that put it on leaves."""

import functools
from typing import Any, Callable, Collection

import jax
import jax.numpy as jnp

from peftjax.factored import Term, wide_dtype
from peftjax.method import Leaf, Method, per_leaf
from peftjax.overlay import Output, Overlay, Table, atoms, frozen, layers, overlay, static, trained, type_of
from peftjax.paths import flatten
from peftjax.roles import Roles
from peftjax.switches import still
from peftjax.targets import Targets


@overlay
class Full(Overlay):
    """A trained copy: `scale value + (1 - scale) W`, which is the copy while the scale is 1."""

    base: Any = frozen()
    value: Any = trained()
    scale: Any = frozen()
    axes: str = static()
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The copy has the base's axes; the scale the stacked ones."""
        return {"value": tuple((k,) for k in range(len(self.axes))), "scale": atoms(self.axes, "sb")}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The copy alone, in the base's dtype."""
        base = still(self.base)
        scale = self.scale.reshape([n if x in "sb" else 1 for n, x in zip(self.value.shape, self.axes)])
        mixed = scale * self.value + (1 - scale) * base.astype(self.value.dtype)
        return (Term(dense=mixed.astype(base.dtype)),)


def copied(leaf: Leaf, name: str = "unfreeze") -> Any:
    """The leaf with a trained copy on it; one that trains itself already, as it is."""
    below = [x for x in layers(leaf.value) if not isinstance(x, (Output, Table))]
    if below and isinstance(below[0], Full) and below[0].trained_fields:
        return leaf.value
    if any(x.trained_fields for x in below):
        raise ValueError(
            f"{name}: {leaf.path} already holds {leaf.value!r}, which would train and act no more; `peftjax.lock` the "
            "tree to start from what it makes, or leave the leaf out with `exclude`"
        )
    if not all(x.merges for x in below):
        raise ValueError(f"{name}: {leaf.path} holds {leaf.value!r}, for which no array can stand; exclude the leaf")
    # A view of the buffer would die with it when a train step donates the trainable tree.
    return Full(
        base=leaf.value,
        value=jnp.array(leaf.dense, wide_dtype(leaf.type.dtype), copy=True),
        scale=jnp.ones(leaf.sizes("sb"), jnp.float32),
        axes=leaf.axes,
    )


def trained_leaves(name: str, find: Callable[[Any, Any], Collection[str]], exclude: Targets = ()) -> Method:
    """Trains the leaves that `find(params, roles)` names; those that cannot, or that the model never uses, stay out."""

    def start(key: jax.Array, params: Any, roles: Roles | None) -> Any:
        kinds = {path: getattr(type_of(x), "dtype", jnp.int32) for path, x in flatten(params)}
        used = lambda path: roles is None or path not in roles or roles[path].op != "unused"
        wanted = {p for p in find(params, roles) if jnp.issubdtype(kinds[p], jnp.floating) and used(p)}
        if not wanted:
            raise ValueError(f"{name}: of the leaves that it names, the model uses none of floating point")
        make = functools.partial(copied, name=name)
        return per_leaf(make, lambda path, _: path in wanted, exclude).init(key, params, roles)

    return Method(name="", options={}, start=start)
