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
Check = Callable[[], None]


class Shown(Protocol):
    """Where progress is shown."""

    def epoch(self, number: int, steps: int, done: int) -> None: ...
    def step(self, number: int, loss: float, rate: float) -> None: ...
    def score(self, number: int, score: "Score", best: bool, skipped: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model does on rows: the value by which epochs are chosen, such as accuracy, and the mean loss."""

    value: float
    loss: float


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
      epoch: the number of the epoch in hand, from 1.
      data: the state of its iterator, or None at its beginning.
      scores: on the validation rows, per finished epoch.
      losses: on the training rows, per epoch: the mean over its steps so far but those left out; NaN without any.
      skipped: per epoch, how many of its steps so far were left out, for a loss or a gradient that was not finite.
      seconds: per epoch, of its steps and of reading its batches, validation not included.
      best: the number of the best finished epoch; 0 for none.
    """

    epoch: int = 1
    data: Any = None
    scores: list[Score] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    skipped: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    best: int = 0

    def add(self, step: int, loss: float, skipped: bool, seconds: float) -> None:
        """Counts a step of the epoch in hand, the `step`-th, from 1.

        A running mean: a run that goes on has the same one to the bit.
        """
        at, before = self.epoch - 1, self.left_out
        good = step - before  # with this one, if it counts
        if not skipped:
            mean = self.losses[at] if good > 1 else 0.0
            self.losses[at:] = [mean + (loss - mean) / good]
        elif good == 1:
            self.losses[at:] = [float("nan")]
        self.skipped[at:], self.seconds[at:] = [before + skipped], [seconds]

    @property
    def left_out(self) -> int:
        """How many steps of the epoch in hand were left out."""
        return sum(self.skipped[self.epoch - 1 :])

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
      failing: after how many steps in a row whose loss is not finite; each is left out. 5: one may be an odd batch.
    """

    epochs: int
    patience: int
    failing: int = 5


def cross_entropy(logits: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of the examples that count, and how many these are."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]) * batch["weight"]
    return each.sum(), {"weight": batch["weight"].sum()}


def train(
    step: pj.TrainStep,
    state: pj.TrainState,
    epoch: Callable[[int], grain.MapDataset],
    validate: Callable[[pj.TrainState, Check], Score],
    limits: Limits,
    shown: Shown,
    runs: Runs | None = None,
    every: int = 0,
) -> Trained:
    """Trains until the validation score has not risen for some epochs, and keeps the best epoch.

    Args:
      step, state: of `peftjax.make_train_step` and `peftjax.train_state`.
      epoch: `epoch(number)`, the batches of an epoch, from 1.
      validate: `validate(state, check)`, the score of a state on rows that are not trained on. A higher value is better,
        then a lower loss. It calls `check()` after every batch, on all processes alike: there the run may be stopped.
      limits: when to stop.
      shown: where progress is shown.
      runs: where checkpoints go, after every epoch and `every` so many steps, and whence the run goes on; None for none.
        Its best checkpoint is that of the largest `epoch`.
      every: how many steps; 0 for epochs alone.

    Raises:
      FloatingPointError: too many losses in a row were not finite; the last good state is saved, if there are `runs`.
      Interrupted: the process was asked to stop; the state is saved.
    """
    going = _Going(step, state, limits, shown, runs, every)
    now = going.now
    with Interruption(runs) as interruption:
        check = lambda: interruption.check(int(going.state.step), going.save)
        while now.epoch <= limits.epochs and (now.best == 0 or now.epoch - 1 - now.best < limits.patience):
            going.train(epoch(now.epoch), check)
            going.judge(validate(going.state, check))
            check()
        if runs is not None:
            runs.wait()
            check()
    return Trained(going.kept.tuned, now, going.kept.model_state)


class _Going:
    """A run in hand: where it stands, its state, and the state after the best epoch."""

    def __init__(
        self, step: pj.TrainStep, state: pj.TrainState, limits: Limits, shown: Shown, runs: Runs | None, every: int
    ):
        self.step, self.limits, self.shown, self.runs, self.every = step, limits, shown, runs, every
        self.now, self.state, kept, self._saved = Progress(), state, state, (-1, -1)
        if runs is not None and (found := runs.restore(state)) is not None:
            self.state, self.now = found[0], Progress.from_dict(found[1])
            best = None if runs.best is None else runs.restore(state, runs.best)
            kept = (found if best is None else best)[0]
        self.kept = _copy(kept)

    def train(self, batches: grain.MapDataset, check: Check) -> None:
        """Goes through the rest of an epoch."""
        now, reading = self.now, iter(batches.to_iter_dataset())
        done = 0 if now.data is None else now.data["next_index"]
        if now.data is not None:
            reading.set_state(now.data)
        self.shown.epoch(now.epoch, len(batches), done)
        start = time.perf_counter() - sum(now.seconds[now.epoch - 1 :])
        for done, batch in enumerate(reading, done + 1):
            began = time.perf_counter()
            self.state, metrics = self.step(self.state, arrays(batch))
            loss = float(metrics["loss"])
            now.data = reading.get_state()
            now.add(done, loss, int(self.state.failing) > 0, time.perf_counter() - start)
            self._check(loss)
            number = int(self.state.step)
            self.shown.step(number, loss, float(batch["weight"].sum()) / (time.perf_counter() - began))
            if self.every and number % self.every == 0:
                self.save()
            check()

    def judge(self, score: Score) -> None:
        """Ends an epoch, with its score."""
        now = self.now
        now.scores.append(score)
        if better := now.best == 0 or _rank(score) > _rank(now.scores[now.best - 1]):
            now.best, self.kept = now.epoch, _copy(self.state)
        self.shown.score(now.epoch, score, better, now.left_out)
        now.epoch, now.data = now.epoch + 1, None
        self.save(**({"epoch": now.epoch - 1} if better else {}))

    def save(self, **metrics: float) -> None:
        """Saves the state, unless it was."""
        at = (int(self.state.step), self.now.epoch)
        if self.runs is not None and at != self._saved:
            self.runs.save(self.state, data=self.now.to_dict(), metrics=metrics or None)
            self._saved = at

    def _check(self, loss: float) -> None:
        if (failing := int(self.state.failing)) < self.limits.failing:
            return
        self.save()
        where = "was not kept, which --config.resume=auto does" if self.runs is None else f"is in {self.runs.folder}"
        raise FloatingPointError(
            f"{failing} steps in a row, up to step {int(self.state.step)}, had a loss ({loss}), a gradient or an update "
            f"that was not finite; is the learning rate too high? The state before them {where}"
        )


def _copy(state: pj.TrainState) -> pj.TrainState:
    """The state with its own copy of what a model is made of, for a step donates that."""
    copied = lambda tree: jax.tree.map(jnp.copy, tree)
    return dataclasses.replace(state, trainable=copied(state.trainable), model_state=copied(state.model_state))


def _rank(score: Score) -> tuple[float, float]:
    return score.value, -score.loss


def arrays(batch: Batch) -> Batch:
    """What the model and its loss read of a batch."""
    return {name: x for name, x in batch.items() if name != "index"}


def predict(
    apply: Apply, step: pj.TrainStep | None = None, longest: int | None = None
) -> Callable[..., np.ndarray]:
    """Makes `outputs(tuned, batches, n)`: the outputs of n examples, (n, ...), in the order of their index.

    A fourth argument is called after every batch: it may raise, and stop it all.

    Args:
      apply: `apply(tuned, batch)`.
      step: the train step on whose mesh the tree lies; None for one device.
      longest: of outputs per token, the length that each is filled up to, with zeros.
    """
    mesh = None if step is None else step.mesh
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def run(tuned: Any, batch: Batch) -> tuple[jax.Array, Any]:
        out = apply(tuned, arrays(batch))
        wide = [(0, longest - out.shape[1] if longest and axis == 1 else 0) for axis in range(out.ndim)]
        return jnp.pad(out, wide), batch["index"]

    forward = jax.jit(run, out_shardings=whole)

    def outputs(tuned: Any, batches: Iterable[Batch], n: int, check: Check = lambda: None) -> np.ndarray:
        found: np.ndarray | None = None
        for batch in batches:
            out, index = map(np.asarray, forward(tuned, batch if step is None else step.place(batch)))
            found = np.full((n, *out.shape[1:]), np.nan, out.dtype) if found is None else found
            found[index] = out
            check()
        if found is None or np.isnan(found).any():
            raise FloatingPointError(f"{n} examples, and not every one has a finite result")
        return found

    return outputs


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """The accuracy and the mean cross-entropy of logits (N, classes) for labels (N,)."""
    each = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    return Score(float((logits.argmax(1) == labels).mean()), float(each.mean()))
