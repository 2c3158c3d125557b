"""LoRA: a low-rank update beside each chosen weight."""

import dataclasses
import math
import re
from typing import Any, Mapping, Sequence

import jax.numpy as jnp

from peftjax.factored import Factor, Term
from peftjax.lowrank import FACTORED, INITS, checked, layered, limited, rank_of, replaced, started
from peftjax.method import Leaf, Method, check_known, chosen_leaves, laid, method, per_leaf
from peftjax.overlay import Overlay, atoms, frozen, overlay, static, trained
from peftjax.roles import Roles
from peftjax.targets import Targets, pattern_value


@overlay
class LoRA(Overlay):
    """`W + scale (A B - A0 B0)`: `a` is W with its output axes replaced by the rank, `b` with its input axes replaced."""

    base: Any = frozen()
    a: Any = trained()
    b: Any = trained()
    scale: Any = frozen()
    a0: Any = frozen(default=None)
    b0: Any = frozen(default=None)
    key: Any = frozen(default=None)
    axes: str = static()
    dropout: float = static(default=0.0)
    uses: tuple[str, ...] | None = static(default=None)
    tied: bool = static(default=False)
    locked: tuple[str, ...] = static(default=())

    @property
    def merges(self) -> bool:
        """A LoRA for some uses only of a leaf that has others is no single array."""
        return not (self.tied and self.uses)

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """A keeps the axes that W reads and B those that it writes; scales and keys the stacked ones."""
        reads, writes = replaced(self.axes, "o", "rank"), replaced(self.axes, "i", "rank")
        stacked = atoms(self.axes, "sb")
        return {"a": reads, "b": writes, "a0": reads, "b0": writes, "scale": stacked, "key": stacked}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The base's terms and the low-rank product; less the product it began with, where that was not zero."""
        labels = self.labels()
        key = None if self.key is None else Factor(self.key, labels["key"])

        def product(a: Any, b: Any, scale: Any) -> Term:
            factors = (Factor(a, labels["a"]), Factor(b, labels["b"]), Factor(scale, labels["scale"]))
            return Term(factors=factors, key=key, uses=self.uses, rate=self.dropout)

        start = () if self.a0 is None else (product(self.a0, self.b0, -self.scale),)
        return (*terms, product(self.a, self.b, self.scale), *start)

    def summary(self) -> str:
        """Its rank."""
        return rank_of(self.a, self.labels()["a"])


@overlay
class Shift(Overlay):
    """`b + scale c` on the bias of a layer with LoRA: c is added to what its B gives."""

    base: Any = frozen()
    shift: Any = trained()
    scale: Any = frozen()
    axes: str = static()
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The shift has the bias's axes, the scale the stacked ones."""
        return {"shift": tuple((k,) for k in range(len(self.axes))), "scale": atoms(self.axes, "sb")}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The base's terms and the shift."""
        labels = self.labels()
        return (*terms, Term(factors=(Factor(self.shift, labels["shift"]), Factor(self.scale, labels["scale"]))))


@method
def lora(
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
    uses: Sequence[str] | None = None,
    train_a: bool = True,
    bias: bool = False,
    any_rank: bool = False,
) -> Method:
    """Adds a trainable low-rank product to each chosen weight: `y = x W + s (x A) B`, with `s = alpha / rank`.

    Args:
      rank: the inner size r; A is (in..., r) and B (r, out...), both float32. 8: in the paper 4 to 64 do alike.
      alpha: the numerator of the scale s, not 0; None means `rank`: a scale of 1 at every rank, and of sqrt(rank) with
        `rslora`.
      targets: the weights to tune; by default every linear kernel but embeddings and the output head.
      exclude: weights to leave out; wins over `targets`.
      rslora: scales by `alpha / sqrt(rank)`, which keeps the update's size as the rank grows; False is the first paper.
      dropout: rate at which the input of A is dropped, under `peftjax.with_key` or a `peftjax.train_state` with a key;
        without keys there is none, whatever the rate, and lookups drop nothing. 0, for how much helps hangs on the data.
      init: "kaiming" (A uniform in +-1/sqrt(in), B = 0), "gaussian" (A of deviation 1/r, B = 0), "zero_a" (A = 0, B
        uniform in +-1/sqrt(r)), "pissa" (the r largest singular directions of W), "olora" (its QR factors) or
        "orthogonal" (A B = 0 to rounding with neither zero; an even rank). "pissa" and "olora" leave W as it is and
        subtract the product they start from: no start changes the model.
      rank_pattern: regex -> rank for some weights; the first match wins, and its scale uses its own rank.
      alpha_pattern: regex -> alpha, likewise.
      layers: for weights stacked by a scan, the layers that are tuned; the others have scale 0. None means all.
      uses: limits the update to some uses of a leaf, such as `("gather",)` for the lookup of a tied embedding; names of
        primitives, as `peftjax.roles` lists them. It needs roles.
      train_a: False trains B alone (LoRA-FA).
      bias: whether B has a bias c, zero at first: `y = x W + b + s (x A B + c)`. It lies on the layer's own bias b, and
        needs roles, which find it. It can hold the change of b where A and B were taken from two trained models.
      any_rank: allows ranks above a weight's smaller side, which add nothing but are in files of other libraries.

    Returns:
      The method. Without roles it takes kernels of two axes only, (in, out), the output head among them.

    Raises:
      ValueError: a rank below 1 or above the smaller side of a weight, an alpha of 0, a dropout outside [0, 1), an
        unknown init, an odd rank for "orthogonal", "zero_a" where A does not train, a pattern that matches nothing, a
        use or layers that a chosen weight does not have; with `bias`, no roles, or a weight without a bias of its own.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.lora(rank=2, alpha=4).init(jax.random.key(0), {"w": jnp.ones((4, 3))})
      >>> tuned["w"], tuned["w"].a.shape, tuned["w"].b.shape
      (LoRA(float32[4,3], rank=2), (4, 2), (2, 3))

    Reference: Hu et al. 2021, arXiv 2106.09685; rsLoRA 2312.03732; LoRA-FA 2308.03303; PiSSA 2404.02948; OLoRA 2406.01775.
    """
    check_known("lora", init=(init, INITS))
    if not 0 <= dropout < 1:
        raise ValueError(f"lora: dropout is a rate in [0, 1), found {dropout}")
    if init == "zero_a" and not train_a:
        raise ValueError("lora: with init='zero_a' A is 0, and with train_a=False it stays so: nothing could change")
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})

    def scale_of(leaf: Leaf) -> tuple[int, float]:
        r = pattern_value(ranks, leaf.path, rank)
        top = pattern_value(alphas, leaf.path, r if alpha is None else alpha)
        return checked("lora", leaf, r, any_rank and init not in FACTORED), top / math.sqrt(r) if rslora else top / r

    def make(leaf: Leaf) -> LoRA:
        r, scale = scale_of(leaf)
        a, b, begun = started("lora", init, leaf, r, scale)
        return LoRA(
            base=leaf.value,
            a=a,
            b=b,
            scale=layered("lora", leaf, scale, layers),
            a0=jnp.copy(a) if begun else None,
            b0=jnp.copy(b) if begun else None,
            axes=leaf.axes,
            dropout=dropout,
            uses=limited("lora", leaf, uses),
            tied=len(set(leaf.uses)) > 1,
            locked=() if train_a else ("a",),
        )

    patterns = (*ranks, *alphas)
    made = per_leaf(make, targets, exclude, init != "orthogonal", patterns, kernels=True)

    def start(key: Any, params: Any, roles: Roles | None) -> Any:
        tuned = made.start(key, params, roles)
        shifts = {}
        for leaf in chosen_leaves(key, params, roles, targets, exclude, patterns, kernels=True):
            (on,) = chosen_leaves(key, params, roles, re.escape(_bias_of(leaf, roles)))
            zero, scale = jnp.zeros(on.type.shape, jnp.float32), layered("lora", on, scale_of(leaf)[1], layers)
            shifts[on.path] = Shift(base=on.value, shift=zero, scale=scale, axes=on.axes)
        return laid(tuned, shifts)

    return dataclasses.replace(made, start=start) if bias else made


def _bias_of(leaf: Leaf, roles: Roles | None) -> str:
    """The path of the bias that is added to a weight's output, and to nothing else."""
    if roles is None:
        raise ValueError(
            "lora: bias=True finds the layers' biases by roles: pass `roles=peftjax.roles(fn, params, batch)`"
        )
    path = roles[leaf.path].bias
    if path is None:
        raise ValueError(
            f"lora: bias=True at {leaf.path}, to whose output no bias is added; leave it out with `exclude`, or tune it "
            "by a lora without bias"
        )
    if roles[path].kernel != leaf.path or roles[path].follows is None:
        raise ValueError(f"lora: bias=True at {leaf.path}, whose bias {path} is added to something else too")
    return path
