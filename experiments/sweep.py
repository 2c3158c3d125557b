"""Tries learning rates and sizes of methods, and writes down the best of each, chosen on validation rows.

python experiments/sweep.py
python experiments/sweep.py --config.methods=lora,prefix --config.tries=4

Finished runs are lines of `sweep.jsonl`; a second call does what is missing. The winners are in `winners.json`.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Mapping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ml_collections
import numpy as np
from absl import app
from rich.console import Console
from rich.table import Table

import peftjax as pj
from experiments import finetune, pages, recipes, record, running, tasks
from experiments.data import Rows
from experiments.ledger import Ledger, mark
from experiments.pages import check_numbers, listed
from experiments.text_model import Page, TextModel

VERSION = 1
UNSAID = {"data": "reviews", "model": "minilm", "task": "classify"}  # of winners that do not say of what they are
REPLACED = {
    "method": "c.methods says it",
    "seed": "c.seeds says it",
    "join": "one process does all runs; expected none",
}
FREE = ("methods", "seeds", "tries", "rates", "sizes", "out", "resume", "every", "failing", "tensorboard", "profile")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method with a learning rate, and a size where it has one."""

    method: str
    rate: float
    size: int | None

    def laid(self, c: ml_collections.ConfigDict, seed: int) -> ml_collections.ConfigDict:
        """The page with it."""
        made = c.copy_and_resolve_references()
        made.method, made.seed, made.rate[self.method] = self.method, seed, self.rate
        if self.size is not None:
            made[self.method][recipes.METHODS[self.method]] = self.size
        return made


def settings(c: ml_collections.ConfigDict) -> list[Setting]:
    """What is tried, method by method.

    Raises:
      ValueError: a method that is not known, or for which there is no learning rate, or values that are no numbers.
    """
    running.check(c)
    check_numbers(c, "seeds")
    for name, least in (("rows", c.batch), ("tries", 0)):
        if not isinstance(c[name], int) or c[name] < least:
            raise ValueError(f"{name} {c[name]!r}; expected a whole number, {least} at least")
    made: list[Setting] = []
    for method in dict.fromkeys(listed(c.methods)):
        if method not in recipes.NAMES or not c.rates.get(method):
            raise ValueError(
                f"method {method!r}; expected one of {', '.join(recipes.NAMES)}, with rates to try: --config.rates.{method}="
            )
        check_numbers(c, f"rates.{method}", kind=(int, float))
        if sizes := c.sizes.get(method, ()):
            check_numbers(c, f"sizes.{method}")
        each = [Setting(method, *x) for x in itertools.product(c.rates[method], sizes or (None,))]
        order = np.random.default_rng(0).permutation(len(each))[: c.tries] if c.tries else range(len(each))
        made += [each[k] for k in sorted(order)]
    return made


def subset(rows: Rows, count: int, seed: int) -> Rows:
    """So many of the rows; those of a smaller count are among those of a larger one."""
    if not 1 <= count <= len(rows):
        raise ValueError(f"rows {count}: expected 1 to {len(rows)}, the number of training rows")
    return rows[np.random.default_rng(seed).permutation(len(rows))[:count]]


def kept(c: ml_collections.ConfigDict, method: str, free: tuple[str, ...]) -> dict[str, Any]:
    """The values of a page on which a run of a method depends."""
    page = {name: x for name, x in c.to_dict().items() if name not in free}
    others = {name for name in recipes.METHODS if name != method}
    return {**{name: x for name, x in page.items() if name not in others}, "rate": page["rate"][method]}


def place(c: ml_collections.ConfigDict, script: str, rows: int, key: Mapping[str, Any]) -> finetune.Place:
    """That of one run among many of a script, of so many rows; `key` are the settings by which its result is found."""
    size = recipes.METHODS.get(c.method)
    sized = "" if size is None else f"-{size}{c[c.method].get(size)}"
    usual = finetune.folder_of_run(c)
    name = f"{usual.name}{sized}-rate{c.rate[c.method]:g}-rows{rows}-{mark(key)}"
    return finetune.Place(usual.parent / script / name, key)


def unheeded(c: ml_collections.ConfigDict) -> dict[str, str]:
    """The settings of a page that a sweep replaces, and what says them here."""
    sizes = {f"{name}.{recipes.METHODS[name]}": "c.sizes says it" for name in c.sizes if c.sizes[name]}
    return {**REPLACED, "rate": "c.rates says them", **sizes}


def run(c: ml_collections.ConfigDict, console: Console) -> dict[str, Any]:
    """Does every run that is missing, and prints and writes the winners.

    Args:
      c: as `configs/sweep.py` describes it.
      console: where to print.

    Returns:
      The winners, by method.
    """
    tried, path = settings(c), Path(c.out) / "winners.json"
    ledger = Ledger(Path(c.out) / "sweep.jsonl", VERSION)
    if path.is_file():
        read_winners(path, c)  # of another version or data set, they stop a sweep before its hours of work
    same = finetune.identity(c)
    keys = {(one, seed): {**kept(one.laid(c, seed), one.method, FREE), **same} for one in tried for seed in c.seeds}
    todo = [both for both, key in keys.items() if ledger.find(key) is None]
    if todo:
        task, rows = tasks.read(c)
        model = TextModel(Page(c.model, "each" if task.per_token else c.pool, c.length, c.fixed, task), c.dropout)
    tools: finetune.Tools = {}
    for n, (one, seed) in enumerate(todo, 1):
        page, training = one.laid(c, seed), subset(rows.train, c.rows, seed)
        where = place(page, "sweep", c.rows, keys[one, seed])
        console.print(f"{n} of {len(todo)}: {one.method}, rate {one.rate:g}, size {one.size}, seed {seed}")
        try:
            fitted = finetune.fit(page, model, training, rows.validation, console, tools, where)
            progress, trains = fitted.trained.progress, pj.count(fitted.tuned).trainable
            found: dict[str, Any] = {
                "value": progress.scores[progress.best - 1].value,
                "trainable": trains,
                "seconds": sum(progress.seconds),
            }
        except FloatingPointError as error:
            found = {"value": None, "failed": str(error)}
        ledger.add(keys[one, seed], found)
        running.forget(where.folder, found)
    values = {one: [_value(ledger.find(keys[one, seed])) for seed in dict.fromkeys(c.seeds)] for one in tried}
    best = {method: {**x, "rows": c.rows} for method, x in winners(values).items()}
    before = read_winners(path, c) if path.is_file() else {}
    others = {method: x for method, x in before.items() if method not in listed(c.methods)}
    record.replace(path, json.dumps({"version": VERSION, **origin(c), "methods": {**others, **best}}, indent=1) + "\n")
    console.print(table(best))
    console.print(f"the winners are in {path}", soft_wrap=True)
    return best


def _value(found: Mapping[str, Any] | None) -> float:
    """What a run was worth: one that came to no end, less than any other."""
    return -np.inf if found is None or found["value"] is None else found["value"]


def winners(values: Mapping[Setting, list[float]]) -> dict[str, dict[str, Any]]:
    """The setting of each method with the largest mean over seeds; the smaller rate where two are equal.

    With it: its mean, the standard deviation over seeds, None of one, and the least mean of all that was tried and came to
    its end. A method of which nothing did has no winner.
    """
    made = {}
    for method in dict.fromkeys(one.method for one in values):
        means = {one: float(np.mean(x)) for one, x in values.items() if one.method == method}
        best = max(means, key=lambda one: (means[one], -one.rate))
        if np.isinf(means[best]):
            continue
        made[method] = {
            "rate": best.rate,
            "size": best.size,
            "value": means[best],
            "deviation": float(np.std(values[best], ddof=1)) if len(values[best]) > 1 else None,
            "least": min(filter(np.isfinite, means.values())),
            "tried": len(means),
        }
    return made


def origin(c: ml_collections.ConfigDict) -> dict[str, str]:
    """Of what the winners of a page are: on other data, another model or another task, other settings win."""
    return {**{name: c[name] for name in UNSAID}, **finetune.identity(c)}


def read_winners(path: Path, c: ml_collections.ConfigDict) -> dict[str, Any]:
    """The winners in a file.

    Raises:
      ValueError: no such file, or one of another version, or of another data set, model or task than the page's.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a file of winners, as experiments/sweep.py writes it; --config.winners= does without"
        )
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        found = saved.get("version") if isinstance(saved, dict) else None
        raise ValueError(f"{path} is of version {found}; expected {VERSION}: run experiments/sweep.py anew")
    if not isinstance(saved.get("methods"), dict):
        raise ValueError(f'{path} is damaged: expected winners under "methods"')
    said = {name: x for name, x in saved.items() if name not in ("version", "methods")} or UNSAID
    for name, wanted in origin(c).items():
        if said.get(name) != wanted:
            raise ValueError(
                f"{path} holds winners of {name} {said.get(name)!r}; expected {wanted!r}: run experiments/sweep.py for "
                "it, with an --config.out= of its own, and name its winners.json by --config.winners="
            )
    return saved["methods"]


def table(best: Mapping[str, Mapping[str, Any]]) -> Table:
    """The winners side by side."""
    shown = Table(title="Best on validation, and what the learning rate and the size are worth")
    shown.add_column("method")
    for name in ("rate", "size", "best", "its deviation over seeds", "worst tried", "tried"):
        shown.add_column(name, justify="right")
    for method, x in best.items():
        cells = (
            f"{x['rate']:g}",
            str(x["size"] or "-"),
            f"{x['value']:.3f}",
            "-" if x["deviation"] is None else f"{x['deviation']:.3f}",
            f"{x['least']:.3f}",
        )
        shown.add_row(method, *cells, str(x["tried"]))
    return shown


def main(_: list[str]) -> None:
    """Does the runs that the flags ask for."""
    with running.script("sweep"):
        c = pages.read()
        pages.refuse(unheeded(c))
        run(c, Console())


if __name__ == "__main__":  # several scripts have a flag of this name
    pages.define("sweep.py")
    app.run(main)
