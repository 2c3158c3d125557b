"""What a run shows: a bar while it trains, a table at its end."""

import math
from typing import Any, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from experiments.tasks import Result
from experiments.train import Score


class Bar:
    """A bar per epoch, with the running loss and the examples a second.

    Args:
      console: where to print.
      metric: what the scores are called.
    """

    def __init__(self, console: Console, metric: str = "accuracy"):
        self._metric = metric
        numbers = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} examples/s")
        columns = (
            TextColumn("epoch {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            numbers,
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._loss, self._rate = 0.0, 0.0

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def epoch(self, number: int, steps: int, done: int) -> None:
        """Begins an epoch, or goes on with one of which some steps are done."""
        self._task = self._progress.add_task(str(number), total=steps, completed=done, loss=float("nan"), rate=0.0)
        self._first = True

    def step(self, number: int, loss: float, rate: float) -> None:
        """Goes on by a step; both numbers are averaged over the last ten or so."""
        smooth = lambda old, new: new if self._first else 0.9 * old + 0.1 * new
        self._rate = smooth(self._rate, rate)
        if math.isfinite(loss):  # one that is not would hide those that follow
            self._loss, self._first = smooth(self._loss, loss), False
        self._progress.update(self._task, advance=1, loss=self._loss, rate=self._rate)

    def score(self, number: int, score: Score, best: bool, skipped: int) -> None:
        """Prints the validation score of an epoch, and how many of its steps were left out, if any."""
        self._progress.console.print(
            f"epoch {number}: validation {self._metric} {score.value:.3f}, loss {score.loss:.3f}{' (best)' * best}"
        )
        if skipped:
            self._progress.console.print(
                f"epoch {number}: {skipped} steps left out, whose loss or gradient was not finite"
            )


def table(results: Sequence[Result], rows: int) -> Table:
    """The results side by side."""
    names = list(results[0].scores)
    shown = Table(title=f"Test rows: {rows:,}")
    shown.add_column("method")
    for name in (*names, "trainable", "seconds"):
        shown.add_column(name, justify="right")
    for r in results:
        first, *rest = (f"{r.scores[name]:.3f}" for name in names)
        shown.add_row(r.name, f"{first} ± {r.error:.3f}", *rest, f"{r.trainable:,}", f"{r.seconds:.1f}")
    return shown
