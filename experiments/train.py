"""The train loop: what trains, on batches of examples, with a validation score after every epoch."""

import dataclasses
import time
from typing import Any, Callable, Iterable, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from experiments.batches import Batch

Apply = Callable[[Any, Batch, jax.Array | None], jax.Array]


class Shown(Protocol):
    """Where progress is shown."""

    def epoch(self, number: int, steps: int) -> None: ...
    def step(self, loss: float, rate: float) -> None: ...
    def score(self, number: int, accuracy: float, loss: float, best: bool) -> None: ...


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model does on rows: the share it gets right, and its mean cross-entropy."""

    accuracy: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
      tuned: the tree after the best epoch.
      best: the number of that epoch, from 1.
      scores: on the validation rows, per epoch.
      seconds: per epoch, compilation included, validation not.
    """

    tuned: Any
    best: int
    scores: list[Score]
    seconds: list[float]


def train(
    apply: Apply,
    tuned: Any,
    tx: optax.GradientTransformation,
    epoch: Callable[[int], Iterable[Batch]],
    validate: Callable[[Any], Score],
    key: jax.Array,
    epochs: int,
    patience: int,
    shown: Shown,
) -> Trained:
    """Trains until the validation score has not risen for `patience` epochs, and keeps the best epoch.

    Args:
      apply: `apply(tuned, batch, key)`, logits; dropout is active where the key is not None.
      tuned: a tree with overlays.
      tx: the optimizer of what trains.
      epoch: `epoch(number)`, the batches of an epoch, from 1.
      validate: the score of a tuned tree on rows that are not trained on. Higher accuracy is better, then lower loss.
      key: what dropout draws from; each step folds its number in.
      epochs: how many at most.
      patience: after how many epochs without a better score to stop.
      shown: where progress is shown.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    step = jax.jit(_step(apply, tx), donate_argnums=(0, 2))
    trainable, frozen = pj.partition(tuned)
    trainable = _copy(trainable)  # a step donates its buffers, and the caller's are not ours to give
    state, count, kept = tx.init(trainable), 0, trainable
    scores, seconds, best = list[Score](), list[float](), 0
    for number in range(1, epochs + 1):
        start, batches = time.perf_counter(), list(epoch(number))
        shown.epoch(number, len(batches))
        for batch in batches:
            began = time.perf_counter()
            at = jax.random.fold_in(key, count)
            trainable, state, loss = step(trainable, frozen, state, at, _arrays(batch))
            if not np.isfinite(value := float(loss)):
                raise FloatingPointError(f"the loss is {value} at step {count}: is the learning rate too high?")
            count += 1
            shown.step(value, float(batch["weight"].sum()) / (time.perf_counter() - began))
        seconds.append(time.perf_counter() - start)
        scores.append(validate(pj.combine(trainable, frozen)))
        if best == 0 or _rank(scores[-1]) > _rank(scores[best - 1]):
            best, kept = number, _copy(trainable)
        shown.score(number, scores[-1].accuracy, scores[-1].loss, best == number)
        if number - best >= patience:
            break
    return Trained(pj.combine(kept, frozen), best, scores, seconds)


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _rank(score: Score) -> tuple[float, float]:
    return score.accuracy, -score.loss


def _arrays(batch: Batch) -> Batch:
    return {name: x for name, x in batch.items() if name != "index"}


def _step(apply: Apply, tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(trainable: Any, frozen: Any, state: Any, key: jax.Array, batch: Batch) -> Any:
        def loss(trainable: Any) -> jax.Array:
            model, adapters = jax.random.split(key)
            logits = apply(pj.with_key(pj.combine(trainable, frozen), adapters), batch, model)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return (each * batch["weight"]).sum() / batch["weight"].sum()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def predict(apply: Apply) -> Callable[[Any, Iterable[Batch], int], np.ndarray]:
    """Makes `logits(tuned, batches, n)`: the logits of n examples, (n, classes), in the order of their index."""
    forward = jax.jit(lambda tuned, batch: apply(tuned, batch, None))

    def logits(tuned: Any, batches: Iterable[Batch], n: int) -> np.ndarray:
        found: np.ndarray | None = None
        for batch in batches:
            out = np.asarray(forward(tuned, _arrays(batch)))
            found = np.full((n, *out.shape[1:]), np.nan, out.dtype) if found is None else found
            found[batch["index"]] = out
        if found is None or np.isnan(found).any():
            raise ValueError(f"{n} examples, and not every one has a finite result")
        return found

    return logits


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """The score of logits (N, classes) for labels (N,)."""
    logits = logits.astype(np.float64)
    top = logits.max(1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    loss = log_sum - logits[np.arange(len(labels)), labels]
    return Score(float((logits.argmax(1) == labels).mean()), float(loss.mean()))
