"""OFT: a weight whose inputs are turned by trained orthogonal matrices, block by block."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from peftjax.factored import Term, scaled
from peftjax.lowrank import layered
from peftjax.method import Leaf, Method, method, per_leaf
from peftjax.overlay import Overlay, atoms, frozen, overlay, static, trained
from peftjax.targets import Targets
from peftjax.tree import map_layers
from peftjax.turns import BLOCK, COLUMN, ROW, Turn, cayley, identity, skew

BLOCK_SIZE = 32


@overlay
class OFT(Overlay):
    """`(I + scale (R - I)) W`, R block-diagonal along the axes `turns` of W, which count as one in this order.

    `upper` holds each block's skew-symmetric Q, its upper triangle row by row; with one row, all blocks share it.
    """

    base: Any = frozen()
    upper: Any = trained()  # (..., blocks, size (size - 1) / 2)
    scale: Any = frozen()
    axes: str = static()
    turns: tuple[int, ...] = static()
    series: int | None = static(default=None)
    eps: float | None = static(default=None)
    locked: tuple[str, ...] = static(default=())

    @property
    def size(self) -> int:
        """The number of features in a block."""
        return (1 + math.isqrt(1 + 8 * self.upper.shape[-1])) // 2

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The triangles keep the stacked axes, and have blocks and entries of their own; the scale keeps those alone."""
        stacked = atoms(self.axes, "sb")
        return {"upper": (*stacked, BLOCK, "entry"), "scale": stacked}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Every term of the base, turned: what they read, or what a table gives, is turned once for all of them."""
        blocks = self.rotations()
        one = identity(blocks)
        blocks = one + self.scale[..., None, None, None] * (blocks - one)
        labels = (*atoms(self.axes, "sb"), BLOCK, ROW, COLUMN)
        if self.axes[self.turns[0]] == "o":
            blocks = jnp.swapaxes(blocks, -1, -2)
        if self.shares:
            blocks, labels = blocks[..., 0, :, :], tuple(a for a in labels if a != BLOCK)
        along = tuple((k,) for k in self.turns if self.type.shape[k] > 1)
        return scaled(terms, Turn(blocks, labels, along=along))

    @property
    def shares(self) -> bool:
        """Whether all blocks share one matrix."""
        number = math.prod(self.type.shape[k] for k in self.turns) // self.size
        return bool(self.upper.shape[-2] < number)

    def rotations(self) -> Any:
        """The blocks of R, (..., blocks, size, size)."""
        return cayley(skew(self.projected()), self.series)

    def projected(self) -> Any:
        """The triangles, each within its norm; gradients are those at the projection."""
        if self.eps is None:
            return self.upper
        norm = jnp.sqrt(2 * jnp.sum(jnp.square(self.upper), -1, keepdims=True))
        most = self.eps / math.sqrt(self.upper.shape[-2])
        near = self.upper * jnp.where(norm > most, most / jnp.where(norm > 0, norm, 1), 1)
        return lax.stop_gradient(near) + (self.upper - lax.stop_gradient(self.upper))

    def summary(self) -> str:
        """Its blocks' size."""
        return f"block_size={self.size}" if hasattr(self.upper, "shape") else ""


@method
def oft(
    rank: int | None = None,
    block_size: int | None = None,
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    share: bool = False,
    neumann_terms: int | None = None,
    eps: float | None = None,
) -> Method:
    """Turns what each chosen weight reads by orthogonal blocks: `y = x R W`, `R = (I + Q)^-1 (I - Q)`, Q skew-symmetric.

    R keeps lengths and angles, so the columns of R W have the lengths, and the angles among themselves, of those of W.
    The activations are turned, not the weight.

    Args:
      rank: the number of blocks along a weight's inputs; or else
      block_size: the number of inputs in a block; 32, as in Hugging Face's peft, where neither is given. Either has to
        divide the inputs.
      targets: the weights to tune; by default every linear kernel but embeddings and the output head. Inputs of several
        axes count as one, those of a convolution as (channels, window). Of a table, the features that it gives are
        turned: `W R`.
      exclude: weights to leave out; wins over `targets`.
      share: one block, repeated along all inputs; False, for a block of its own turns each part freely.
      neumann_terms: sums this many terms of a series in the place of the inverse, `I + 2 Q + 2 Q^2 + ... + Q^(k - 1)`, as
        OFTv2 does with 5: no solve, and orthogonal as long as Q is small. As in Hugging Face's files, this is the
        series of the opposite turn, R of -Q. None takes the inverse.
      eps: constrained OFT: the largest norm of Q, over all blocks of a weight, by which each trained block is scaled
        down; after a step, `Method.update` scales the trained numbers themselves. Hugging Face's value is 6e-5; None is
        without a limit.

    Returns:
      The method. Each weight trains `upper`, float32, (blocks, block_size (block_size - 1) / 2): the upper triangles of
      Q, which start at zero, so nothing changes at init, exactly. `peftjax.scale` interpolates between W and R W, which
      is no longer orthogonal between the two. A convolution with a window wider than 1 is merged where it acts.

    Raises:
      ValueError: both a rank and a block size; one, also the 32, that does not divide a weight's inputs or leaves blocks
        of one feature; a leaf that is no kernel; fewer than 2 terms; an eps that is not positive; a pattern that matches
        nothing.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.oft(rank=2).init(jax.random.key(0), {"w": jnp.eye(4)})
      >>> quarter = pj.insert(tuned, {"w/upper": jnp.array([[1.0], [0.0]])})
      >>> pj.merge(quarter)["w"]
      Array([[ 0., -1.,  0.,  0.],
             [ 1.,  0.,  0.,  0.],
             [ 0.,  0.,  1.,  0.],
             [ 0.,  0.,  0.,  1.]], dtype=float32)

    Reference: Qiu et al. 2023, arXiv 2306.07280; OFTv2 (activations, the series) Qiu et al. 2025, arXiv 2506.19847.
    """
    if rank is not None and block_size is not None:
        raise ValueError(f"oft: rank={rank} and block_size={block_size}; give one, which says the other")
    if neumann_terms is not None and neumann_terms < 2:
        raise ValueError(f"oft: expected at least 2 neumann_terms, found {neumann_terms}")
    if eps is not None and eps <= 0:
        raise ValueError(f"oft: expected a positive eps, found {eps}")

    def make(leaf: Leaf) -> OFT:
        turns = turned_axes(leaf)
        width = math.prod(leaf.type.shape[k] for k in turns)
        size = _size(leaf.path, width, rank, BLOCK_SIZE if rank is None and block_size is None else block_size)
        shape = (*leaf.sizes("sb"), 1 if share else width // size, size * (size - 1) // 2)
        return OFT(
            base=leaf.value,
            upper=jnp.zeros(shape, jnp.float32),
            scale=layered("oft", leaf, 1.0, None),
            axes=leaf.axes,
            turns=turns,
            series=neumann_terms,
            eps=eps,
        )

    made = per_leaf(make, targets, exclude, kernels=True)
    return made if eps is None else dataclasses.replace(made, update=lambda tuned, grads, step: projected(tuned))


def turned_axes(leaf: Leaf) -> tuple[int, ...]:
    """The axes along which a leaf is turned: its inputs, channels before a window; of a table, its features."""
    if not {"i", "o"} <= set(leaf.axes) or "?" in leaf.axes:
        raise ValueError(
            f"oft: {leaf.path} has axes {leaf.axes!r}; expected a kernel with input and output axes. Leave it out with "
            "`exclude`"
        )
    letter = "o" if leaf.role is not None and leaf.role.op == "embedding" else "i"
    window = () if leaf.role is None or letter == "o" else tuple(leaf.role.window)
    return (*(k for k, x in enumerate(leaf.axes) if x == letter and k not in window), *window)


def _size(path: str, width: int, rank: int | None, size: int | None) -> int:
    """The size of a leaf's blocks."""
    asked, what = (rank, "rank") if size is None else (size, "block_size")
    assert asked is not None
    fits = [n for n in range(1, width + 1) if width % n == 0 and (n if size is not None else width // n) > 1]
    if asked not in fits:
        near = sorted(sorted(fits, key=lambda n: abs(n - asked))[:3])
        raise ValueError(
            f"oft: {what} {asked} at {path}, which is turned along {width} features; expected a divisor of {width} that "
            f"leaves blocks of two features or more (nearest: {', '.join(map(str, near)) or 'none'})"
        )
    return asked if size is not None else width // asked


def projected(tuned: Any) -> Any:
    """The tree with the trained numbers of constrained OFT within their norm."""
    return map_layers(lambda _, x: x.replace(upper=x.projected()) if isinstance(x, OFT) else x, tuned)
