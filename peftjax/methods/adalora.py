"""AdaLoRA: a product like an SVD beside each weight, whose ranks go where they matter most."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from peftjax import compat
from peftjax.budget import Plan
from peftjax.factored import Factor, Term
from peftjax.lowrank import checked, layered, orthonormality_gap, replaced, shapes
from peftjax.method import Leaf, Method, check_alone, method, per_leaf
from peftjax.overlay import Overlay, atoms, frozen, overlay, static, trained
from peftjax.targets import Targets


AVERAGES = ("sensitivity", "uncertainty")


@overlay
class AdaLoRA(Overlay):
    """`W + scale A diag(e) B`; of A's columns, e's entries and B's rows, the ranks in `kept` have not been pruned.

    The averages of each trained field's sensitivity and uncertainty, and `kept`, are what `update` goes by.
    """

    base: Any = frozen()
    a: Any = trained()
    e: Any = trained()
    b: Any = trained()
    scale: Any = frozen()
    kept: Any = frozen()
    sensitivity_a: Any = frozen()
    sensitivity_e: Any = frozen()
    sensitivity_b: Any = frozen()
    uncertainty_a: Any = frozen()
    uncertainty_e: Any = frozen()
    uncertainty_b: Any = frozen()
    key: Any = frozen(default=None)
    axes: str = static()
    plan: Plan = static()
    orth_weight: float = static(default=0.5)
    dropout: float = static(default=0.0)
    locked: tuple[str, ...] = static(default=())
    guided = True

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """A keeps the axes that W reads and B those that it writes, e the stacked ones; the averages lie likewise."""
        stacked = atoms(self.axes, "sb")
        fields = {"a": replaced(self.axes, "o", "rank"), "e": (*stacked, "rank"), "b": replaced(self.axes, "i", "rank")}
        averages = {f"{kind}_{name}": fields[name] for kind in AVERAGES for name in fields}
        return {**fields, **averages, "kept": fields["e"], "scale": stacked, "key": stacked}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The base's terms and the product."""
        labels = self.labels()
        factors = tuple(Factor(getattr(self, name), labels[name]) for name in ("a", "e", "b", "scale"))
        key = None if self.key is None else Factor(self.key, labels["key"])
        return (*terms, Term(factors=factors, key=key, rate=self.dropout))

    def summary(self) -> str:
        """Its rank before pruning."""
        return f"rank={self.e.shape[-1]}" if hasattr(self.e, "shape") else ""

    def rows(self, name: str, array: Any) -> Any:
        """An array with the axes of this field, as (matrices, rank, entries), whole on every device."""
        array = compat.gathered(array)
        labels, kept = self.labels()[name], self.labels()["e"]
        own = [k for k, label in enumerate(labels) if label not in kept]
        order = [*map(labels.index, kept), *own]
        return jnp.transpose(array, order).reshape(-1, self.e.shape[-1], math.prod(array.shape[k] for k in own))

    def score(self) -> Any:
        """How much each rank matters, (matrices, rank): by its entry of e, and on average in A's column and B's row."""
        matters = lambda name: getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}")
        e, a, b = (self.rows(name, matters(name)).mean(-1) for name in "eab")
        return e + (a + b)

    def gaps(self, name: str) -> Any:
        """How far the columns of A, or the rows of B, of each matrix are from an orthonormal set."""
        return orthonormality_gap(self.rows(name, getattr(self, name)))

    def observed(self, grads: Any, step: Any) -> "AdaLoRA":
        """With the averages moved by |parameter * gradient|."""
        moved: dict[str, Any] = {}
        for name in "aeb":
            fields = [f"{kind}_{name}" for kind in AVERAGES]
            seen = jnp.abs(getattr(self, name) * getattr(grads, name))
            moved |= zip(fields, self.plan.averages(seen, getattr(self, fields[0]), getattr(self, fields[1]), step))
        return self.replace(**moved)

    def pruned(self, cutoff: Any, step: Any) -> "AdaLoRA":
        """With ranks chosen anew where it is time, and those not chosen at zero then, and after the last time."""
        prunes = self.plan.prunes(step)
        chosen = compat.like((self.score() > cutoff).reshape(self.kept.shape), compat.type_of(self.kept))
        kept = jnp.where(prunes, chosen, self.kept)
        return self.replace(kept=kept, e=jnp.where(~kept & (prunes | (step > self.plan.end)), 0, self.e))


@method
def adalora(
    rank: int = 12,
    target_rank: int = 8,
    alpha: float | None = None,
    *,
    total_steps: int,
    tinit: int = 0,
    tfinal: int = 0,
    delta_t: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth_weight: float = 0.5,
    dropout: float = 0.0,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    any_rank: bool = False,
) -> Method:
    """Adds a product that is pruned as it trains: `y = x W + s ((x A) * e) B`, with `s = alpha / (rank + 1e-5)`.

    A train step adds the method's `penalty(tuned)` to the loss, which keeps A's columns and B's rows apart:
    `orth_weight * mean over all A, B of ||A' A - I||, ||B B' - I||` (Frobenius). After the optimizer it runs
    `update(tuned, grads, step)`, with the gradients of that step and its number from 0. From `tinit` on, every `delta_t`
    steps, this sets to zero those entries of e that matter least in the whole model, so that `target_rank` for each matrix
    are left, on average, at `total_steps - tfinal`; these do not change any more. What was pruned before may come back.

    Args:
      rank: the rank of each matrix at the start; A is (in..., rank), e (rank,) and B (rank, out...), float32. 12 as in
        the paper, one and a half times the target.
      target_rank: the mean rank in the end; 8 as in Hugging Face's peft.
      alpha: the numerator of the scale s, not 0; None means `rank`. The scale stays when ranks are pruned.
      total_steps: of training; the pruning is laid over them, so there is no default.
      tinit: the first steps, in which all ranks train; 0, as 0 and 1 of `tfinal` and `delta_t`, is peft's.
      tfinal: the last ones, in which those that were pruned stay at zero. With 0, the last pruning would be at a step that
        is not run any more; the one before leaves the target or little more.
      delta_t: how many steps from one pruning to the next.
      beta1, beta2: how slowly the averages move by which entries are judged, 0.85 as in the paper: of the sensitivity
        `|p dL/dp|`, and of its distance from its own average. The score of a rank is the product of both for its entry
        of e, plus the means of the products over its column of A and its row of B.
      orth_weight: the weight of the penalty; 0.5 as in peft.
      dropout: rate at which the input of A is dropped, 0 for none; active under `peftjax.with_key` only.
      targets: the weights to tune; by default every linear kernel but embeddings and the output head. Layers that a scan
        stacks, and experts, are matrices of their own, each with its share of the ranks.
      exclude: weights to leave out; wins over `targets`.
      any_rank: allows ranks above a weight's smaller side, which add nothing but are in files of other libraries.

    Returns:
      The method. A and B start normal of deviation 0.02, e at zero. The averages and the choice are frozen fields of the
      overlays: `update` is a pure function that can be jitted with a traced step, and the tree holds all of its state.

    Raises:
      ValueError: a target below 1 or above the rank, steps that leave no time to prune, averages outside (0, 1), an alpha
        of 0, a negative orth_weight, a dropout outside [0, 1), a rank above the smaller side of a weight, a weight that
        trains an AdaLoRA already, a pattern that matches nothing; in `update`, a tree without its overlays or gradients.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> method = pj.adalora(rank=2, target_rank=1, total_steps=10)
      >>> tuned = method.init(jax.random.key(0), {"w": jnp.ones((4, 3))})
      >>> tuned["w"], tuned["w"].e.shape, tuned["w"].kept
      (AdaLoRA(float32[4,3], rank=2), (2,), Array([ True,  True], dtype=bool))
      >>> tuned = pj.insert(tuned, pj.extract(tuned) | {"w/e": jnp.array([0.1, 0.2])})
      >>> apply = pj.wrap(lambda params, x: x @ params["w"])
      >>> loss = lambda tuned, x: (apply(tuned, x) ** 2).mean() + method.penalty(tuned)
      >>> grads = pj.value_and_grad(loss)(tuned, jnp.ones((5, 4)))[1]
      >>> int(method.update(tuned, grads, 9)["w"].kept.sum())
      1

    Reference: Zhang et al. 2023, arXiv 2303.10512. As in Hugging Face's peft, the penalty is a norm and not its square,
    the scale stays that of the first rank, and ranks whose score ties with the best one to go, go too.
    """
    if not 1 <= target_rank <= rank:
        raise ValueError(f"adalora: target_rank is {target_rank}, expected 1 to the rank at the start, {rank}")
    if orth_weight < 0 or not 0 <= dropout < 1:
        raise ValueError(f"adalora: expected orth_weight from 0 and dropout in [0, 1), found {orth_weight}, {dropout}")
    hashable = lambda which: tuple(which) if isinstance(which, list) else which
    owner = (rank, alpha, dropout, orth_weight, hashable(targets), hashable(exclude))
    plan = Plan(target_rank, total_steps, tinit, tfinal, delta_t, beta1, beta2, owner)

    def make(leaf: Leaf) -> AdaLoRA:
        r = checked("adalora", leaf, rank, any_rank)
        check_alone("adalora", leaf, AdaLoRA)
        drawn = zip(jax.random.split(leaf.key), shapes(leaf, r))
        a, b = (0.02 * jax.random.normal(key, shape, jnp.float32) for key, shape in drawn)
        fields = {"a": a, "e": jnp.zeros((*leaf.sizes("sb"), r), jnp.float32), "b": b}
        averages = {f"{kind}_{name}": jnp.zeros_like(x) for name, x in fields.items() for kind in AVERAGES}
        return AdaLoRA(
            base=leaf.value,
            **(fields | averages),  # type: ignore[arg-type]
            scale=layered("adalora", leaf, (r if alpha is None else alpha) / (r + 1e-5), None),
            kept=jnp.ones(fields["e"].shape, bool),
            axes=leaf.axes,
            plan=plan,
            orth_weight=orth_weight,
            dropout=dropout,
        )

    made = per_leaf(make, targets, exclude, kernels=True)
    return dataclasses.replace(made, penalty=plan.penalty, update=plan.update)
