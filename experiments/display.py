"""What a run shows: a bar while it trains, a table at its end."""

from typing import Any, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.baselines import Result


class Bar:
    """A bar per epoch, with the running loss and the examples a second."""

    def __init__(self, console: Console):
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

    def step(self, loss: float, rate: float) -> None:
        """Goes on by a step; both numbers are averaged over the last ten or so."""
        smooth = lambda old, new: new if self._first else 0.9 * old + 0.1 * new
        self._loss, self._rate, self._first = smooth(self._loss, loss), smooth(self._rate, rate), False
        self._progress.update(self._task, advance=1, loss=self._loss, rate=self._rate)

    def score(self, number: int, accuracy: float, loss: float, best: bool) -> None:
        """Prints the validation score of an epoch."""
        self._progress.console.print(
            f"epoch {number}: validation accuracy {accuracy:.3f}, loss {loss:.3f}{' (best)' * best}"
        )


def table(results: Sequence[Result], rows: int) -> Table:
    """The results side by side."""
    shown = Table(title=f"Test accuracy, {rows:,} rows")
    shown.add_column("method")
    for name in ("accuracy", "trainable", "seconds"):
        shown.add_column(name, justify="right")
    for r in results:
        shown.add_row(r.name, f"{r.accuracy:.3f} ± {r.error:.3f}", f"{r.trainable:,}", f"{r.seconds:.1f}")
    return shown
