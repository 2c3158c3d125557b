"""Low-rank factors: how they lie beside a weight's axes, and how they start."""

import math
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

from peftjax import compat
from peftjax.method import Leaf
from peftjax.targets import closest


def replaced(axes: str, letter: str, label: str) -> tuple[Any, ...]:
    """A leaf's axes with those of this letter replaced by one inner axis, where the first of them stood."""
    first = axes.index(letter)
    kept = [label if k == first else (k,) for k, x in enumerate(axes) if x != letter or k == first]
    return tuple(kept)


def checked(name: str, leaf: Leaf, rank: int, any_rank: bool = False) -> int:
    """The rank that a method asks of a leaf, where the leaf is a linear map that can have it; with `any_rank`, or more."""
    limit = min(map(math.prod, linear(name, leaf)))
    if rank < 1 or (rank > limit and not any_rank):
        raise ValueError(f"{name}: rank {rank} at {leaf.path} {leaf.type.str_short()}; expected 1 to {limit}")
    return rank


def linear(name: str, leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of the inputs and of the outputs of a leaf that has both."""
    n_in, n_out = leaf.sizes("i"), leaf.sizes("o")
    if (not n_in or not n_out) and leaf.unclear:
        raise ValueError(
            f"{name}: {leaf.path} {leaf.type.str_short()} has axes {leaf.axes!r}: {leaf.unclear}. Expected axes that are "
            "each of one kind; store the leaf in the shape that the model gives it by `reshape`, train it as it is with "
            "`unfreeze`, or leave it out with `exclude`"
        )
    if not n_in or not n_out:
        raise ValueError(
            f"{name}: {leaf.path} has axes {leaf.axes!r}: a vector, or no linear map; expected a kernel with input and "
            "output axes. Train it as it is with `unfreeze`, or leave it out with `exclude`"
        )
    return n_in, n_out


def layered(name: str, leaf: Leaf, value: float, layers: Sequence[int] | None) -> jax.Array:
    """A number for each layer and expert of a leaf: the value, or 0 in the layers that `layers` leaves out."""
    shape = leaf.sizes("sb")
    scale = jnp.full(shape, value, jnp.float32)
    if layers is None:
        return scale
    if "s" not in leaf.axes:
        raise ValueError(
            f"{name}: layers={tuple(layers)} at {leaf.path}, which is not stacked: name its path in `targets`"
        )
    axis = [x for x in leaf.axes if x in "sb"].index("s")
    if not len(layers):
        raise ValueError(
            f"{name}: layers=() at {leaf.path}: no layer would train; expected one at least, or None for all"
        )
    if bad := [k for k in layers if not 0 <= k < shape[axis]]:
        raise ValueError(f"{name}: layers {bad} at {leaf.path}; it stacks {shape[axis]} layers, 0 to {shape[axis] - 1}")
    on = jnp.zeros(shape[axis]).at[jnp.asarray(layers)].set(1)
    return scale * on.reshape([-1 if k == axis else 1 for k in range(len(shape))])


def limited(name: str, leaf: Leaf, uses: Sequence[str] | None) -> tuple[str, ...] | None:
    """The uses of a leaf that an overlay is limited to, where the leaf has them; None for all."""
    if uses is None:
        return None
    if not uses:
        raise ValueError(f"{name}: uses=() at {leaf.path}; expected one at least, or None for all uses")
    if leaf.role is None:
        raise ValueError(
            f"{name}: uses={tuple(uses)!r} at {leaf.path}, and only roles know its uses: pass "
            "`roles=peftjax.roles(fn, params, batch)`"
        )
    if unknown := [use for use in uses if use not in leaf.uses]:
        found = ", ".join(dict.fromkeys(leaf.uses))
        near = "; ".join(f"nearest: {', '.join(closest(str(use), list(leaf.uses), 1)) or 'none'}" for use in unknown)
        raise ValueError(f"{name}: uses={tuple(uses)!r} at {leaf.path}, which the model uses in {found} ({near})")
    return tuple(uses)


def rank_of(factor: Any, labels: Sequence[Any]) -> str:
    """What a repr says of a factor with these labels, also of one layer's, as a scan cuts it from its stack."""
    at = labels.index("rank") - len(labels)
    return f"rank={factor.shape[at]}" if len(getattr(factor, "shape", ())) >= -at else ""


Started = tuple[Any, Any, bool]


def shapes(leaf: Leaf, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `a`, which reads what the leaf reads, and of `b`, which writes what it writes."""
    size = lambda a: rank if a == "rank" else leaf.type.shape[a[0]]
    a, b = (tuple(map(size, replaced(leaf.axes, letter, "rank"))) for letter in "oi")
    return a, b


def _kaiming(leaf: Leaf, rank: int, scale: float) -> Started:
    a, b = shapes(leaf, rank)
    bound = 1 / math.sqrt(math.prod(leaf.sizes("i")))
    return jax.random.uniform(leaf.key, a, jnp.float32, -bound, bound), jnp.zeros(b, jnp.float32), False


def _gaussian(leaf: Leaf, rank: int, scale: float) -> Started:
    a, b = shapes(leaf, rank)
    return jax.random.normal(leaf.key, a, jnp.float32) / rank, jnp.zeros(b, jnp.float32), False


def _zero_a(leaf: Leaf, rank: int, scale: float) -> Started:
    a, b = shapes(leaf, rank)
    bound = 1 / math.sqrt(rank)
    return jnp.zeros(a, jnp.float32), jax.random.uniform(leaf.key, b, jnp.float32, -bound, bound), False


def _matrices(leaf: Leaf, rank: int, factors: Callable[[Any, Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Factors each (in, out) matrix of the leaf, in float32, and lays them out as the fields `a` and `b`."""
    groups = {letter: [k for k, x in enumerate(leaf.axes) if x in letter] for letter in ("sb", "i", "o")}
    order = [k for group in groups.values() for k in group]
    n_in, n_out = math.prod(leaf.sizes("i")), math.prod(leaf.sizes("o"))
    w = compat.gathered(leaf.dense.astype(jnp.float32))
    w = jnp.transpose(w, order).reshape(-1, n_in, n_out)
    a, b = jax.vmap(factors)(w, jax.random.split(leaf.key, len(w)))
    lead = [(k,) for k in groups["sb"]]
    laid = []
    for x, have, letter in (
        (a, [*lead, *((k,) for k in groups["i"]), "rank"], "o"),
        (b, [*lead, "rank", *((k,) for k in groups["o"])], "i"),
    ):
        x = x.reshape([rank if isinstance(k, str) else leaf.type.shape[k[0]] for k in have])
        laid.append(jnp.transpose(x, [have.index(k) for k in replaced(leaf.axes, letter, "rank")]))
    return laid[0], laid[1]


def _pissa(leaf: Leaf, rank: int, scale: float) -> Started:
    def factors(w: Any, key: Any) -> tuple[Any, Any]:
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(s[:rank] / abs(scale))
        return u[:, :rank] * root[None], math.copysign(1, scale) * root[:, None] * v[:rank]

    return *_matrices(leaf, rank, factors), True


def _olora(leaf: Leaf, rank: int, scale: float) -> Started:
    def factors(w: Any, key: Any) -> tuple[Any, Any]:
        q, r = jnp.linalg.qr(w.T)
        return r[:rank].T, q[:, :rank].T

    return *_matrices(leaf, rank, factors), True


def _orthogonal(leaf: Leaf, rank: int, scale: float) -> Started:
    def factors(w: Any, key: Any) -> tuple[Any, Any]:
        mixing, reads, writes = jax.random.split(key, 3)
        q, _ = jnp.linalg.qr(jax.random.normal(mixing, (rank, rank), jnp.float32))
        a = jax.random.normal(reads, (w.shape[0], rank // 2), jnp.float32) @ q[0::2] / 10
        return a, (jax.random.normal(writes, (w.shape[1], rank // 2), jnp.float32) @ q[1::2] / 10).T

    return *_matrices(leaf, rank, factors), False


INITS: dict[str, Callable[[Leaf, int, float], Started]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "zero_a": _zero_a,
    "pissa": _pissa,
    "olora": _olora,
    "orthogonal": _orthogonal,
}
FACTORED = ("pissa", "olora")  # factors of the weight itself, which has no more ranks than its smaller side


def started(name: str, init: str, leaf: Leaf, rank: int, scale: float) -> Started:
    """The factors `a` and `b` with which a method starts at a leaf, and whether their product is to be subtracted."""
    if init == "orthogonal" and rank % 2:
        raise ValueError(f"{name}: init 'orthogonal' needs an even rank, found {rank} at {leaf.path}")
    return INITS[init](leaf, rank, scale)


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `size`: (factor, size / factor) where that divides.

    Else the two with the smallest sum of those whose smaller is at most `factor`, the smaller first; -1 allows any.

    Example:
      >>> factorization(768), factorization(768, 8), factorization(10, 4), factorization(7)
      ((24, 32), (8, 96), (2, 5), (1, 7))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor < 0 else factor
    small = max((m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and m <= limit), default=1)
    return small, size // small


def orthonormality_gap(rows: Any) -> Any:
    """The Frobenius norms of `X X' - I`, (matrices,), of matrices (matrices, rank, entries)."""
    products = jnp.einsum("nrx,nsx->nrs", rows, rows, precision="highest")
    square = jnp.sum((products - jnp.eye(rows.shape[1])[None]) ** 2, (1, 2))
    # The norm has no derivative at zero; that of an orthonormal set is taken to be zero.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
