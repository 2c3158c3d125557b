"""Compares methods on the same rows and seeds: a table, plots, and one page of all.

python experiments/compare.py
python experiments/compare.py --quick
python experiments/compare.py --config.methods=lora,full --config.rows=1000 --config.passes=3

Finished runs are lines of `compare.jsonl`; a second call does what is missing, and shows all.
"""

import dataclasses
import functools
import itertools
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ml_collections
import numpy as np
from absl import app, flags
from rich.console import Console

import peftjax as pj
from experiments import baselines, comparison, finetune, pages, recipes, report, running, sweep, tasks
from experiments.data import Dataset, Rows
from experiments.ledger import Ledger
from experiments.pages import check_numbers, listed
from experiments.sweep import Setting, kept, place, read_winners, subset
from experiments.text_model import Page, TextModel

VERSION = 1
FREE = (
    "methods",
    "baselines",
    "rows",
    "passes",
    "seeds",
    "winners",
    "out",
    "resume",
    "every",
    "failing",
    "tensorboard",
    "profile",
)
BASELINES: dict[str, Callable[..., Any]] = {"words": baselines.words, "probe": baselines.probe}
QUICK = {
    "methods": ("lora", "adapter", "full", "scratch"),
    "rows": (250,),
    "passes": (3,),
    "seeds": (0,),
    "winners": "",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: which method, on how many training rows, and with which seed."""

    method: str
    rows: int
    seed: int


def runs(c: ml_collections.ConfigDict) -> list[Run]:
    """The runs of a page, seed by seed.

    Raises:
      ValueError: a method or a baseline that is not known, other words than numbers, fewer rows than a batch, or more
        passes than rows.
    """
    running.check(c)
    check_numbers(c, "rows", "passes", "seeds")
    if c.task != "classify":
        raise ValueError(f"task {c.task!r}: methods are compared on 'classify'")
    names = [name for name in (*listed(c.baselines), *listed(c.methods)) if name]
    if not names:
        raise ValueError("baselines and methods are both empty; expected one at least")
    if unknown := [name for name in names if name not in (*BASELINES, *recipes.NAMES)]:
        raise ValueError(f"method {unknown[0]!r}; expected one of {', '.join((*BASELINES, *recipes.NAMES))}")
    if len(c.passes) not in (1, len(c.rows)) or min(c.passes) < 1:
        raise ValueError(
            f"passes {tuple(c.passes)} over rows {tuple(c.rows)}: expected a number for each, from 1, or one for all; set "
            "--config.passes="
        )
    if min(c.rows) < c.batch and not set(names) <= set(BASELINES):
        raise ValueError(f"rows {tuple(c.rows)}: expected {c.batch} at least, which are a batch; set --config.batch=")
    each = itertools.product(dict.fromkeys(c.seeds), dict.fromkeys(c.rows), dict.fromkeys(names))
    return [Run(name, n, seed) for seed, n, name in each]


def run(c: ml_collections.ConfigDict, console: Console) -> list[dict[str, Any]]:
    """Does every run that the file of results lacks, and prints and plots all.

    Args:
      c: as `configs/compare.py` describes it.
      console: where to print.

    Returns:
      The results of these runs.
    """
    wanted, best, same = runs(c), winners(c), finetune.identity(c)
    ledger, laid = Ledger(Path(c.out) / "compare.jsonl", VERSION), {one: page(c, one, best) for one in wanted}
    settings = {one: {**kept_of(laid[one], one), **same, **dataclasses.asdict(one)} for one in wanted}
    if todo := [one for one in wanted if ledger.find(settings[one]) is None]:
        lab = Lab(c, console)
        for n, one in enumerate(todo, 1):
            console.print(f"{n} of {len(todo)}: {one.method}, {one.rows:,} rows, seed {one.seed}")
            where = None if one.method in BASELINES else place(laid[one], "compare", one.rows, settings[one])
            result = {**dataclasses.asdict(one), **lab.result(one, laid[one], where)}
            ledger.add(settings[one], result)
            if where is not None:
                running.forget(where.folder, result)
    found = [row for one in wanted if (row := ledger.find(settings[one])) is not None]
    results = report.finished(found, "method", console)
    console.print(comparison.table(results))
    places = comparison.write(results, Path(c.out))
    console.print(f"{len(results)} runs are in {ledger.path}; {', '.join(map(str, places))}", soft_wrap=True)
    return results


def winners(c: ml_collections.ConfigDict) -> dict[str, Any]:
    """The learning rate and the size of each method that a page names: those that won, or the page's own.

    Raises:
      ValueError: a method without a winner, or what `read_winners` raises.
    """
    names = [name for name in listed(c.methods) if name]
    if not c.winners:
        return {name: {"rate": c.rate[name], "size": None} for name in names}
    best = read_winners(Path(c.winners), c)
    if missing := [name for name in names if name not in best]:
        raise ValueError(
            f"{c.winners} has no winner of {missing[0]!r}; expected one: run experiments/sweep.py for it, and name its "
            "winners.json by --config.winners="
        )
    return {name: best[name] for name in names}


def page(c: ml_collections.ConfigDict, one: Run, best: Mapping[str, Mapping[str, Any]]) -> ml_collections.ConfigDict:
    """The page of one run, with the learning rate and the size of its method."""
    if one.method in BASELINES:
        return c
    made = Setting(one.method, best[one.method]["rate"], best[one.method]["size"]).laid(c, one.seed)
    made.epochs = made.patience = dict(zip(c.rows, itertools.cycle(c.passes)))[one.rows]
    return made


def kept_of(c: ml_collections.ConfigDict, one: Run) -> dict[str, Any]:
    """The values of a page on which a run depends."""
    if one.method in BASELINES:
        return {name: c[name] for name in ("data", "text", "label", "model", "length")}
    return kept(c, one.method, FREE)


class Lab:
    """Does runs, one after the other, on one model and one data set.

    Args:
      c: the page.
      console: where to print.
    """

    def __init__(self, c: ml_collections.ConfigDict, console: Console):
        self.c, self.console = c, console
        self.task, self.data = tasks.read(c)
        model = Page(c.model, c.pool, c.length, c.fixed, self.task)
        self.model = TextModel(model, c.dropout)
        self._tools: finetune.Tools = {}
        subset(self.data.train, max(c.rows), 0)  # raises where there are fewer

    @functools.cached_property
    def test(self) -> Rows:
        """The test rows, opened when the first run has made its choices."""
        return self.data.test.open()

    def result(self, one: Run, c: ml_collections.ConfigDict, where: finetune.Place | None) -> dict[str, Any]:
        """What a run gives: which test rows it has right, its curves, the seconds of training, and what trained."""
        training = subset(self.data.train, one.rows, one.seed)
        try:
            found = self._baseline(one, training) if where is None else self._trained(c, training, where)
        except FloatingPointError as error:
            return {"failed": str(error)}
        answers = found.pop("answers")
        correct = answers == self.test.labels
        found |= {
            "accuracy": float(correct.mean()),
            "correct": np.packbits(correct).tobytes().hex(),
            "tested": len(correct),
        }
        shown = {name: found[name] for name in ("accuracy", "seconds", "trainable")}
        self.console.print("  " + ", ".join(f"{name} {x:,.3f}" for name, x in shown.items()), highlight=False)
        return found

    def _trained(self, c: ml_collections.ConfigDict, training: Rows, where: finetune.Place) -> dict[str, Any]:
        fitted = finetune.fit(c, self.model, training, self.data.validation, self.console, self._tools, where)
        went = fitted.trained.progress
        return {
            "answers": fitted.answers(self.test),
            "validation": [score.value for score in went.scores],
            "validation_loss": [score.loss for score in went.scores],
            "training_loss": went.losses,
            "best": went.best,
            "seconds": sum(went.seconds),
            "trainable": pj.count(fitted.tuned).trainable,
        }

    @functools.cached_property
    def _features(self) -> baselines.Features:
        return finetune.features(self.c, self.model)

    def _baseline(self, one: Run, training: Rows) -> dict[str, Any]:
        own = Dataset(training, self.data.validation, self.data.test, self.data.names)
        try:
            found = BASELINES[one.method](own, self.test, self._features)
        except ValueError as error:
            raise ValueError(f"{one}: {error}; --config.baselines= does without {one.method!r}") from error
        return {"answers": found.answers, "seconds": found.seconds, "trainable": found.trainable}


def unheeded(c: ml_collections.ConfigDict) -> dict[str, str]:
    """The settings of a page that a comparison replaces, and what says them here."""
    best = read_winners(Path(c.winners), c) if c.winners else {}
    sizes = {f"{name}.{recipes.METHODS[name]}": "c.winners says it" for name, x in best.items() if x["size"] is not None}
    won = {"rate": "c.winners says them"} if best else {}
    return {**sweep.REPLACED, "epochs": "c.passes says it", "patience": "the best of all c.passes is kept", **won, **sizes}


def quicken(c: ml_collections.ConfigDict, given: Iterable[str]) -> None:
    """Makes a page quick, but for the values that flags have given."""
    c.update({name: x for name, x in QUICK.items() if name not in given})


def main(_: list[str]) -> None:
    """Does the runs that the flags ask for."""
    with running.script("compare"):
        c = pages.read()
        if flags.FLAGS.quick:
            flag: Any = flags.FLAGS["config"]
            quicken(c, flag.override_values)
        pages.refuse(unheeded(c))
        run(c, Console())


if __name__ == "__main__":  # several scripts have a flag of this name
    pages.define("compare.py")
    flags.DEFINE_bool("quick", False, "few methods, 250 rows and one seed, but for what other flags give: ten minutes")
    app.run(main)
