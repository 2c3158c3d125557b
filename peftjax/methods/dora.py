"""DoRA: a weight as a trained magnitude times a direction, which a low-rank product turns."""

import math
from typing import Any, Mapping, Sequence

import jax.numpy as jnp
from jax import lax

from peftjax.factored import Factor, Term, chain, scaled
from peftjax.lowrank import FACTORED, INITS, checked, layered, rank_of, replaced, started
from peftjax.method import Leaf, Method, check_known, method, per_leaf
from peftjax.norms import changed_norm, norm
from peftjax.overlay import Overlay, atoms, frozen, is_overlay, overlay, static, trained
from peftjax.switches import still
from peftjax.targets import Targets, pattern_value


@overlay
class DoRA(Overlay):
    """`m / |V| * V` with `V = W + s (A B - A0 B0)`, |V| of each output feature; a and b as LoRA lays them out.

    `scale` moves both parts between the base, at 0, and the tuned weight, at 1: it multiplies the product, and the
    magnitude is `|W| + scale (m - |W|)`. `norm` is |W| of an array; of another overlay it is taken anew.
    """

    base: Any = frozen()
    a: Any = trained()
    b: Any = trained()
    m: Any = trained()
    scale: Any = frozen()
    norm: Any = frozen(default=None)
    a0: Any = frozen(default=None)
    b0: Any = frozen(default=None)
    key: Any = frozen(default=None)
    axes: str = static()
    ratio: float = static()
    dropout: float = static(default=0.0)
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """A keeps the axes that W reads, B those that it writes, and so do the magnitude and the norm."""
        reads, writes = replaced(self.axes, "o", "rank"), replaced(self.axes, "i", "rank")
        stacked, kept = (atoms(self.axes, letters) for letters in ("sb", "sbo"))
        products = {"a": reads, "b": writes, "a0": reads, "b0": writes}
        return {**products, "m": kept, "norm": kept, "scale": stacked, "key": stacked}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The base's terms and the low-rank product, times `m / |V|`; under dropout, what they change of the base."""
        labels = self.labels()
        gain = Factor(self.gain(), labels["m"])
        products = tuple(Term(factors=p) for p in self.products())
        if self.key is None or not self.dropout:
            return scaled((*terms, *products), gain)
        beyond = Factor(gain.array - 1, gain.atoms)
        changes = (*(t.times(beyond) for t in terms), *(t.times(gain) for t in products))
        return (*terms, *(t.dropping(Factor(self.key, labels["key"]), self.dropout) for t in changes))

    def products(self) -> tuple[tuple[Factor, ...], ...]:
        """The factors of `s A B`, and those of `-s A0 B0` where the product did not start at zero."""
        labels, s = self.labels(), self.scale * self.ratio
        pairs = ((self.a, self.b, s), (self.a0, self.b0, -s))
        names = ("a", "b", "scale")
        return tuple(tuple(Factor(x, labels[n]) for x, n in zip(p, names)) for p in pairs if p[0] is not None)

    def norms(self) -> tuple[Any, Any]:
        """|W| and |V|, through which no gradient passes."""
        w = Factor(lax.stop_gradient(still(self.base)), tuple((k,) for k in range(len(self.axes))))
        kept = self.labels()["m"]
        before = norm(w, kept) if self.norm is None else self.norm
        products = [tuple(f.having(lax.stop_gradient(f.array)) for f in p) for p in self.products()]
        return before, changed_norm(before, w, products, kept)

    def gain(self) -> Any:
        """`m / |V|`, and 1 where V is zero: exactly 1 where nothing has moved."""
        (before, after), labels = self.norms(), self.labels()
        scale = Factor(self.scale, labels["scale"])
        moved = chain(Factor(self.m - before, labels["m"]), (scale,), labels["m"], {})
        return 1 + (before - after + moved) / jnp.where(after > 0, after, jnp.inf)

    def summary(self) -> str:
        """Its rank."""
        return rank_of(self.a, self.labels()["a"])


@method
def dora(
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    rslora: bool = False,
    dropout: float = 0.0,
    init: str = "kaiming",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    any_rank: bool = False,
) -> Method:
    """Trains each weight's magnitude beside a low-rank turn of its direction: `W' = m V / |V|`, `V = W + s A B`.

    |V| is the norm of each output feature, over every axis that the weight reads (a convolution's window, a table's
    vocabulary), for each layer and expert by itself. No gradient passes through it, and `W + s A B` is not formed for
    it. A bias is not scaled. `pj.scale` moves both parts: `s A B` by its factor f, the magnitude to `|W| + f (m - |W|)`.

    Args:
      rank: the inner size r; A is (in..., r) and B (r, out...), both float32. 8 as `peftjax.lora` has it, to compare; in
        the paper half of LoRA's serves.
      alpha: the numerator of the scale s = alpha / rank, not 0; None means `rank`: a scale of 1, and of sqrt(rank) with
        `rslora`.
      targets: the weights to tune; by default every linear kernel but embeddings and the output head, as for LoRA.
      exclude: weights to leave out; wins over `targets`.
      rslora: scales by `alpha / sqrt(rank)`.
      dropout: rate at which inputs are dropped, 0 for none; active under `peftjax.with_key` only: with x' the dropped
        input and g the factor m / |V|, the output is `x W + (g - 1) x' W + g s x' A B`, which costs a second product
        with W.
      init: how A and B start, as in `peftjax.lora`; the magnitude starts at |V|.
      rank_pattern: regex -> rank for some weights; the first match wins, and its scale uses its own rank.
      alpha_pattern: regex -> alpha, likewise.
      layers: for weights stacked by a scan, the layers that are tuned; the others keep their weights.
      any_rank: allows ranks above a weight's smaller side, which add nothing but are in files of other libraries.

    Returns:
      The method. The magnitude `m`, float32, has the weight's output axes. Nothing changes at init, exactly; on top of
      another overlay, whose norms are taken anew each time, to rounding.

    Raises:
      ValueError: a rank below 1 or above the smaller side of a weight, an alpha of 0, a dropout outside [0, 1), an
        unknown init, layers of a weight that is not stacked, a pattern that matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.dora(rank=2).init(jax.random.key(0), {"w": jnp.ones((4, 3))})
      >>> tuned["w"], tuned["w"].m
      (DoRA(float32[4,3], rank=2), Array([2., 2., 2.], dtype=float32))

    Reference: Liu et al. 2024, arXiv 2402.09353.
    """
    check_known("dora", init=(init, INITS))
    if not 0 <= dropout < 1:
        raise ValueError(f"dora: dropout is a rate in [0, 1), found {dropout}")
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})

    def make(leaf: Leaf) -> DoRA:
        r = checked("dora", leaf, pattern_value(ranks, leaf.path, rank), any_rank and init not in FACTORED)
        top = pattern_value(alphas, leaf.path, r if alpha is None else alpha)
        ratio = top / math.sqrt(r) if rslora else top / r
        a, b, begun = started("dora", init, leaf, r, ratio)
        made = DoRA(
            base=leaf.value,
            a=a,
            b=b,
            m=None,
            scale=layered("dora", leaf, 1.0, layers),
            a0=jnp.copy(a) if begun else None,
            b0=jnp.copy(b) if begun else None,
            axes=leaf.axes,
            ratio=ratio,
            dropout=dropout,
        )
        before, after = made.replace(base=leaf.dense).norms()
        return made.replace(m=jnp.copy(after), norm=None if is_overlay(leaf.value) else before)

    return per_leaf(
        make, targets, exclude, identity_at_init=init != "orthogonal", patterns=(*ranks, *alphas), kernels=True
    )
