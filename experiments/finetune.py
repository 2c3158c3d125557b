"""Fine-tunes a BERT on labelled texts: by default MiniLM on movie reviews, with LoRA.

python experiments/finetune.py
python experiments/finetune.py --config.method=head --config.seed=1
python experiments/finetune.py --config.data=mine.csv --config.text=sentence --config.label=mood
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import ml_collections
import numpy as np
import optax
from absl import app
from ml_collections import config_flags
from rich.console import Console

import peftjax as pj
from experiments import assets, baselines, data, display, record
from experiments.batches import Batch, batches
from experiments.classifier import ADAPTER, Classifier, Page
from experiments.train import Trained, predict, score, train

CONFIG = config_flags.DEFINE_config_file("config", str(Path(__file__).parent / "configs" / "reviews.py"))

METHODS: dict[str, Callable[[ml_collections.ConfigDict], pj.Method]] = {
    "lora": lambda c: pj.chain(pj.lora(c.lora.rank, c.lora.alpha, dropout=c.lora.dropout), pj.unfreeze("classifier")),
    "full": lambda c: pj.full(),
    "head": lambda c: pj.unfreeze("classifier"),
}


def run(c: ml_collections.ConfigDict, console: Console) -> list[baselines.Result]:
    """Trains as the configuration says, tests once, saves the adapter, and prints and records the results.

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
    trained = fit(c, model, method, rows.train, rows.validation, console)
    seconds = time.perf_counter() - start

    logits, features = predict(pj.wrap(model)), predict(model.features)
    read = lambda texts: batches(model.tokens(texts), np.zeros(len(texts), np.int32), c.batch, model.widths)
    test = rows.test.open()
    guesses = logits(trained.tuned, read(test.texts), len(test)).argmax(1)
    results = [
        baselines.majority(rows.train, test),
        baselines.words(rows.train, rows.validation, test),
        baselines.probe(lambda x: features(model.params, read(x), len(x)), rows.train, rows.validation, test),
        baselines.Result(f"this run ({c.method})", guesses == test.labels, pj.count(trained.tuned).trainable, seconds),
    ]
    folder = Path(c.out) / f"{Path(c.data).stem}-{c.method}-seed{c.seed}"
    pj.save(folder / ADAPTER, trained.tuned, method, pj.roles(model, model.params, *_example(model, c.batch)))
    model.page.write(folder)
    record.append(Path(c.out) / "results.jsonl", c.to_dict(), _numbers(results, trained))
    console.print(display.table(results, len(test)))
    console.print(f"best epoch {trained.best} of {len(trained.scores)}; the adapter is in {folder}")
    return results


def fit(
    c: ml_collections.ConfigDict,
    model: Classifier,
    method: pj.Method,
    training: data.Rows,
    validation: data.Rows,
    console: Console,
) -> Trained:
    """Trains on some rows and chooses the epoch on others."""
    init, dropout = jax.random.split(jax.random.key(c.seed))
    apply, tuned = pj.attach(method, model, model.params, *_example(model, c.batch), key=init)
    console.print(f"{method.name} {c.method}: {pj.count(tuned)}")
    ids, chosen_on = model.tokens(training.texts), model.tokens(validation.texts)

    def epoch(number: int) -> Iterable[Batch]:
        return batches(ids, training.labels, c.batch, model.widths, np.random.default_rng((c.seed, number)))

    logits = predict(apply)

    def validate(tuned: Any) -> Any:
        read = batches(chosen_on, validation.labels, c.batch, model.widths)
        return score(logits(tuned, read, len(validation)), validation.labels)

    tx = optimizer(c, steps=c.epochs * sum(1 for _ in epoch(1)))
    with display.Bar(console) as bar:
        return train(apply, tuned, tx, epoch, validate, dropout, c.epochs, c.patience, bar)


def optimizer(c: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW under clipped gradients; the rate rises linearly, then falls linearly to 0."""
    warm = max(1, round(c.warmup * steps))
    rise, fall = (
        optax.linear_schedule(0.0, c.rate[c.method], warm),
        optax.linear_schedule(c.rate[c.method], 0.0, steps - warm),
    )
    schedule = optax.join_schedules([rise, fall], [warm])
    return optax.chain(optax.clip_by_global_norm(c.clip), optax.adamw(schedule, weight_decay=c.decay))


def _example(model: Classifier, size: int) -> tuple[dict[str, jax.ShapeDtypeStruct], None]:
    ids = jax.ShapeDtypeStruct((size, model.page.length), np.int32)
    return {"ids": ids, "mask": ids}, None


def _numbers(results: list[baselines.Result], trained: Trained) -> dict[str, Any]:
    lines = [
        {"name": r.name, "accuracy": r.accuracy, "error": r.error, "trainable": r.trainable, "seconds": r.seconds}
        for r in results
    ]
    scores = [dataclasses.asdict(s) for s in trained.scores]
    return {"test": lines, "validation": scores, "best_epoch": trained.best, "epoch_seconds": trained.seconds}


def main(_: list[str]) -> None:
    """Runs the configuration that the flags give."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # compiling takes as long as an epoch: once is enough
        jax.config.update("jax_compilation_cache_dir", str(assets.home() / "compiled"))
    try:
        run(CONFIG.value, Console())
    except (ValueError, FloatingPointError, assets.Missing) as error:
        raise SystemExit(f"finetune: {error}") from error


if __name__ == "__main__":
    app.run(main)
