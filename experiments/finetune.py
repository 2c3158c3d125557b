"""Fine-tunes a BERT on texts: by default MiniLM on movie reviews, with LoRA.

python experiments/finetune.py
python experiments/finetune.py --config.method=adapter --config.seed=1
python experiments/finetune.py --config.data=mine.csv --config.text=sentence --config.label=mood
python experiments/finetune.py --config.task=regress
python experiments/finetune.py --config.task=tokens --config.data=names.jsonl --config.method=prefix
python experiments/finetune.py --config.task=span --config.data=questions.jsonl --config.length=256
python experiments/finetune.py --config.mesh=data:-1 --config.resume=auto

launch.md beside this file says how to run it on many machines.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any, Callable, Mapping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import ml_collections
import numpy as np
import optax
from absl import app
from rich.console import Console

import peftjax as pj
from experiments import data, display, pages, processes, recipes, record, running, tasks
from experiments.baselines import Baseline, Baselines, Encode, Features
from experiments.batches import Batch, batches, first_of_each, one_of_each
from experiments.data import Rows
from experiments.models import load
from experiments.models.bert import RULES
from experiments.schedules import at_rate
from experiments.tasks import Encoded, Result
from experiments.text_model import ADAPTER, Page, TextModel
from experiments.train import Check, Limits, Score, Trained, arrays, predict, train


def start(c: ml_collections.ConfigDict, console: Console) -> list[Result]:
    """Joins the other processes of the run, if there are any, and runs; the first one prints."""
    processes.join(c)
    return run(c, console if processes.is_first() else Console(quiet=True))


def run(c: ml_collections.ConfigDict, console: Console) -> list[Result]:
    """Trains as the configuration says, tests once, saves the adapter, and prints and records the results.

    Of several processes all train and test, and the first one saves and records.

    Args:
      c: as `configs/reviews.py` describes it.
      console: where to print.

    Returns:
      The baselines and, last, this run.
    """
    running.check(c)
    task, rows = tasks.read(c)
    model = TextModel(Page(c.model, "each" if task.per_token else c.pool, c.length, c.fixed, task), c.dropout)
    begin = time.perf_counter()
    fitted = fit(c, model, rows.train, rows.validation, console)
    seconds = time.perf_counter() - begin

    folder = folder_of_run(c)
    if processes.is_first():  # before all that could fail now, it is on the disk
        pj.save(folder / ADAPTER, fitted.tuned, fitted.method, pj.roles(model, model.params, _example(model, c.batch)))
        model.page.write(folder)
    test = rows.test.open()
    trains = pj.count(fitted.tuned).trainable
    mine = Baseline(f"this run ({c.method})", fitted.answers(test), trains, seconds)
    others = computed(task.baselines(rows, test, features(c, model)), console)
    results = [task.result(one, test) for one in (*others, mine)]
    if not processes.is_first():
        return results
    record.append(Path(c.out) / "results.jsonl", c.to_dict(), _numbers(results, fitted.trained))
    console.print(display.table(results, len(test)))
    progress = fitted.trained.progress
    console.print(f"best epoch {progress.best} of {len(progress.scores)}; the adapter is in {folder}", soft_wrap=True)
    return results


def computed(baselines: Baselines, console: Console) -> list[Baseline]:
    """What a run has to beat; says which baseline these rows do not allow, and why."""
    made = []
    for name, baseline in baselines.items():
        try:
            made.append(baseline())
        except ValueError as error:
            console.print(f"the baseline {name!r} is left out: {error}")
    return made


def features(c: ml_collections.ConfigDict, model: TextModel) -> Features:
    """Makes what compiles the frozen encoder for rows, and gives it as a function of such rows."""
    run = predict(model.features)

    def encode(rows: Rows) -> np.ndarray:
        return run(model.params, batches(model.tokens(rows.texts), {}, c.batch, model.widths), len(rows))

    def compiled(*some: Rows) -> Encode:
        for rows in some:
            encode(rows[first_of_each(model.tokens(rows.texts), model.widths)[1]])
        return encode

    return compiled


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training gave.

    Attributes:
      trained: the tree on the mesh, and how the run went.
      tuned: the tree, on this process alone.
      method: that made it.
      answers: what the tuned model says of rows.
    """

    trained: Trained
    tuned: Any
    method: pj.Method
    answers: Callable[[Rows], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What runs of one method share: the step, what gives outputs, and the lengths of batches that were compiled."""

    step: pj.TrainStep
    run: Callable[..., np.ndarray]
    widths: set[int] = dataclasses.field(default_factory=set)

    def compile(self, begin: Callable[[], pj.TrainState], each: list[Batch], console: Console) -> None:
        """Takes a step of each new shape, and forgets it: the seconds of an epoch are then those of training."""
        new = {width: batch for batch in each if (width := batch["ids"].shape[1]) not in self.widths}
        if not new:
            return
        start, state = time.perf_counter(), begin()
        for batch in new.values():
            state, _ = self.step(state, arrays(batch))
        jax.block_until_ready(state.step)
        self.widths.update(new)
        seconds = time.perf_counter() - start
        console.print(f"compiled {len(new)} steps, one for each length of a batch, in {seconds:.0f} s")


Tools = dict[Any, Compiled]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run leaves its checkpoints and logs, and the run that it is.

    Attributes:
      folder: of this run alone.
      settings: the values on which it depends, beside what is free; with others, its checkpoints are not gone on from.
    """

    folder: Path
    settings: Mapping[str, Any]


def place(c: ml_collections.ConfigDict) -> Place:
    """That of the run of a page."""
    return Place(folder_of_run(c), {**c.to_dict(), **identity(c)})


def identity(c: ml_collections.ConfigDict) -> dict[str, str]:
    """What, beside their names, tells the files and folders that a page names from what they held before."""
    return {**data.identity(c.data), **load.identity(c.model)}


def fit(
    c: ml_collections.ConfigDict,
    model: TextModel,
    training: Rows,
    validation: Rows,
    console: Console,
    tools: Tools | None = None,
    where: Place | None = None,
) -> Fitted:
    """Trains on some rows and chooses the epoch on others.

    Args:
      c, model: the page and the model.
      training, validation: the rows.
      console: where to print.
      tools: what earlier runs of this model compiled, to which this one adds: runs that differ in their learning rate,
        seed and rows alone share it.
      where: the run's place; by default that of the page. Runs that a page does not tell apart need their own.

    Raises:
      ValueError: fewer rows than a batch, a mesh that several processes lack, or a method that is not known.
    """
    if jax.process_count() > 1 and not c.mesh:
        raise ValueError(f"{jax.process_count()} processes share one mesh; set --config.mesh=, such as data:-1")
    if len(training) < c.batch:
        raise ValueError(f"{len(training)} rows to train on are fewer than a batch of {c.batch}; set --config.batch=")
    task, longest = model.page.task, model.widths[-1]
    examples, chosen_on = task.encoded(model.tokens, training), task.encoded(model.tokens, validation)
    plan = functools.partial(batches, size=c.batch, widths=model.widths)
    steps = c.epochs * len(plan(examples.ids, examples.columns))

    init, dropout = jax.random.split(jax.random.key(c.seed))
    method, roles = recipes.method(c, steps), pj.roles(model, model.params, _example(model, c.batch))
    tuned = method.init(init, model.fresh(init) if c.method == recipes.SCRATCH else model.params, roles)
    console.print(f"{method.name} {c.method}: {pj.count(tuned)}")
    mesh, specs = running.laid(c, RULES, model.params)
    tx = optimizer(c, steps)
    begin = lambda: pj.train_state(tuned, tx, key=dropout, mesh=mesh, specs=specs)
    tools, same = {} if tools is None else tools, (repr(method), c.mesh, c.accumulate, c.decay, c.clip)
    if same not in tools:
        step = pj.make_train_step(model.apply, task.loss, tx, mesh, method=method, accumulate=c.accumulate)
        tools[same] = Compiled(step, predict(model.apply, step, longest if task.per_token else None))
    step, run = tools[same].step, tools[same].run
    each = one_of_each(examples.ids, examples.columns, c.batch, model.widths, step.share)
    tools[same].compile(begin, each, console)
    epoch = lambda number: plan(examples.ids, examples.columns, seed=(c.seed, number), share=step.share)

    def outputs(tuned: Any, encoded: Encoded, *check: Check) -> np.ndarray:
        return run(tuned, plan(encoded.ids, encoded.inputs, share=step.share), len(encoded.ids), *check)

    everything = chosen_on.everything(longest)

    def validate(state: pj.TrainState, check: Check) -> Score:
        out = outputs(state.tuned, chosen_on, check)
        value = task.scores(task.answers(out, chosen_on), validation)[task.metric]
        loss, aux = task.loss(jax.numpy.asarray(out), everything)
        return Score(value, float(loss / aux["weight"]))

    where = place(c) if where is None else where
    with (
        running.shown(c, console, where.folder, task.metric) as shown,
        running.checkpoints(c, where.folder, method, roles, where.settings) as runs,
    ):
        trained = train(step, begin(), epoch, validate, Limits(c.epochs, c.patience, c.failing), shown, runs, c.every)

    def answers(rows: Rows) -> np.ndarray:
        encoded = task.read_texts(model.tokens, rows.texts)
        return task.answers(outputs(trained.tuned, encoded), encoded)

    own = processes.whole(trained.tuned, tuned)
    if c.method == recipes.SCRATCH:  # what trained, which is all, over the parameters that are there to be read again
        own = pj.insert(method.init(init, model.params, roles), pj.extract(own))
    return Fitted(trained, own, method, answers)


def folder_of_run(c: ml_collections.ConfigDict) -> Path:
    """Where the run of a configuration leaves what it made."""
    task = "" if c.task == "classify" else f"-{c.task}"
    return Path(c.out) / f"{Path(c.data).stem}{task}-{c.method}-seed{c.seed}"


def optimizer(c: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW under clipped gradients; the rate rises linearly, then falls linearly to 0."""
    rate = at_rate(c.rate[c.method], c.warmup, steps)
    return optax.chain(
        optax.clip_by_global_norm(c.clip), optax.scale_by_adam(), optax.add_decayed_weights(c.decay), rate
    )


def _example(model: TextModel, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((size, model.page.length), np.int32)
    return {"ids": ids, "mask": ids}


def _numbers(results: list[Result], trained: Trained) -> dict[str, Any]:
    went = trained.progress.to_dict()
    return {
        "test": [dataclasses.asdict(one) for one in results],
        "validation": went["scores"],
        "losses": went["losses"],
        "skipped_steps": went["skipped"],
        "best_epoch": went["best"],
        "epoch_seconds": went["seconds"],
    }


def main(_: list[str]) -> None:
    """Runs the configuration that the flags give."""
    with running.script("finetune"):
        start(pages.read(), Console())


if __name__ == "__main__":  # several scripts have a flag of this name
    pages.define("reviews.py")
    app.run(main)
