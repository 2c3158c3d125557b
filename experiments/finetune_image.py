"""Transfer learning of a convolutional network: strategies side by side, by the number of training images.

python experiments/finetune_image.py
python experiments/finetune_image.py --config.data=photos/ --config.size=96
python experiments/finetune_image.py --config.strategies=last,lora,gradual --config.rows=1000
python experiments/finetune_image.py --config.mesh=data:-1 --config.resume=auto

Finished runs are rows of a file of results; a second call does what is missing, and shows all. With resume=auto it goes on
within the run that was stopped, too.
"""

import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ml_collections
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

from experiments import images, pages, report, running, vision
from experiments.data import Dataset
from experiments.images import Images
from experiments.ledger import Ledger
from experiments.pages import check_numbers, listed
from experiments.transfer import PROBE, STRATEGIES, Lab, Run
from peftjax.sharding_rules import make_mesh

VERSION = 1  # of the file of results


def run(c: ml_collections.ConfigDict, console: Console) -> list[dict[str, Any]]:
    """Does every run that the file of results lacks, and prints and plots all.

    Args:
      c: as `configs/digits.py` describes it.
      console: where to print.

    Returns:
      The results of these runs.

    Raises:
      ValueError: a strategy or network that is not known, targets that it does not have, or too few images.
      Interrupted: the process was asked to stop; the state of the run in hand is saved.
    """
    running.check(c)
    wanted, c = runs(c), completed(c)
    check_steps(c)
    data = images.load(c.data, c.size, c.image, c.label)
    check_rows(c, data)
    path = Path(c.out) / f"images-{Path(c.data).stem}.jsonl"
    ledger = Ledger(path, VERSION)
    if missing := [one for one in wanted if ledger.find(one.settings(c)) is None]:
        lab = Lab(c, data, console)
        lab.check({one.strategy: None for one in missing})
        for one in missing:
            done = lab.result(one)
            ledger.add(one.settings(c), done)
            running.forget(one.folder(c), done)
    found = [result for one in wanted if (result := ledger.find(one.settings(c))) is not None]
    results = report.finished(found, "strategy", console)
    console.print(report.table(results))
    picture = report.plot(results, path.with_suffix(".png"))
    console.print(f"{len(results)} runs are in {path}, and a plot of them in {picture}", soft_wrap=True)
    return results


def completed(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The page with the network's own targets where it names none, and with what a folder of images holds.

    Raises:
      ValueError: a network that is not known.
    """
    if c.model not in vision.NETS:
        raise ValueError(f"model {c.model!r}; expected one of {', '.join(vision.NETS)}")
    c = ml_collections.ConfigDict(c.to_dict())
    c.update(images.digest(c.data))
    c.lora.targets = c.lora.targets or vision.NETS[c.model].lora
    c.adapter.targets = c.adapter.targets or vision.NETS[c.model].adapters
    return c


def check_steps(c: ml_collections.ConfigDict) -> None:
    """Raises where a page asks for what no data can give: a batch of too many, too few steps, or a mesh without devices."""
    if c.mesh:
        make_mesh(c.mesh)
    trained = [STRATEGIES[name](c) for name in listed(c.strategies) if name != PROBE]
    if trained and min(c.rows) < c.batch:
        raise ValueError(f"{min(c.rows)} rows to train on are fewer than a batch of {c.batch}; set --config.batch=")
    stages = max(map(len, trained), default=1)
    if c.steps // stages < c.checks:
        raise ValueError(
            f"steps {c.steps} in {stages} stages: expected at least {c.checks} in each, one for each check"
        )


def check_rows(c: ml_collections.ConfigDict, data: Dataset[Images]) -> None:
    """Raises where there are too few images for what a page asks for."""
    if max(c.rows) > len(data.train) or min(c.rows) < len(data.names):
        raise ValueError(
            f"rows {tuple(c.rows)}: expected {len(data.names)}, the number of classes, to {len(data.train)}, that of the "
            "training images"
        )


def unheeded(c: ml_collections.ConfigDict) -> dict[str, str]:
    """The settings of a page that its data set does not read, and why."""
    why = f"{c.data!r} has no columns, which data sets of tensorflow-datasets have"
    return {} if images.has_columns(c.data) else {name: why for name in images.COLUMNS}


def runs(c: ml_collections.ConfigDict) -> list[Run]:
    """The runs that a configuration asks for, seed by seed.

    Raises:
      ValueError: a strategy that is not known.
    """
    check_numbers(c, "rows", "seeds")
    if c.checks < 1:
        raise ValueError(f"checks {c.checks}; expected 1 at least")
    names = listed(c.strategies)
    if unknown := [name for name in names if name not in (*STRATEGIES, PROBE)]:
        raise ValueError(f"strategy {unknown[0]!r}; expected one of {', '.join((PROBE, *STRATEGIES))}")
    each = itertools.product(dict.fromkeys(c.seeds), dict.fromkeys(c.rows), dict.fromkeys(names))
    return [Run(how, n, seed) for seed, n, how in each]


def main(_: list[str]) -> None:
    """Does the runs that the flags ask for."""
    with running.script("finetune_image"):
        pages.refuse(unheeded(flags.FLAGS.config))
        run(flags.FLAGS.config, Console())


if __name__ == "__main__":  # several scripts have a flag of this name
    config_flags.DEFINE_config_file("config", str(Path(__file__).parent / "configs" / "digits.py"))
    app.run(main)
