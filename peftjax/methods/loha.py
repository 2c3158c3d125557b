"""LoHa: an update that is the elementwise product of two low-rank ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.factored import Factor, Term
from peftjax.lowrank import checked, layered, rank_of, replaced
from peftjax.method import Leaf, Method, method, per_leaf
from peftjax.overlay import Overlay, atoms, frozen, overlay, static, trained
from peftjax.targets import Targets


@overlay
class LoHa(Overlay):
    """`W + scale (w1a w1b) o (w2a w2b)`: `w1a`, `w2a` have the rank for W's inputs, `w1b`, `w2b` for its outputs."""

    base: Any = frozen()
    w1a: Any = trained()
    w1b: Any = trained()
    w2a: Any = trained()
    w2b: Any = trained()
    scale: Any = frozen()
    axes: str = static()
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """Each matrix keeps the axes of its side, and the stacked ones; the scale those alone."""
        writes, reads = replaced(self.axes, "i", "rank"), replaced(self.axes, "o", "rank")
        stacked = atoms(self.axes, "sb")
        return {"w1a": writes, "w1b": reads, "w2a": writes, "w2b": reads, "scale": stacked}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The base's terms and the update, which no chain of thin factors gives: it is formed whole, in float32."""
        number = lambda labels: [len(self.axes) if a == "rank" else a[0] for a in labels]
        labels, whole = self.labels(), range(len(self.axes))
        product = lambda a, b: jnp.einsum(a, number(labels["w1a"]), b, number(labels["w1b"]), list(whole))
        factors = (
            Factor(product(self.w1a, self.w1b) * product(self.w2a, self.w2b), tuple((k,) for k in whole)),
            Factor(self.scale, labels["scale"]),
        )
        return (*terms, Term(factors=factors))

    def summary(self) -> str:
        """Its rank."""
        return rank_of(self.w1a, self.labels()["w1a"])


@method
def loha(
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    any_rank: bool = False,
) -> Method:
    """Adds the elementwise product of two low-rank updates: `W + s (w1a w1b) o (w2a w2b)`, with `s = alpha / rank`.

    Args:
      rank: the inner size r of both products; theirs has a rank up to r * r. w1a and w2a are (r, out...), w1b and w2b
        (in..., r), all float32. 8 as in Hugging Face's peft; it costs what LoRA of rank 16 does.
      alpha: the numerator of the scale s, not 0; None means `rank`, a scale of 1 at every rank.
      targets: the weights to tune; by default every linear kernel but embeddings and the output head. The taps of a
        convolution's window count as inputs.
      exclude: weights to leave out; wins over `targets`.
      any_rank: allows ranks above a weight's smaller side, which add nothing but are in files of other libraries.

    Returns:
      The method. w1a and w2a start uniform in +-1/sqrt(r), w1b in +-1/sqrt(in), and w2b at zero.

    Raises:
      ValueError: a rank below 1 or above the smaller side of a weight, an alpha of 0, a pattern that matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.loha(rank=2).init(jax.random.key(0), {"w": jnp.ones((4, 3))})
      >>> tuned["w"], tuned["w"].w1a.shape, tuned["w"].w1b.shape
      (LoHa(float32[4,3], rank=2), (2, 3), (4, 2))

    Reference: Hyeon-Woo et al. 2021, arXiv 2108.06098 (FedPara), which factors the weight itself; as an update beside a
    pretrained weight, Yeh et al. 2023, arXiv 2309.14859.
    """

    def make(leaf: Leaf) -> LoHa:
        r = checked("loha", leaf, rank, any_rank)
        shape = lambda letter: [
            r if a == "rank" else leaf.type.shape[a[0]] for a in replaced(leaf.axes, letter, "rank")
        ]
        uniform = lambda key, shape, fan: jax.random.uniform(
            key, shape, jnp.float32, -1 / math.sqrt(fan), 1 / math.sqrt(fan)
        )
        first, second, third = jax.random.split(leaf.key, 3)
        return LoHa(
            base=leaf.value,
            w1a=uniform(first, shape("i"), r),
            w1b=uniform(second, shape("o"), math.prod(leaf.sizes("i"))),
            w2a=uniform(third, shape("i"), r),
            w2b=jnp.zeros(shape("o"), jnp.float32),
            scale=layered("loha", leaf, (r if alpha is None else alpha) / r, None),
            axes=leaf.axes,
        )

    return per_leaf(make, targets, exclude, kernels=True)
