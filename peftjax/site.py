"""Where an output overlay fires, and how its function sees the layer's output there."""

import dataclasses
from typing import Any

import jax
from jax import lax

from peftjax.factored import Factor
from peftjax.hooked import Carried


@dataclasses.dataclass(frozen=True)
class Site:
    """Where an output overlay fires: its leaf's path, the output's feature axes, the equation's name.

    `batch` pairs the output's axes of experts with the leaf's: each expert has its own part of the overlay. `atoms` are
    the leaf's axes that the features are, in the output's order: a field that has them gets them in this order, joined.
    Under `wrap_tokens`, `sequence` is the output's axis of tokens, and `span` says which of them are virtual.
    """

    path: str
    features: tuple[int, ...]
    batch: tuple[tuple[int, Any], ...]
    primitive: str
    scope: str
    atoms: tuple[Any, ...] = ()
    sequence: int | None = None
    span: Any = None

    def along(self, y: Any) -> int:
        """The axis of tokens in what `on_output` and `on_residual` see; only where `sequence` is known."""
        assert self.sequence is not None
        batch = [k for k, _ in self.batch]
        whole = range(y.ndim - 1 + len(self.features) + len(batch))
        return [k for k in whole if k not in (*self.features, *batch)].index(self.sequence)

    def flat(self, y: Any) -> Any:
        """y with its feature axes flattened into one last axis."""
        rest = [k for k in range(y.ndim) if k not in self.features]
        return lax.transpose(y, (*rest, *self.features)).reshape([y.shape[k] for k in rest] + [-1])

    def back(self, flat: Any, like: Any) -> Any:
        """The inverse of `flat`, in the dtype of the array it came from."""
        rest = [k for k in range(like.ndim) if k not in self.features]
        order = (*rest, *self.features)
        y = flat.reshape([like.shape[k] for k in order])
        return lax.transpose(y, [order.index(k) for k in range(like.ndim)]).astype(like.dtype)

    def joined(self, field: Factor) -> Factor:
        """A field whose axes of the layer's features are one axis, where the first of them was."""
        own = [k for k, a in enumerate(field.atoms) if a in self.atoms]
        if len(own) < 2:
            return field
        own.sort(key=lambda k: self.atoms.index(field.atoms[k]))
        at = min(own)
        rest = [k for k in range(len(field.atoms)) if k not in own]
        shape = [*(field.array.shape[k] for k in rest if k < at), -1, *(field.array.shape[k] for k in rest if k > at)]
        array = lax.transpose(field.array, [*(k for k in rest if k < at), *own, *(k for k in rest if k > at)])
        atoms = [*(field.atoms[k] for k in rest if k < at), "features", *(field.atoms[k] for k in rest if k > at)]
        return Factor(array.reshape(shape), tuple(atoms))

    def call(self, carried: Carried, name: str, *ys: Any) -> Any:
        """The overlay's function of these outputs, each expert by itself."""
        rest = [k for k in range(ys[0].ndim) if k not in self.features]
        joined = {n: self.joined(f) for n, f in carried.fields.items()}
        fields = {n: f.array for n, f in joined.items()}
        axes = {n: list(f.atoms) for n, f in joined.items()}
        run = lambda fields, *ys: getattr(carried.owner.replace(**fields), name)(*ys, self)
        for position, atom in sorted(self.batch, reverse=True):
            at = {n: a.index(atom) if atom in a else None for n, a in axes.items()}
            where = rest.index(position)
            run = jax.vmap(run, in_axes=(at, *(where for _ in ys)), out_axes=where)
            axes = {n: [x for x in a if x != atom] for n, a in axes.items()}
        return self.back(run(fields, *map(self.flat, ys)), ys[0])
