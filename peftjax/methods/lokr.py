"""LoKr: an update that is the Kronecker product of two small matrices."""

import math
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from peftjax import compat
from peftjax.factored import Factor, Term, chain
from peftjax.lowrank import factorization, layered, linear
from peftjax.method import Leaf, Method, check_known, method, per_leaf
from peftjax.overlay import Overlay, atoms, frozen, overlay, static, trained
from peftjax.targets import Targets
from peftjax.views import Parts, parts

# The axes that are the overlay's own: W's inputs are (m, n), its outputs (l, k), w1 has m and l, and w2 n and k.
M, N, L, K = "outer inputs", "inner inputs", "outer outputs", "inner outputs"
RANK, RANK1, READ = "rank", "rank of w1", "rank of inputs"


@overlay
class LoKr(Overlay):
    """`W + scale w1 (x) w2`: w1 (m, l) or w1b (m, r) w1a (r, l); w2 (n, k) or w2b (n, r) w2a (r, k), with a window's taps.

    Of a Tucker form the taps have a core of their own, t2 (r, r), between w2b and w2a. `outer` says which of the two
    matrices has the outer index of each axis, as the first of a Kronecker product has.
    """

    base: Any = frozen()
    w1: Any = trained(default=None)
    w1a: Any = trained(default=None)
    w1b: Any = trained(default=None)
    w2: Any = trained(default=None)
    w2a: Any = trained(default=None)
    w2b: Any = trained(default=None)
    t2: Any = trained(default=None)
    scale: Any = frozen()
    axes: str = static()
    rank: int = static()
    factor: int = static(default=-1)
    window: tuple[int, ...] = static(default=())
    tucker: bool = static(default=False)
    outer: str = static(default="w1")
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """All keep the stacked axes, w2 or what stands for its inputs the window's; the others are their own."""
        stacked, taps = atoms(self.axes, "sb"), tuple((k,) for k in self.window)
        around, own = (*stacked, *taps), {"w1": (M, L), "w1a": (RANK1, L), "w1b": (M, RANK1), "w2a": (RANK, K)}
        w2b = (*stacked, N, READ) if self.tucker else (*around, N, RANK)
        wide = {"w2": (*around, N, K), "w2b": w2b, "t2": (*around, READ, RANK)}
        return {**{name: (*stacked, *axes) for name, axes in own.items()}, **wide, "scale": stacked}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The base's terms, and the product on the parts of W's axes, which is not formed where they are whole axes."""
        labels = self.labels()
        fields = ("w1", "w1b", "w1a", "w2", "w2b", "t2", "w2a", "scale")
        factors = [Factor(x, labels[name]) for name in fields if (x := getattr(self, name)) is not None]
        sizes = {a: n for f in factors for a, n in zip(f.atoms, f.array.shape)}
        found = [p for letter in "io" if (p := self._parts(letter, sizes)) is not None]
        if len(found) < 2 or compat.explicit_spec(self.bottom) is not None:
            return (*terms, Term(factors=(self._whole(factors[:-1], sizes), factors[-1])))
        pairs = zip(self._sides(), found)
        places = {label: at for side, p in pairs for label, at in zip(side, (p.outer, p.inner))}
        splits = tuple(s for p in found for s in p.splits)
        return (*terms, Term(factors=tuple(_placed(f, places) for f in factors), splits=splits))

    def _sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """The outer and the inner axis of the inputs, and of the outputs."""
        return ((M, N), (L, K)) if self.outer == "w1" else ((N, M), (K, L))

    def _beside(self, letter: str) -> list[int]:
        """W's axes of one side, without the window's."""
        return [k for k, x in enumerate(self.axes) if x == letter and k not in self.window]

    def _parts(self, letter: str, sizes: dict[Any, int]) -> Parts | None:
        outer, inner = self._sides()["io".index(letter)]
        axes: dict[Any, int] = {(k,): self.type.shape[k] for k in self._beside(letter)}
        return parts(axes, sizes[outer], sizes[inner])

    def _whole(self, factors: Sequence[Factor], sizes: dict[Any, int]) -> Factor:
        """The product as one array along W's axes."""
        around = (*atoms(self.axes, "sb"), *((k,) for k in self.window))
        out = (*around, *(label for side in self._sides() for label in side))
        array = chain(factors[0], factors[1:], out, sizes)
        beside = [k for letter in "io" for k in self._beside(letter)]
        shape = (*array.shape[: len(around)], *(self.type.shape[k] for k in beside))
        return Factor(array.reshape(shape), (*around, *((k,) for k in beside)))

    def summary(self) -> str:
        """Its rank."""
        return f"rank={self.rank}"


def _placed(f: Factor, places: dict[str, tuple[tuple[Any, int], ...]]) -> Factor:
    """A factor on the parts of W's axes in the place of its own."""
    found = [(place, n) for a, size in zip(f.atoms, f.array.shape) for place, n in places.get(a, ((a, size),))]
    return Factor(f.array.reshape([n for _, n in found]), tuple(place for place, _ in found))


@method
def lokr(
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    factor: int = -1,
    decompose_both: bool = False,
    tucker: bool = False,
    outer: str = "w1",
) -> Method:
    """Adds a Kronecker product to each chosen weight: `W + s w1 (x) w2`, w1 (m, l), w2 (n, k), with `s = alpha / rank`.

    W's inputs, taken as one axis of m n, and its outputs, one of l k, are cut in two. The product is not formed: x is
    multiplied as an array (..., m, n), by w1 along one axis and by w2 along the other. The taps of a convolution's window
    belong to w2; there the update is formed, as it is in lookups, under explicit sharding, and where a cut would fall
    inside a head.

    Args:
      rank: the inner size r of a low-rank w2 = w2b (n, r) w2a (r, k), which is used where r < max(n, k) / 2. A rank
        above it gives whole matrices (KronA). 8 as in Hugging Face's peft.
      alpha: the numerator of the scale s, also of whole matrices, not 0; None means `rank`, a scale of 1.
      targets: the weights to tune; by default every linear kernel but embeddings and the output head.
      exclude: weights to leave out; wins over `targets`.
      factor: how an axis is cut: (factor, the rest) where it divides, else the most even cut whose smaller part is at
        most this; -1 is the most even one, with the fewest parameters.
      decompose_both: whether w1 is low-rank too, w1b (m, r) w1a (r, l), where r < max(m, l) / 2. False, for w1 is the
        smaller one unless `factor` says otherwise, and whole it costs little.
      tucker: whether a low-rank w2 of a convolution whose window has several taps keeps them in a core t2 (taps, r, r)
        of its own, w2b t2 w2a, rather than in w2b, which is larger. False as in peft.
      outer: the matrix whose index is the outer one of each axis: "w1" as in the papers, or "w2", which Hugging Face peft
        has in one-dimensional convolutions with a whole w2.

    Returns:
      The method. All matrices are float32. w1, or w1a, starts at zero, so nothing changes at init; the others start
      uniform in +-1/sqrt(inputs of the matrix), taps among them.

    Raises:
      ValueError: a rank below 1, an alpha of 0, a factor that is no positive number or -1, an unknown `outer`, a leaf
        that is no kernel, a pattern that matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.lokr(rank=1).init(jax.random.key(0), {"w": jnp.ones((12, 64))})
      >>> tuned["w"], tuned["w"].w1.shape, tuned["w"].w2b.shape, tuned["w"].w2a.shape
      (LoKr(float32[12,64], rank=1), (3, 8), (4, 1), (1, 8))

    Reference: Yeh et al. 2023, arXiv 2309.14859 (LoKr); Edalati et al. 2022, arXiv 2212.10650 (KronA).
    """
    check_known("lokr", outer=(outer, ("w1", "w2")))
    if rank < 1:
        raise ValueError(f"lokr: expected a rank of at least 1, found {rank}")
    if factor < 1 and factor != -1:
        raise ValueError(f"lokr: factor is a positive number, or -1 for the most even cut; found {factor}")

    def make(leaf: Leaf) -> LoKr:
        linear("lokr", leaf)
        window = leaf.role.window if leaf.role is not None else ()
        taps = [leaf.type.shape[k] for k in window]
        kept = [k for k in range(len(leaf.axes)) if k not in window]
        side = lambda x: factorization(math.prod(leaf.type.shape[k] for k in kept if leaf.axes[k] == x), factor)
        cuts = dict(zip((M, N, L, K), (*side("i"), *side("o"))))
        low1 = decompose_both and rank < max(cuts[M], cuts[L]) / 2
        low2 = rank < max(cuts[N], cuts[K]) / 2
        core = low2 and tucker and math.prod(taps) > 1
        names = (
            *(("w1a", "w1b") if low1 else ("w1",)),
            *(("w2a", "w2b") if low2 else ("w2",)),
            *(("t2",) if core else ()),
        )
        made = LoKr(
            base=leaf.value,
            scale=layered("lokr", leaf, (rank if alpha is None else alpha) / rank, None),
            axes=leaf.axes,
            rank=rank,
            factor=factor,
            window=window,
            tucker=core,
            outer=outer,
        )
        return made.replace(**_started(made, leaf, names, {**cuts, RANK: rank, RANK1: rank, READ: rank}))

    return per_leaf(make, targets, exclude, kernels=True)


def _started(x: LoKr, leaf: Leaf, names: Sequence[str], sizes: dict[str, int]) -> dict[str, Any]:
    """The matrices of these names as they start."""
    labels, made = x.labels(), {}
    for name, key in zip(names, jax.random.split(leaf.key, len(names))):
        shape = [sizes[a] if isinstance(a, str) else leaf.type.shape[a[0]] for a in labels[name]]
        taps = math.prod(leaf.type.shape[k] for k in x.window if (k,) in labels[name])
        bound = 1 / math.sqrt(taps * shape[-2])
        zero = name in ("w1", "w1a")
        made[name] = (
            jnp.zeros(shape, jnp.float32) if zero else jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        )
    return made
