"""LoReFT: interventions on hidden states, in a subspace of few dimensions."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.blocks import endings
from peftjax.bottleneck import features, row
from peftjax.method import Leaf, Method, check_known, method, per_leaf
from peftjax.overlay import Output, atoms, frozen, overlay, static, trained
from peftjax.targets import Targets


@overlay
class LoReFT(Output):
    """`z + scale R^T (W z + b - R z)` at some positions; R are the orthonormal columns that span those of `free` (F, r)."""

    base: Any = frozen()
    free: Any = trained()
    weight: Any = trained()
    bias: Any = trained()
    scale: Any = frozen()
    axes: str = static()
    positions: tuple[int, int] | None = static(default=None)
    kernel: str | None = static(default=None)
    where: str = static(default="residual")
    locked: tuple[str, ...] = static(default=())

    @property
    def sequential(self) -> bool:  # type: ignore[override]
        """Whether it acts at some positions only."""
        return self.positions is not None

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """Every array has the stacked axes; the others are the overlay's own."""
        stacked = atoms(self.axes, "sb")
        wide = (*stacked, "features", "rank")
        return {"free": wide, "weight": wide, "bias": (*stacked, "rank"), "scale": stacked}

    def on_output(self, y: Any, site: Any) -> Any:
        """The layer's output, changed."""
        return y + self._change(y, site)

    def on_residual(self, h: Any, r: Any, site: Any) -> Any:
        """The layer's output, and the change made of the residual sum."""
        return h + self._change(h + r, site)

    def _change(self, z: Any, site: Any) -> Any:
        basis = orthonormal(self.free)
        # W - R before the product: in bfloat16 their difference would drown in the two products.
        inner = features(z, self.weight - basis, site) + row(self.bias, z)
        change = features(inner, basis.T, site) * self.scale.astype(z.dtype)
        if self.positions is None:
            return change
        axis, chosen = site.along(z), _chosen(site.span, *self.positions)
        at = jnp.asarray(chosen).reshape([-1 if k == axis else 1 for k in range(z.ndim)])
        return jnp.where(jnp.broadcast_to(at, z.shape), change, jnp.zeros_like(change))

    def summary(self) -> str:
        """Its rank and where it acts."""
        rank = f"rank={self.bias.shape[-1]}" if hasattr(self.bias, "shape") else ""
        return ", ".join(filter(None, (rank, "" if self.positions is None else "f{}+l{}".format(*self.positions))))


def orthonormal(free: Any) -> Any:
    """Orthonormal columns with the span of those of `free` (F, r), by QR; the signs are those that vary smoothly."""
    q, r = jnp.linalg.qr(free)
    signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(free.dtype)
    return q * signs[None]


def _chosen(span: Any, first: int, last: int) -> np.ndarray:
    """Which tokens of a sequence are among the first or the last ones that are not virtual."""
    real = np.arange(span.length)[span.real]
    chosen = np.zeros(span.length, bool)
    chosen[[*real[:first], *real[len(real) - min(last, len(real)) :]]] = True
    return chosen


@method
def reft(
    rank: int = 4,
    *,
    positions: str = "all",
    where: str = "residual",
    targets: Targets | None = None,
    exclude: Targets = (),
    init: str = "identity",
    scale: float = 1.0,
) -> Method:
    """Edits hidden states within a subspace: `z + c R^T (W z + b - R z)`, R with orthonormal rows (LoReFT).

    Args:
      rank: the dimension r of the subspace; R and W are (r, F), kept transposed, b (r,), all float32. R is the QR
        factor of a free matrix, so that any optimizer keeps its rows orthonormal. Few do: the paper takes 1 to 8.
      positions: "all", or tokens counted from the ends, "f7+l7", "f1" or "l2": those need `peftjax.wrap_tokens`, which
        knows the axis of tokens. Padding is not known there: the last tokens are those of the padded length, so pad on
        the left where the last ones matter. Of a shorter sequence, all there are.
      where: "residual", on the residual sum after a layer, the stream itself, before a norm that follows; or "output",
        on the layer's own output.
      targets: the layers, by their kernels; None means those that end feed-forward sublayers, so z is what a block ends
        with.
      exclude: layers to leave out; wins over `targets`.
      init: "identity" (W = R, b = 0: nothing changes at first but by rounding) or "uniform" (W and b uniform in
        +-1/sqrt(F), as the paper's code).
      scale: c, 1 as in the paper. `peftjax.scale` multiplies it.

    Returns:
      The method; it needs roles, and does not merge.

    Raises:
      ValueError: no roles; a rank below 1 or above the features; positions, a place or a start that do not exist;
        targets as in `peftjax.adapter`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]
      >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> apply, tuned = pj.attach(pj.reft(rank=2), fn, params, jnp.ones((1, 4)), key=jax.random.key(0))
      >>> tuned["down"], tuned["down"].free.shape
      (LoReFT(float32[8,4], rank=2), (4, 2))

    Reference: Wu et al. 2024, arXiv 2404.03592. Where we differ: after a post-LN block it edits the sum before the norm;
    the start changes nothing unless `init` says so.
    """
    ends = _ends(positions)
    check_known("reft", where=(where, ("residual", "output")), init=(init, ("identity", "uniform")))

    def start(key: Any, params: Any, roles: Any) -> Any:
        found = endings("reft", params, roles, targets, exclude, ("feed-forward",), where == "residual")

        def make(leaf: Leaf) -> LoReFT:
            lead, outer = leaf.sizes("sb"), math.prod(leaf.sizes("o"))
            if not 1 <= rank <= outer:
                raise ValueError(f"reft: rank {rank} at {leaf.path}, of {outer} features; expected 1 to {outer}")
            keys, bound = jax.random.split(leaf.key, 3), 1 / math.sqrt(outer)
            draw = lambda k, shape: jax.random.uniform(keys[k], shape, jnp.float32, -bound, bound)
            free = jax.random.normal(keys[0], (*lead, outer, rank), jnp.float32)
            basis = jnp.vectorize(orthonormal, signature="(f,r)->(f,r)")(free)
            return LoReFT(
                base=leaf.value,
                free=basis,
                weight=jnp.copy(basis) if init == "identity" else draw(1, free.shape),
                bias=jnp.zeros((*lead, rank), jnp.float32) if init == "identity" else draw(2, (*lead, rank)),
                scale=jnp.full(lead, scale, jnp.float32),
                axes=leaf.axes,
                positions=ends,
                kernel=found[leaf.path].of,
                where=where,
            )

        return per_leaf(make, lambda path, _: path in found).init(key, params, roles)

    return Method(name="", options={}, start=start, identity_at_init=False)


def _ends(positions: str) -> tuple[int, int] | None:
    """How many tokens from either end, or None for all."""
    if positions == "all":
        return None
    found = re.fullmatch(r"f(\d+)(?:\+l(\d+))?|l(\d+)", positions)
    ends = (int(found[1] or 0), int(found[2] or found[3] or 0)) if found else (0, 0)
    if not any(ends):
        raise ValueError(f"reft: unknown positions {positions!r}; expected 'all', or such as 'f7+l7', 'f1' or 'l2'")
    return ends
