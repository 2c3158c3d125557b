"""VeRA: one pair of random matrices for all layers, and two trained vectors for each."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.factored import Factor, Term
from peftjax.method import Leaf, Method, check_alone, chosen_leaves, laid, method
from peftjax.overlay import Overlay, Ref, atoms, frozen, overlay, static, trained
from peftjax.roles import Roles
from peftjax.targets import Targets


@overlay
class VeRA(Overlay):
    """`W + scale A diag(d) B diag(b)`: A and B, cut to W's inputs and outputs, are those of every VeRA in the tree.

    The first overlay in the tree's order holds them; the others refer to it.
    """

    base: Any = frozen()
    d: Any = trained()
    b: Any = trained()
    shared_a: Any = frozen()  # (largest inputs, rank)
    shared_b: Any = frozen()  # (rank, largest outputs)
    scale: Any = frozen()
    key: Any = frozen(default=None)
    axes: str = static()
    dropout: float = static(default=0.0)
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The vectors, the scale and the key keep the stacked axes, `b` those that W writes; A and B have their own."""
        stacked = atoms(self.axes, "sb")
        vectors = {"d": (*stacked, "rank"), "b": atoms(self.axes, "sbo"), "scale": stacked, "key": stacked}
        return {**vectors, "shared_a": ("inputs", "rank"), "shared_b": ("rank", "outputs")}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The base's terms, and the product of random matrices and vectors."""
        labels, reads, writes = self.labels(), atoms(self.axes, "i"), atoms(self.axes, "o")
        n_in, n_out = ([self.type.shape[k] for (k,) in atoms] for atoms in (reads, writes))
        a = self.shared_a[: math.prod(n_in)].reshape(*n_in, -1)
        b = self.shared_b[:, : math.prod(n_out)].reshape(-1, *n_out)
        own = (Factor(getattr(self, name), labels[name]) for name in ("d", "b", "scale"))
        key = None if self.key is None else Factor(self.key, labels["key"])
        factors = (Factor(a, (*reads, "rank")), Factor(b, ("rank", *writes)), *own)
        return (*terms, Term(factors=factors, key=key, rate=self.dropout))

    def summary(self) -> str:
        """Its rank."""
        return f"rank={self.d.shape[-1]}" if hasattr(self.d, "shape") else ""


@method
def vera(
    rank: int = 256,
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    d_init: float = 0.1,
    dropout: float = 0.0,
) -> Method:
    """Trains two vectors beside each chosen weight: `y = x W + ((x A) * d) B * b`, A and B random, frozen and shared.

    Args:
      rank: the inner size r, which may exceed the weights' own: a vector d of it trains for each layer. 256 is the
        paper's for RoBERTa-large, where the base model has 1024.
      targets: the weights to tune; by default every linear kernel but embeddings and the output head.
      exclude: weights to leave out; wins over `targets`.
      d_init: where d starts; b starts at zero. 0.1 as in the paper, where 1e-7 trains about as well.
      dropout: rate at which the input of A is dropped, 0 for none; active under `peftjax.with_key` only.

    Returns:
      The method. A (largest inputs, r) and B (r, largest outputs) are drawn once, float32, uniform in
      +-sqrt(6 / largest inputs) and +-sqrt(6 / r); each weight uses the first rows of A and columns of B, every layer
      of a stack the same ones. Axes of inputs or outputs are taken in their order as one. `peftjax.save` keeps A
      and B. Without roles it takes kernels of two axes only, (in, out), the output head among them.

    Raises:
      ValueError: a rank below 1, a dropout outside [0, 1), a leaf that is no kernel or trains a VeRA already, a pattern
        that matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {"down": jnp.ones((6, 3)), "up": jnp.ones((3, 6))}
      >>> tuned = pj.vera(rank=4).init(jax.random.key(0), params)
      >>> tuned["down"].shared_a.shape, tuned["up"].shared_a, tuned["up"].b.shape
      ((6, 4), Ref(path='down', field='shared_a', depth=0), (6,))

    Reference: Kopiczko et al. 2023, arXiv 2310.11454.
    """
    if rank < 1:
        raise ValueError(f"vera: expected a rank of at least 1, found {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"vera: dropout is a rate in [0, 1), found {dropout}")

    def start(key: jax.Array, params: Any, roles: Roles | None) -> Any:
        chosen = chosen_leaves(key, params, roles, targets, exclude, kernels=True)
        n_in, n_out = (max(_size(leaf, letter) for leaf in chosen) for letter in "io")
        first = chosen[0]
        reads, writes = jax.random.split(first.key)
        drawn = lambda key, shape, fan: jax.random.uniform(key, shape, jnp.float32, -1, 1) * math.sqrt(6 / fan)
        shared = (drawn(reads, (n_in, rank), n_in), drawn(writes, (rank, n_out), rank))
        there = tuple(Ref.above(first.path, first.value, name) for name in ("shared_a", "shared_b"))
        give = lambda leaf: shared if leaf is first else there
        return laid(
            params, {leaf.path: _on(leaf, rank, d_init, *give(leaf)).replace(dropout=dropout) for leaf in chosen}
        )

    return Method(name="", options={}, start=start)


def _size(leaf: Leaf, letter: str) -> int:
    if not {"i", "o"} <= set(leaf.axes) or "?" in leaf.axes:
        raise ValueError(
            f"vera: {leaf.path} has axes {leaf.axes!r}; expected a kernel with input and output axes. Leave it out "
            "with `exclude`"
        )
    check_alone("vera", leaf, VeRA)
    return math.prod(leaf.sizes(letter))


def _on(leaf: Leaf, rank: int, d_init: float, shared_a: Any, shared_b: Any) -> VeRA:
    stacked = leaf.sizes("sb")
    return VeRA(
        base=leaf.value,
        d=jnp.full((*stacked, rank), d_init, jnp.float32),
        b=jnp.zeros(leaf.sizes("sbo"), jnp.float32),
        shared_a=shared_a,
        shared_b=shared_b,
        scale=jnp.ones(stacked, jnp.float32),
        axes=leaf.axes,
    )
