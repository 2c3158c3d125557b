"""The train loop of every script: steps over epochs, a validation score after each, checkpoints, and going on from one."""

import dataclasses
import time
from typing import Any, Callable, Iterable, Mapping, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import peftjax as pj
from experiments.batches import Batch
from experiments.interruption import Interruption
from peftjax.runs import Runs

Apply = Callable[..., jax.Array]


class Shown(Protocol):
    """Where progress is shown."""

    def epoch(self, number: int, steps: int, done: int) -> None: ...
    def step(self, loss: float, rate: float) -> None: ...
    def score(self, number: int, accuracy: float, loss: float, best: bool) -> None: ...


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model does on rows: the share it gets right, and its mean cross-entropy."""

    accuracy: float
    loss: float


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
      epoch: the number of the epoch in hand, from 1.
      data: the state of its iterator, or None at its beginning.
      scores: on the validation rows, per finished epoch.
      seconds: per epoch, compilation included, validation not.
      best: the number of the best finished epoch; 0 for none.
    """

    epoch: int = 1
    data: Any = None
    scores: list[Score] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    best: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Progress":
        """The progress that `to_dict` described."""
        return cls(**{**saved, "scores": [Score(**score) for score in saved["scores"]]})


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gave: the tree and the model's state after the best epoch, and how the run went."""

    tuned: Any
    progress: Progress
    model_state: Any = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
      epochs: how many at most.
      patience: after how many epochs without a better score.
      failing: after how many steps in a row whose loss is not finite; each is left out.
    """

    epochs: int
    patience: int
    failing: int = 5


def cross_entropy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of the examples that count, and how many these are."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]) * batch["weight"]
    return each.sum(), {"weight": batch["weight"].sum()}


def train(
    step: pj.TrainStep,
    state: pj.TrainState,
    epoch: Callable[[int], grain.MapDataset],
    validate: Callable[[pj.TrainState], Score],
    limits: Limits,
    shown: Shown,
    runs: Runs | None = None,
    every: int = 0,
) -> Trained:
    """Trains until the validation score has not risen for some epochs, and keeps the best epoch.

    Args:
      step, state: of `peftjax.make_train_step` and `peftjax.train_state`.
      epoch: `epoch(number)`, the batches of an epoch, from 1.
      validate: the score of a state on rows that are not trained on. Higher accuracy is better, then lower loss.
      limits: when to stop.
      shown: where progress is shown.
      runs: where checkpoints go, after every epoch and `every` so many steps, and whence the run goes on; None for none.
        Its best checkpoint is that of the largest `epoch`.

    Raises:
      FloatingPointError: too many losses in a row were not finite; the last good state is saved.
      Interrupted: the process was asked to stop; the state is saved.
    """
    now, kept = Progress(), state
    if runs is not None and (found := runs.restore(state)) is not None:
        now = Progress.from_dict(found[1])
        best = None if runs.best is None else runs.restore(state, runs.best)
        kept, state = (found if best is None else best)[0], found[0]
    kept, saved = _copy(kept), None

    def save(**metrics: float) -> None:
        nonlocal saved
        at = (int(state.step), now.epoch)
        if runs is not None and at != saved:
            runs.save(state, data=now.to_dict(), metrics=metrics or None)
            saved = at

    with Interruption(runs) as interruption:
        while now.epoch <= limits.epochs and (now.best == 0 or now.epoch - 1 - now.best < limits.patience):
            batches = epoch(now.epoch)
            reading, before = _reading(batches, now), sum(now.seconds[now.epoch - 1 :])
            shown.epoch(now.epoch, len(batches), 0 if now.data is None else now.data["next_index"])
            start = time.perf_counter()
            for batch in reading:
                began = time.perf_counter()
                state, metrics = step(state, arrays(batch))
                loss = float(metrics["loss"])
                now.data = reading.get_state()
                now.seconds[now.epoch - 1 :] = [before + time.perf_counter() - start]
                _check(state, loss, limits, save)
                shown.step(loss, float(batch["weight"].sum()) / (time.perf_counter() - began))
                if every and int(state.step) % every == 0:
                    save()
                interruption.check(int(state.step), save)
            score = validate(state)
            now.scores.append(score)
            if better := now.best == 0 or _rank(score) > _rank(now.scores[now.best - 1]):
                now.best, kept = now.epoch, _copy(state)
            shown.score(now.epoch, score.accuracy, score.loss, better)
            now.epoch, now.data = now.epoch + 1, None
            save(**({"epoch": now.epoch - 1} if better else {}))
    if runs is not None:
        runs.wait()
    return Trained(kept.tuned, now, kept.model_state)


def _reading(batches: grain.MapDataset, now: Progress) -> Any:
    reading = iter(batches.to_iter_dataset())
    if now.data is not None:
        reading.set_state(now.data)
    return reading


def _check(state: pj.TrainState, loss: float, limits: Limits, save: Callable[[], None]) -> None:
    if (failing := int(state.failing)) < limits.failing:
        return
    save()
    raise FloatingPointError(
        f"{failing} steps in a row, up to step {int(state.step)}, had a loss ({loss}), a gradient or an update that was "
        "not finite; is the learning rate too high? The state before them is kept"
    )


def _copy(state: pj.TrainState) -> pj.TrainState:
    """The state with its own copy of what a model is made of, for a step donates that."""
    copied = lambda tree: jax.tree.map(jnp.copy, tree)
    return dataclasses.replace(state, trainable=copied(state.trainable), model_state=copied(state.model_state))


def _rank(score: Score) -> tuple[float, float]:
    return score.accuracy, -score.loss


def arrays(batch: Batch) -> Batch:
    """What the model and its loss read of a batch."""
    return {name: x for name, x in batch.items() if name != "index"}


def predict(apply: Apply, step: pj.TrainStep | None = None) -> Callable[[Any, Iterable[Batch], int], np.ndarray]:
    """Makes `logits(tuned, batches, n)`: the logits of n examples, (n, classes), in the order of their index.

    Args:
      apply: `apply(tuned, batch)`.
      step: the train step on whose mesh the tree lies; None for one device.
    """
    mesh = None if step is None else step.mesh
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    forward = jax.jit(lambda tuned, batch: (apply(tuned, arrays(batch)), batch["index"]), out_shardings=whole)

    def logits(tuned: Any, batches: Iterable[Batch], n: int) -> np.ndarray:
        found: np.ndarray | None = None
        for batch in batches:
            out, index = map(np.asarray, forward(tuned, batch if step is None else step.place(batch)))
            found = np.full((n, *out.shape[1:]), np.nan, out.dtype) if found is None else found
            found[index] = out
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
