"""Picks: a factor that is one where an entry was chosen, zero elsewhere, and never formed where a lookup serves."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peftjax import compat
from peftjax.factored import Factor, Labels, pair


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["atoms", "shared", "label", "count"])
@dataclasses.dataclass(frozen=True)
class Pick(Factor):
    """The factor `F[v, k] = 1 if array[v] == k else 0`, whose axis k is the inner label `label` of `count` entries.

    An integer of `count` picks nothing.
    """

    label: str = "pick"
    count: int = 0
    lazy = True

    @property
    def labels(self) -> Labels:
        """The axes of the array, and that along which it picks."""
        return (*self.atoms, self.label)

    @property
    def sizes(self) -> dict[Any, int]:
        """The sizes of these axes."""
        return {**super().sizes, self.label: self.count}

    @property
    def touches(self) -> set[Any]:
        """Its axes."""
        return set(self.labels)

    def wide(self) -> Factor:
        """The same: integers have one width."""
        return self

    def whole(self) -> Factor:
        """The factor as an array of zeros and ones."""
        return Factor(jax.nn.one_hot(self.array, self.count, dtype=jnp.float32), self.labels, self.shared)

    def times(self, x: Factor, keep: set[Any], precision: Any) -> Factor:
        """x where the integers point along the label, in the place of that axis."""
        if self.label not in x.atoms or self.label in keep or not set(self.atoms).isdisjoint(x.atoms):
            return pair(x, self.whole(), keep, precision)
        k = x.atoms.index(self.label)
        out = (*x.atoms[:k], *self.atoms, *x.atoms[k + 1 :])
        return Factor(compat.take(x.array, self.array, k, mode="fill", fill_value=0), out)

    def acting(self, x: Factor) -> Factor:
        """Its product with an array that has all of its axes."""
        return self.whole().acting(x)
