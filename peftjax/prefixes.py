"""Virtual tokens in attention: overlays that overwrite what projections put out at the virtual positions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax import compat
from peftjax.overlay import Output, atoms, frozen, overlay, static, trained, type_of

Ranges = tuple[tuple[int, int], ...] | None


@overlay
class AtPositions(Output):
    """What overlays share that overwrite their layer's output at the virtual positions, in some or all of its features."""

    base: Any = frozen()
    axes: str = static()
    length: int = static()
    features: Ranges = static(default=None)
    kernel: str | None = static(default=None)
    where: str = static(default="output")
    locked: tuple[str, ...] = static(default=())

    @property
    def virtual(self) -> int:  # type: ignore[override]
        """A virtual token a row."""
        return self.length

    def summary(self) -> str:
        """Its length."""
        return f"length={self.length}"


@overlay
class Written(AtPositions):
    """Overwrites its layer's output at the virtual positions with `rows`, in the features where `on` is true."""

    rows: Any = frozen()
    on: Any = frozen(default=None)
    name: str = static()

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The rows have the output axes of the leaf, so a view that cuts or moves those does the same to the rows."""
        out = atoms(self.axes, "o")
        return {"rows": (*atoms(self.axes, "sb"), "rows", *out), "on": out}

    def on_output(self, y: Any, site: Any) -> Any:
        """y, and `rows` at the virtual positions."""
        axis, size, start = site.along(y), site.span.length, site.span.prefix_start
        shape = [size if k == axis else y.shape[-1] if k == y.ndim - 1 else 1 for k in range(y.ndim)]
        rows = lax.pad(
            self.rows.astype(y.dtype), jnp.zeros((), y.dtype), [(start, size - start - self.length, 0), (0, 0, 0)]
        )
        at = jnp.arange(size)
        virtual = ((at >= start) & (at < start + self.length))[:, None]
        virtual = jnp.broadcast_to(virtual if self.on is None else virtual & self.on[None], rows.shape)
        spread = lambda x: compat.like(jnp.broadcast_to(x.reshape(shape), y.shape), jax.typeof(y))
        return jnp.where(spread(virtual), spread(rows), y)


@overlay
class Prefix(AtPositions):
    """`scale P` in the place of the layer's output at the virtual positions; P is (stacked..., n, features...)."""

    prefix: Any = trained()
    scale: Any = frozen()

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """P has the leaf's stacked axes and its outputs, or only some of these, joined."""
        out = ("features",) if self.features else atoms(self.axes, "o")
        return {"prefix": (*atoms(self.axes, "sb"), "rows", *out), "scale": atoms(self.axes, "sb")}

    def ready(self) -> Written:
        """The rows to write."""
        return _written(self, self.prefix)


@overlay
class DeepPrefix(AtPositions):
    """A prefix `P = tanh(E W1 + b1) W2 + b2`; E, W1 and b1 are one for all layers, W2 and b2 a layer's own."""

    embedding: Any = trained()
    w1: Any = trained()
    b1: Any = trained()
    w2: Any = trained()
    b2: Any = trained()
    scale: Any = frozen()

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """W2 and b2 have the leaf's stacked axes and its outputs, or only some of these, joined."""
        lead, out = atoms(self.axes, "sb"), ("features",) if self.features else atoms(self.axes, "o")
        shared = {"embedding": ("rows", "width"), "w1": ("width", "hidden"), "b1": ("hidden",)}
        return {**shared, "w2": (*lead, "hidden", *out), "b2": (*lead, *out), "scale": lead}

    def prefix(self) -> Any:
        """P itself, (stacked..., n, features...)."""
        hidden = jnp.tanh(self.embedding @ self.w1 + self.b1[None])
        lead = len(atoms(self.axes, "sb"))
        rows = jnp.moveaxis(jnp.tensordot(hidden, self.w2, (1, lead)), 0, lead)
        return rows + jnp.expand_dims(self.b2, lead)

    def ready(self) -> Written:
        """The rows to write."""
        return _written(self, self.prefix())

    def folded(self) -> Prefix:
        """The rows themselves, without the network."""
        kept = {name: getattr(self, name) for name in ("base", "scale", "axes", "length", "features", "kernel")}
        return Prefix(prefix=self.prefix(), **kept)


def _written(x: Any, rows: Any) -> Written:
    """What writes these rows: spread over all features, where they are those of some only."""
    on, lead = None, len(atoms(x.axes, "sb"))
    rows = rows * jnp.expand_dims(x.scale, tuple(range(lead, rows.ndim)))
    if x.features:
        out = [type_of(x.base).shape[k] for (k,) in atoms(x.axes, "o")]
        columns = jnp.concatenate([jnp.arange(*r) for r in x.features])
        whole = jnp.zeros((*rows.shape[:-1], math.prod(out)), rows.dtype)
        rows = whole.at[..., columns].set(rows).reshape(*rows.shape[: lead + 1], *out)
        on = jnp.zeros(math.prod(out), bool).at[columns].set(True).reshape(out)
    kept = {name: getattr(x, name) for name in ("base", "axes", "length", "features", "kernel")}
    return Written(rows=rows, on=on, name=type(x).__name__, **kept)
