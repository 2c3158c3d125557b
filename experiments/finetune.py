"""Fine-tunes a BERT on labelled texts: by default MiniLM on movie reviews, with LoRA.

python experiments/finetune.py
python experiments/finetune.py --config.method=head --config.seed=1
python experiments/finetune.py --config.data=mine.csv --config.text=sentence --config.label=mood
python experiments/finetune.py --config.mesh=data:-1 --config.resume=auto

launch.md beside this file says how to run it on many machines.
"""

import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import Any, Callable, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import ml_collections
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

import peftjax as pj
from experiments import assets, baselines, data, display, processes, record
from experiments.batches import batches
from experiments.classifier import ADAPTER, Classifier, Page
from experiments.interruption import Interrupted
from experiments.models.bert import RULES
from experiments.schedules import warm_then_linear
from experiments.train import Limits, Trained, cross_entropy, predict, score, train
from peftjax.runs import Runs
from peftjax.sharding_rules import by_rules, make_mesh, within

FREE = ("out", "resume", "every", "mesh", "accumulate", "join", "timeout")  # what may change when a run goes on
METHODS: dict[str, Callable[[ml_collections.ConfigDict], pj.Method]] = {
    "lora": lambda c: pj.chain(pj.lora(c.lora.rank, c.lora.alpha, dropout=c.lora.dropout), pj.unfreeze("classifier")),
    "full": lambda c: pj.full(),
    "head": lambda c: pj.unfreeze("classifier"),
}


def start(c: ml_collections.ConfigDict, console: Console) -> list[baselines.Result]:
    """Joins the other processes of the run, if there are any, and runs; the first one prints."""
    processes.join(c)
    return run(c, console if processes.is_first() else Console(quiet=True))


def run(c: ml_collections.ConfigDict, console: Console) -> list[baselines.Result]:
    """Trains as the configuration says, tests once, saves the adapter, and prints and records the results.

    Of several processes all train and test, and the first one saves and records.

    Args:
      c: as `configs/reviews.py` describes it.
      console: where to print.

    Returns:
      The baselines and, last, this run.
    """
    if c.method not in METHODS:
        raise ValueError(f"method {c.method!r}; expected one of {', '.join(METHODS)}")
    rows = data.load(c.data, c.text, c.label, c.classes)
    model = Classifier(Page(c.model, c.pool, c.length, c.fixed, rows.names), c.dropout)
    method, start = METHODS[c.method](c), time.perf_counter()
    trained, tuned, guess = fit(c, model, method, rows.train, rows.validation, console)
    seconds = time.perf_counter() - start

    read = lambda texts: batches(model.tokens(texts), np.zeros(len(texts), np.int32), c.batch, model.widths)
    features = predict(model.features)
    test = rows.test.open()
    guesses = guess(test.texts).argmax(1)
    results = [
        baselines.majority(rows.train, test),
        baselines.words(rows.train, rows.validation, test),
        baselines.probe(lambda x: features(model.params, read(x.texts), len(x)), rows.train, rows.validation, test),
        baselines.Result(f"this run ({c.method})", guesses == test.labels, pj.count(tuned).trainable, seconds),
    ]
    if not processes.is_first():
        return results
    folder = folder_of_run(c)
    pj.save(folder / ADAPTER, tuned, method, pj.roles(model, model.params, _example(model, c.batch)))
    model.page.write(folder)
    record.append(Path(c.out) / "results.jsonl", c.to_dict(), _numbers(results, trained))
    console.print(display.table(results, len(test)))
    console.print(f"best epoch {trained.progress.best} of {len(trained.progress.scores)}; the adapter is in {folder}")
    return results


def fit(
    c: ml_collections.ConfigDict,
    model: Classifier,
    method: pj.Method,
    training: data.Rows,
    validation: data.Rows,
    console: Console,
) -> tuple[Trained, Any, Callable[[Sequence[str]], np.ndarray]]:
    """Trains on some rows and chooses the epoch on others.

    Returns:
      What training gave, on the mesh; the tuned tree, on this process alone; and a function from texts to logits.

    Raises:
      ValueError: fewer rows than a batch, or a mesh that several processes lack.
    """
    if jax.process_count() > 1 and not c.mesh:
        raise ValueError(f"{jax.process_count()} processes share one mesh; set --config.mesh=, such as data:-1")
    if len(training) < c.batch:
        raise ValueError(f"{len(training)} rows to train on are fewer than a batch of {c.batch}; set --config.batch=")
    init, dropout = jax.random.split(jax.random.key(c.seed))
    roles = pj.roles(model, model.params, _example(model, c.batch))
    tuned, apply = method.init(init, model.params, roles), pj.wrap(model)
    console.print(f"{method.name} {c.method}: {pj.count(tuned)}")
    ids, chosen_on = model.tokens(training.texts), model.tokens(validation.texts)
    plan = functools.partial(batches, size=c.batch, widths=model.widths)

    mesh = make_mesh(c.mesh) if c.mesh else None
    tx = optimizer(c, steps=c.epochs * len(plan(ids, training.labels)))
    specs = None if mesh is None else by_rules(within(RULES, mesh), model.params, mesh)
    state = pj.train_state(tuned, tx, key=dropout, mesh=mesh, specs=specs)
    step = pj.make_train_step(apply, cross_entropy, tx, mesh, method=method, accumulate=c.accumulate)
    logits = predict(apply, step)
    epoch = lambda number: plan(ids, training.labels, seed=(c.seed, number), share=step.share)

    def logits_of(tuned: Any, ids: Sequence[Any]) -> np.ndarray:
        return logits(tuned, plan(ids, np.zeros(len(ids), np.int32), share=step.share), len(ids))

    def validate(state: pj.TrainState) -> Any:
        return score(logits_of(state.tuned, chosen_on), validation.labels)

    with display.Bar(console) as bar, _runs(c, method, roles) as runs:
        trained = train(step, state, epoch, validate, Limits(c.epochs, c.patience), bar, runs, c.every)
    guess = lambda texts: logits_of(trained.tuned, model.tokens(texts))
    return trained, processes.whole(trained.tuned, tuned), guess


def _runs(c: ml_collections.ConfigDict, method: pj.Method, roles: pj.Roles) -> Any:
    if c.resume not in ("auto", "no"):
        raise ValueError(f"resume {c.resume!r}; expected auto or no")
    if c.resume == "no":
        return contextlib.nullcontext()
    settings = {name: value for name, value in c.to_dict().items() if name not in FREE}
    return Runs(folder_of_run(c) / "checkpoints", method, roles, metric="epoch", lowest=False, settings=settings)


def folder_of_run(c: ml_collections.ConfigDict) -> Path:
    """Where the run of a configuration leaves what it made."""
    return Path(c.out) / f"{Path(c.data).stem}-{c.method}-seed{c.seed}"


def optimizer(c: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW under clipped gradients; the rate rises linearly, then falls linearly to 0."""
    schedule = warm_then_linear(c.rate[c.method], c.warmup, steps)
    return optax.chain(optax.clip_by_global_norm(c.clip), optax.adamw(schedule, weight_decay=c.decay))


def _example(model: Classifier, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((size, model.page.length), np.int32)
    return {"ids": ids, "mask": ids}


def _numbers(results: list[baselines.Result], trained: Trained) -> dict[str, Any]:
    lines = [
        {"name": r.name, "accuracy": r.accuracy, "error": r.error, "trainable": r.trainable, "seconds": r.seconds}
        for r in results
    ]
    went = trained.progress.to_dict()
    return {
        "test": lines,
        "validation": went["scores"],
        "best_epoch": went["best"],
        "epoch_seconds": went["seconds"],
    }


def main(_: list[str]) -> None:
    """Runs the configuration that the flags give."""
    if not flags.FLAGS["verbosity"].present:  # orbax has much to say of every checkpoint, on every process
        logging.set_verbosity(logging.ERROR)
    assets.keep_compiled()
    try:
        start(flags.FLAGS.config, Console())
    except (ValueError, FloatingPointError, TimeoutError, assets.Missing, Interrupted) as error:
        raise SystemExit(f"finetune: {error}") from error


if __name__ == "__main__":  # several scripts have a flag of this name
    config_flags.DEFINE_config_file("config", str(Path(__file__).parent / "configs" / "reviews.py"))
    app.run(main)
