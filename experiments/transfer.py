"""Runs of transfer learning on images: the strategies, and what does one run on so many training images."""

import contextlib
import dataclasses
import functools
import io
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import jax
import ml_collections
import numpy as np
import optax
from rich.console import Console

import peftjax as pj
from experiments import baselines, images, running, vision
from experiments.data import Dataset
from experiments.images import COLUMNS, Images, batches
from experiments.ledger import mark
from experiments.schedules import warm_then_linear
from experiments.train import Check, Limits, Progress, Score, Trained, arrays, cross_entropy, predict, score, train

LISTS = ("strategies", "rows", "seeds")  # what a call goes through
FREE = (*LISTS, *running.FREE)  # what does not matter to a single run
HEAD = ("classifier",)

Strategy = Callable[[ml_collections.ConfigDict], Sequence[pj.Method]]
STRATEGIES: dict[str, Strategy] = {
    "last": lambda c: [pj.unfreeze(HEAD)],
    "few": lambda c: [pj.last_layers(c.few)],
    "whole": lambda c: [pj.full()],
    "lora": lambda c: [pj.chain(pj.lora(c.lora.rank, c.lora.alpha, targets=c.lora.targets), pj.unfreeze(HEAD))],
    "adapters": lambda c: [
        pj.chain(pj.adapter("houlsby", bottleneck=c.adapter.bottleneck, targets=c.adapter.targets), pj.unfreeze(HEAD))
    ],
    "gradual": lambda c: [*(pj.last_layers(n) for n in c.stages), pj.full()],
    "scratch": lambda c: [pj.full()],
}
PROBE = "probe"  # logistic regression on the frozen network's features
PROBED = ("data", "digest", *COLUMNS, "size", "model")  # all that it reads
OWN = {"few": "few", "lora": "lora", "adapter": "adapters", "stages": "gradual"}  # what a single strategy reads


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: how, on how many training images, and with which seed."""

    strategy: str
    rows: int
    seed: int

    def settings(self, c: ml_collections.ConfigDict) -> dict[str, Any]:
        """All that its result depends on: what it does not read may change, and it is found still."""
        unread = FREE if images.has_columns(c.data) else (*FREE, *COLUMNS)
        page = {name: value for name, value in c.to_dict().items() if name not in unread}
        if self.strategy == PROBE:
            kept = {name: page[name] for name in PROBED if name in page}
        else:
            kept = {name: value for name, value in page.items() if OWN.get(name, self.strategy) == self.strategy}
            kept["rate"] = page["rate"][self.strategy]
        return {**kept, **dataclasses.asdict(self)}

    def folder(self, c: ml_collections.ConfigDict) -> Path:
        """Where it keeps checkpoints and logs: runs that differ in any setting have their own."""
        name = f"{Path(c.data).stem}-{self.strategy}-{self.rows}-seed{self.seed}-{mark(self.settings(c))}"
        return Path(c.out) / name


@dataclasses.dataclass(frozen=True)
class Tools:
    """What the runs of one strategy share, compiled once for each of its stages.

    Attributes:
      step: the train step.
      specs: where the parameters lie on its mesh; None for one device.
      logits: of a tree and its statistics, as `experiments.train.predict` makes them.
    """

    step: pj.TrainStep
    specs: Any
    logits: Callable[..., np.ndarray]

    def state(self, tuned: Any, stats: Any, key: jax.Array) -> pj.TrainState:
        """The state before the first step."""
        return pj.train_state(tuned, self.step.tx, key=key, model_state=stats, mesh=self.step.mesh, specs=self.specs)


class Lab:
    """Does runs, one after the other, on one network and one data set.

    Args:
      c: the configuration, `completed`.
      data: the splits; the test split is opened when the first run has made its choices.
      console: where to print.
    """

    def __init__(self, c: ml_collections.ConfigDict, data: Dataset[Images], console: Console):
        self.c, self.data, self.console = c, data, console
        augment = vision.Augment(**c.augment.to_dict())
        self.model = vision.Classifier(vision.NETS[c.model], len(data.names), augment, c.momentum)
        self.params, stats = self.model.pretrained(0)
        self.roles = self.model.roles(self.params, stats, c.size)
        self._tools: dict[tuple[str, int], Tools] = {}

    @functools.cached_property
    def test(self) -> Images:
        """The test images."""
        return self.data.test.open()

    def check(self, strategies: Iterable[str]) -> None:
        """Raises, before any run, where the mesh or a method of these strategies does not fit the network."""
        running.laid(self.c, self.model.net.rules, self.params)
        for strategy in strategies:
            tuned = self.params
            for method in () if strategy == PROBE else STRATEGIES[strategy](self.c):
                init = functools.partial(method.init, jax.random.key(0), roles=self.roles)
                with contextlib.redirect_stdout(io.StringIO()):  # a run itself says what it chose
                    tuned = jax.eval_shape(init, tuned)

    def result(self, one: Run) -> dict[str, Any]:
        """What a run gives: accuracies on the three splits, seconds of training, and what trained."""
        self.console.print(f"{one.strategy}, {one.rows:,} images, seed {one.seed}")
        order = np.random.default_rng(one.seed).permutation(len(self.data.train))
        training = self.data.train[order[: one.rows]]
        try:
            result = (self._probed if one.strategy == PROBE else self._trained)(one, training)
        except FloatingPointError as error:
            result = {"failed": str(error)}
        shown = {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in result.items()}
        self.console.print("  " + ", ".join(f"{name} {value}" for name, value in shown.items()), highlight=False)
        return {**dataclasses.asdict(one), **result}

    def _trained(self, one: Run, training: Images) -> dict[str, Any]:
        tuned, stats = (self.model.initial if one.strategy == "scratch" else self.model.pretrained)(one.seed)
        methods, went = STRATEGIES[one.strategy](self.c), list[Progress]()
        for stage, method in enumerate(methods):
            tuned = method.init(jax.random.key(one.seed), tuned, self.roles)
            tools = self._made(one.strategy, stage, len(methods), tuned, stats)
            trained = self._fit(one, stage, tools, tuned, stats, training)
            tuned, stats = trained.tuned, trained.model_state
            went.append(trained.progress)
        accuracy = lambda some: score(self._logits(tools, tuned, stats, some), some.labels).value
        measured = {"training": accuracy(training[np.arange(min(len(training), self.c.measured))])}
        measured["validation"], trains = accuracy(self.data.validation), pj.count(tuned).trainable
        return {
            **measured,
            "test": accuracy(self.test),
            "seconds": sum(sum(progress.seconds) for progress in went),
            "trainable": trains,
            "best": [progress.best for progress in went],
            "skipped_steps": sum(sum(progress.skipped) for progress in went),
        }

    def _fit(self, one: Run, stage: int, tools: Tools, tuned: Any, stats: Any, training: Images) -> Trained:
        c, seed, methods = self.c, (one.seed, one.rows, stage), STRATEGIES[one.strategy](self.c)
        state = tools.state(tuned, stats, jax.random.fold_in(jax.random.key(one.seed), stage))
        plan = lambda number: batches(training, c.batch, c.steps // len(methods) // c.checks, (*seed, number))

        def validate(state: pj.TrainState, check: Check) -> Score:
            chosen_on = self.data.validation
            return score(self._logits(tools, state.tuned, state.model_state, chosen_on, check), chosen_on.labels)

        folder = one.folder(c) / f"stage{stage + 1}" if len(methods) > 1 else one.folder(c)
        with (
            running.shown(c, self.console, folder) as shown,
            running.checkpoints(c, folder, methods[stage], self.roles, one.settings(c)) as runs,
        ):
            return train(tools.step, state, plan, validate, Limits(c.checks, c.checks, c.failing), shown, runs, c.every)

    def _logits(self, tools: Tools, tuned: Any, stats: Any, some: Images, *check: Check) -> np.ndarray:
        return tools.logits((tuned, stats), batches(some, self.c.batch), len(some), *check)

    def _made(self, strategy: str, stage: int, stages: int, tuned: Any, stats: Any) -> Tools:
        """The tools of a strategy; made, and compiled, at their first use."""
        if (strategy, stage) not in self._tools:
            c, apply = self.c, self.model.applied(vision.live(tuned))
            tx = optimizer(c, c.rate[strategy], c.steps // stages, tuned, self.roles)
            mesh, specs = running.laid(c, self.model.net.rules, self.params)
            step = pj.make_train_step(apply, cross_entropy, tx, mesh)
            logits = predict(lambda both, batch: apply(both[0], batch, model_state=both[1])[0], step)
            tools = self._tools[strategy, stage] = Tools(step, specs, logits)
            batch = next(iter(batches(self.data.train, c.batch, 1).to_iter_dataset()))
            step(tools.state(tuned, stats, jax.random.key(0)), arrays(batch))
        return self._tools[strategy, stage]

    def _probed(self, one: Run, training: Images) -> dict[str, Any]:
        model = self.model.pretrained(one.seed)
        features = lambda some: self._features(model, batches(some, self.c.batch), len(some))
        features(training[: self.c.batch])  # compiles
        start = time.perf_counter()
        x, chosen_on = features(training), features(self.data.validation)
        fitted = baselines.linear(x, training.labels, chosen_on, self.data.validation.labels)
        seconds = time.perf_counter() - start
        return {
            "training": float(fitted.score(x, training.labels)),
            "validation": float(fitted.score(chosen_on, self.data.validation.labels)),
            "test": float(fitted.score(features(self.test), self.test.labels)),
            "seconds": seconds,
            "trainable": baselines.size(fitted[-1]),
            "best": [],
            "skipped_steps": 0,
        }

    @functools.cached_property
    def _features(self) -> Callable[..., np.ndarray]:
        return predict(self.model.features)


def optimizer(
    c: ml_collections.ConfigDict, rate: float, steps: int, tuned: Any, roles: pj.Roles
) -> optax.GradientTransformation:
    """AdamW under clipped gradients; where `layerwise` is below 1, early layers are trained slower."""
    made = lambda rate: optax.adamw(rate, weight_decay=c.decay)
    schedule = warm_then_linear(rate, c.warmup, steps)
    inner = made(schedule) if c.layerwise == 1 else pj.layerwise(tuned, schedule, c.layerwise, roles, optimizer=made)
    return optax.chain(optax.clip_by_global_norm(c.clip), inner)
