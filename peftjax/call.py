"""The arguments of one call of a model: what is traced and what is static."""

import dataclasses
from typing import Any, Sequence

import jax
import numpy as np

from peftjax.overlay import is_overlay
from peftjax.paths import flatten
from peftjax.tree import check_whole, resolve


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, flattened: arrays and overlays apart from what is static."""

    leaves: list[Any]
    tree: Any
    paths: dict[int, str]
    given: list[Any]  # the leaves with their references, which `leaves` have resolved

    @classmethod
    def of(cls, params: Any, args: Any, kwargs: Any) -> "Call":
        check_whole(params)
        leaves, tree = jax.tree.flatten((resolve(params), args, kwargs), is_leaf=is_overlay)
        given = jax.tree.leaves((params, args, kwargs), is_leaf=is_overlay)
        return cls(leaves, tree, {k: path for k, (path, _) in enumerate(flatten(params))}, given)

    @property
    def dynamic(self) -> list[int]:
        """The positions of the leaves that are traced."""
        return [k for k, x in enumerate(self.leaves) if is_overlay(x) or is_array(x)]

    @property
    def static(self) -> Any:
        """What a cached program depends on, beside the types of its arrays."""
        dynamic = set(self.dynamic)
        overlays = tuple(jax.tree.structure(x) for x in self.leaves if is_overlay(x))
        return self.tree, overlays, tuple((k, x) for k, x in enumerate(self.leaves) if k not in dynamic)

    def having(self, values: Sequence[Any]) -> "Call":
        """The same call with these values at the dynamic positions."""
        leaves = list(self.leaves)
        for k, value in zip(self.dynamic, values):
            leaves[k] = value
        return dataclasses.replace(self, leaves=leaves)

    def filled(self, values: Sequence[Any]) -> Any:
        """The call's `(params, args, kwargs)` with these values at the dynamic positions."""
        return jax.tree.unflatten(self.tree, self.having(values).leaves)


def is_array(x: Any) -> bool:
    """Whether x is traced: arrays are; Python numbers, strings and functions are static."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
