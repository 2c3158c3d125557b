"""Turns: linear maps of a weight's features among themselves, block by block."""

import dataclasses
import math
from functools import partial
from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peftjax import compat
from peftjax.factored import Factor, Labels, pair
from peftjax.views import Drop, Edit, Split

BLOCK, ROW, COLUMN = "block", "row", "column"


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["atoms", "shared", "along"])
@dataclasses.dataclass(frozen=True)
class Turn(Factor):
    """A factor that mixes entries: `W'[n, i] = sum_j M[n, i, j] W[n, j]`, the axes `along` flattened in their order.

    The array M is (..., blocks, size, size), or (..., size, size) where all blocks share one map. It acts on what stands
    before it among a term's factors, and does not change places with others along its axes.
    """

    along: Labels = ()

    @property
    def touches(self) -> set[Any]:
        """The operator's axes that it has, or mixes."""
        return {a for a in self.atoms if a not in (BLOCK, ROW, COLUMN)} | set(self.along)

    def follows(self, edit: Edit) -> bool:
        """Whether the map is still one of this kind after the operator's axes moved."""
        return edit.atom not in self.along or isinstance(edit, (Split, Drop))

    def edited(self, edit: Edit, operands: Sequence[Any]) -> Factor:
        """The map after the operator's axes moved: parts of an axis stand in its place."""
        if edit.atom not in self.along:
            return super().edited(edit, operands)
        k, parts = self.along.index(edit.atom), edit.parts if isinstance(edit, Split) else ()
        return dataclasses.replace(self, along=(*self.along[:k], *parts, *self.along[k + 1 :]))

    def backward(self) -> Factor:
        """The map that acts on what a weight reads, where this one acts on the weight: its transpose."""
        swap = {ROW: COLUMN, COLUMN: ROW}
        return self.having(self.array, tuple(swap[a] if a in (ROW, COLUMN) else a for a in self.atoms))

    def acting(self, x: Factor) -> Factor:
        """The map of an array that has the axes `along`, which keeps its axes in their order."""
        sizes = dict(zip(x.atoms, x.array.shape))
        stacked = tuple(a for a in self.atoms if a not in (BLOCK, ROW, COLUMN))
        rest = tuple(a for a in x.atoms if a not in self.along)
        # Where the axes stand before all others, the map is multiplied from the left: nothing is transposed.
        others = tuple(a for a in rest if a not in stacked)
        left = bool(others) and x.atoms == (*stacked, *self.along, *others)
        lead, tail = (stacked, others) if left else (rest, ())
        size = self.array.shape[self.atoms.index(ROW)]
        last = lax.transpose(x.array, [x.atoms.index(a) for a in (*lead, *self.along, *tail)])
        shape = (*(sizes[a] for a in lead), -1, size, *(sizes[a] for a in tail))
        blocks = Factor(compat.whole(last, len(lead), len(self.along)).reshape(shape), (*lead, BLOCK, COLUMN, *tail))
        lead = tuple(dict.fromkeys((*lead, *stacked)))
        labels = (*lead, BLOCK, ROW, *tail)
        both = (self._for_each(blocks), blocks) if left else (blocks, self)
        y = pair(*both, set(labels), lax.Precision.HIGHEST)
        sizes |= dict(zip(y.atoms, y.array.shape))
        order = (*lead, *self.along, *tail)
        flat = lax.transpose(y.array, [y.atoms.index(a) for a in labels]).reshape([sizes[a] for a in order])
        kept = (*(a for a in order if a not in x.atoms), *x.atoms)
        return Factor(lax.transpose(flat, [order.index(a) for a in kept]), kept)

    def _for_each(self, blocks: Factor) -> Factor:
        """The map with an axis of blocks, also where they share it."""
        if BLOCK in self.atoms:
            return self
        number, k = blocks.array.shape[blocks.atoms.index(BLOCK)], self.atoms.index(ROW)
        array = jnp.repeat(jnp.expand_dims(self.array, k), number, k)
        return self.having(array, (*self.atoms[:k], BLOCK, *self.atoms[k:]))


def skew(upper: Any) -> Any:
    """Skew-symmetric matrices (..., n, n) from upper triangles (..., n (n - 1) / 2), row by row."""
    n = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2
    rows, columns = np.triu_indices(n, 1)
    half = jnp.zeros((*upper.shape[:-1], n, n), upper.dtype).at[..., rows, columns].set(upper)
    return half - jnp.swapaxes(half, -1, -2)


def identity(like: Any) -> Any:
    """Identity matrices of this shape."""
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def cayley(q: Any, terms: int | None = None) -> Any:
    """The orthogonal matrices `(I + Q)^-1 (I - Q)`; or those of -Q by this many terms of the series."""
    one = identity(q)
    if terms is None:
        return jnp.linalg.solve(one + q, one - q)
    power, total = q, one + (1 if terms == 2 else 2) * q
    for k in range(2, terms):
        power = jnp.matmul(power, q, precision=lax.Precision.HIGHEST)
        total = total + (1 if k == terms - 1 else 2) * power
    return total
