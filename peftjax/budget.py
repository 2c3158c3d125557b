"""How many of all ranks a method keeps as training goes on, and which: those that matter most, over the whole model."""

import dataclasses
import functools
from typing import Any, Iterator

import jax.numpy as jnp
import numpy as np

from peftjax.overlay import Overlay, layers
from peftjax.paths import flatten
from peftjax.tree import map_layers


@dataclasses.dataclass(frozen=True)
class Plan:
    """When ranks are pruned, and how far: all of them until `tinit`, then cubically fewer, the target's until the end.

    Attributes:
      target_rank: the mean rank of a matrix in the end.
      total_steps, tinit, tfinal: of training; the first steps, which prune nothing; the last ones, in which what was
        pruned stays pruned.
      delta_t: steps between two prunings.
      beta1, beta2: how slowly the averages of sensitivity and of uncertainty move.
      owner: tells plans of the same numbers apart.
    """

    target_rank: int
    total_steps: int
    tinit: int
    tfinal: int
    delta_t: int
    beta1: float
    beta2: float
    owner: Any = None

    def __post_init__(self) -> None:
        if self.tinit < 0 or self.tfinal < 0 or self.delta_t < 1 or self.tinit >= self.end:
            raise ValueError(
                f"no step is left to prune at: expected 0 <= tinit < total_steps - tfinal and delta_t of at least 1, found "
                f"tinit={self.tinit}, tfinal={self.tfinal}, delta_t={self.delta_t}, total_steps={self.total_steps}"
            )
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"expected beta1 and beta2 within (0, 1), found {self.beta1} and {self.beta2}")

    @property
    def end(self) -> int:
        """The step of the last pruning."""
        return self.total_steps - self.tfinal

    def prunes(self, step: Any) -> Any:
        """Whether ranks are chosen anew at this step."""
        between = (step > self.tinit) & (step < self.end) & (step % self.delta_t == 0)
        return between | (step == self.end)

    def averages(self, seen: Any, mean: Any, doubt: Any, step: Any) -> tuple[Any, Any]:
        """The average of what is seen, and that of its distance from it, moved at every step before the last pruning."""
        now = self.beta1 * mean + (1 - self.beta1) * seen
        spread = self.beta2 * doubt + (1 - self.beta2) * jnp.abs(seen - now)
        return jnp.where(step < self.end, now, mean), jnp.where(step < self.end, spread, doubt)

    def cutoff(self, scores: Any, matrices: int, step: Any) -> Any:
        """The score that a rank has to exceed in order to stay, where this many matrices have all these ranks."""
        falls = _falls(self, len(scores), self.target_rank * matrices)
        gone = jnp.searchsorted(jnp.asarray(falls), step, side="right")
        return jnp.where(gone > 0, jnp.sort(scores)[jnp.maximum(gone - 1, 0)], -jnp.inf)

    def penalty(self, tuned: Any) -> Any:
        """What keeps the ranks of this plan's overlays apart: the mean gap of their matrices, times its weight."""
        found = self.own(tuned)
        found = [(path, x) for path, x in found if not x.locked] or found
        return found[0][1].orth_weight * jnp.concatenate([x.gaps(name) for _, x in found for name in "ab"]).mean()

    def update(self, tuned: Any, grads: Any, step: Any) -> Any:
        """The tree after the averages of this plan's overlays moved, and their ranks were pruned where it is time."""
        step, gradients = jnp.asarray(step, jnp.int32), dict(_overlays(grads))
        moving = [(path, x) for path, x in self.own(tuned) if not x.locked]
        if not moving:
            return tuned
        if lost := [path for path, _ in moving if getattr(gradients.get(path), "e", None) is None]:
            raise ValueError(f"no gradients for {', '.join(lost)}; expected a tree like `partition(tuned)[0]`")
        seen = {path: x.observed(gradients[path], step) for path, x in moving}
        scores = [x.score() for x in seen.values()]
        cutoff = self.cutoff(jnp.concatenate([s.ravel() for s in scores]), sum(map(len, scores)), step)
        pruned = {path: x.pruned(cutoff, step) for path, x in seen.items()}
        return map_layers(lambda path, x: pruned[path].replace(base=x.base) if path in pruned else x, tuned)

    def own(self, tuned: Any) -> list[tuple[str, Any]]:
        """The overlays of this plan, and where they lie."""
        found = [(path, x) for path, x in _overlays(tuned) if getattr(x, "plan", None) == self]
        if not found:
            raise ValueError("adalora: this tree holds none of the method's overlays; was it made by another method?")
        return found


def _overlays(tree: Any) -> Iterator[tuple[str, Overlay]]:
    for path, leaf in flatten(tree):
        for depth, x in enumerate(layers(leaf)):
            yield path + "/base" * depth, x


@functools.lru_cache(maxsize=16)
def _falls(plan: Plan, full: int, target: int) -> np.ndarray:
    """The steps at which one rank fewer may stay, in order.

    At step t, `target + (full - target) (1 - (t - tinit) / (end - tinit))^3` may, rounded down in double precision.
    """
    span = plan.end - plan.tinit
    kept = [int((full - target) * (1 - k / span) ** 3 + target) for k in range(span + 1)]
    return np.repeat(np.arange(plan.tinit, plan.end + 1, dtype=np.int32), -np.diff([full, *kept]))
