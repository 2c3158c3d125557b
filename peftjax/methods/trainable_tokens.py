"""Trainable tokens: chosen rows of a table of embeddings, and of the head that shares it."""

from typing import Any, Sequence

import jax.numpy as jnp
import numpy as np

from peftjax import compat
from peftjax.factored import Factor, Term
from peftjax.method import Leaf, Method, method, per_leaf
from peftjax.overlay import Overlay, atoms, frozen, overlay, static, trained
from peftjax.picks import Pick
from peftjax.roles import Roles
from peftjax.targets import Targets
from peftjax.token_table import words
from peftjax.weight import materialise


@overlay
class Tokens(Overlay):
    """W with the entries `ids` along its axis of the vocabulary replaced: `scale rows + (1 - scale) W` there."""

    base: Any = frozen()
    rows: Any = trained()
    scale: Any = frozen()
    ids: tuple[int, ...] = static()
    axis: int = static()
    axes: str = static()
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The rows have the axes of W, that of the vocabulary for the chosen ones alone; the scale the stacked ones."""
        rows = tuple("token" if k == self.axis else (k,) for k in range(len(self.axes)))
        return {"rows": rows, "scale": atoms(self.axes, "sb")}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The base's terms without the chosen rows, and these: where either acts, the other is zero, exactly."""
        labels, size, n = self.labels(), self.type.shape[self.axis], len(self.ids)
        ids, vocabulary = jnp.asarray(self.ids, jnp.int32), (self.axis,)
        kept = jnp.ones((*self.scale.shape, size), jnp.float32).at[..., ids].set(1 - self.scale[..., None])
        place = jnp.full(size, n, jnp.int32).at[ids].set(jnp.arange(n, dtype=jnp.int32))
        axes = (*(k for (k,) in labels["scale"]), self.axis)
        rest = Factor(compat.beside(kept, self.bottom, axes), (*labels["scale"], vocabulary))
        picked = Pick(compat.beside(place, self.bottom, axes[-1:]), (vocabulary,), label="token", count=n)
        rows = (Factor(self.rows, labels["rows"]), Factor(self.scale, labels["scale"]), picked)
        return (*(term.times(rest) for term in terms), Term(factors=rows))

    def folded(self) -> "Tokens":
        """The same operator with a scale of 1."""
        rows = compat.take(materialise(self), jnp.asarray(self.ids, jnp.int32), self.axis).astype(jnp.float32)
        return self.replace(rows=rows, scale=jnp.ones_like(self.scale))

    def summary(self) -> str:
        """How many tokens it has."""
        return f"tokens={len(self.ids)}"


@method
def trainable_tokens(tokens: Sequence[int], *, targets: Targets | None = None, exclude: Targets = ()) -> Method:
    """Trains chosen rows of a table of embeddings: `W' = W`, but `W'[tokens] = R`, wherever the model uses it.

    A head that is tied to the table, one leaf for both, has the new rows too. A lookup costs what it cost before, and
    makes no other table: it looks among the rows for the tokens that are there.

    Args:
      tokens: their ids: new ones that the table has room for, or such that should mean something else.
      targets: the table; None finds it by the roles, where the model looks up one table only. A head by itself, a linear
        kernel (D, vocabulary), trains those outputs.
      exclude: leaves to leave out; wins over `targets`.

    Returns:
      The method. R is W with the tokens alone along its axis of the vocabulary, (n, D), float32, and starts as W's own
      rows. It holds values and not differences, as Hugging Face's files do, so what is merged is R itself to the bit, and
      the start is exact for lookups; the product of a tied head is that of another matrix, and equal to rounding.
      Without roles, a leaf of two axes is a table (vocabulary, D).

    Raises:
      ValueError: no ids, ids twice or outside the vocabulary, no table or more than one, neither roles nor targets, a
        leaf with other than one axis for the vocabulary, a pattern that matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, ids: params["words"][ids]
      >>> params, ids = {"words": jnp.zeros((5, 2))}, jnp.array([1, 4])
      >>> apply, tuned = pj.attach(pj.trainable_tokens((4, 0)), fn, params, ids, key=jax.random.key(0))
      >>> tuned["words"], tuned["words"].rows.shape
      (Tokens(float32[5,2], tokens=2), (2, 2))
      >>> apply(pj.insert(tuned, {"words/rows": jnp.array([[1.0, 2.0], [3.0, 4.0]])}), ids)
      Array([[0., 0.],
             [1., 2.]], dtype=float32)

    Reference: Hugging Face peft's TrainableTokens, and `trainable_token_indices` of its LoRA.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"trainable_tokens: expected a sequence of integers, the ids of tokens, found {tokens!r}")
    if len(set(ids.tolist())) < len(ids):
        twice = sorted({i for i in ids.tolist() if ids.tolist().count(i) > 1})
        raise ValueError(f"trainable_tokens: {twice} stand twice among the ids")

    def make(leaf: Leaf) -> Tokens:
        axis = _vocabulary(leaf)
        size = leaf.type.shape[axis]
        if out := [i for i in ids.tolist() if not 0 <= i < size]:
            raise ValueError(f"trainable_tokens: ids {out} at {leaf.path}, whose vocabulary has {size} tokens")
        return Tokens(
            base=leaf.value,
            rows=compat.take(leaf.dense, jnp.asarray(ids), axis).astype(jnp.float32),
            scale=jnp.ones(leaf.sizes("sb"), jnp.float32),
            ids=tuple(ids.tolist()),
            axis=axis,
            axes=leaf.axes,
        )

    def start(key: Any, params: Any, roles: Roles | None) -> Any:
        found = (words("trainable_tokens", roles),) if targets is None else targets
        return per_leaf(make, found, exclude, kernels=roles is not None).init(key, params, roles)

    return Method(name="", options={}, start=start, identity_at_init=False)


def _vocabulary(leaf: Leaf) -> int:
    """The axis along which tokens lie: of a table that is looked up, and of a kernel that puts out their scores."""
    letter = "i" if leaf.role is None or leaf.role.op == "embedding" else "o"
    found = [k for k, x in enumerate(leaf.axes) if x == letter]
    if len(found) != 1 or len(leaf.sizes("io")) != 2 or (leaf.role is not None and leaf.role.op == "conv"):
        raise ValueError(
            f"trainable_tokens: {leaf.path} has axes {leaf.axes!r}; expected a table (vocabulary, D), or a head "
            "(D, vocabulary)"
        )
    return found[0]
