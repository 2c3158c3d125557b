"""What runs of several strategies gave: a table, and a picture."""

import io
from pathlib import Path
from typing import Any, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import record

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")  # Okabe and Ito
MARKS = "osD^vP*X"
NAMES = {
    "probe": "frozen probe",
    "last": "last layer",
    "few": "last few layers",
    "whole": "whole network",
    "lora": "LoRA",
    "adapters": "adapters",
    "gradual": "gradual unfreezing",
    "scratch": "from scratch",
}
BARS = "Points are means over seeds, bars their standard deviation."
Result = dict[str, Any]


def finished(found: Sequence[Result], what: str, console: Console) -> list[Result]:
    """The results of runs that came to their end; says which did not, and why.

    Raises:
      ValueError: not one did.
    """
    for one in found:
        if "failed" in one:
            said = f"left out: {one[what]}, {one['rows']:,} rows, seed {one['seed']}: {one['failed']}"
            console.print(said, soft_wrap=True)  # it holds a path
    if not (good := [one for one in found if "failed" not in one]):
        raise ValueError("not one of these runs came to its end")
    return good


def groups(results: Sequence[Result], what: str = "strategy") -> dict[tuple[str, int], list[Result]]:
    """The results of each strategy, or of what else differs, on each number of rows, over seeds."""
    made: dict[tuple[str, int], list[Result]] = {}
    for one in results:
        made.setdefault((one[what], one["rows"]), []).append(one)
    return made


def mean(results: Sequence[Result], name: str) -> tuple[float, float]:
    """The mean of a number over seeds, and its standard deviation, NaN of one seed; "gap" is training minus validation
    accuracy."""
    values = [one["training"] - one["validation"] if name == "gap" else one[name] for one in results]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def spread(value: float, deviation: float) -> str:
    """A number and, where there is one, its deviation over seeds."""
    return f"{value:.3f}" if np.isnan(deviation) else f"{value:.3f} ({deviation:.3f})"


def axes_of(results: Sequence[Result], what: str = "strategy") -> tuple[list[str], list[int]]:
    """The strategies, or what else differs, in the order of the results, and the numbers of rows."""
    return list(dict.fromkeys(one[what] for one in results)), sorted({one["rows"] for one in results})


def table(results: Sequence[Result]) -> Table:
    """Per strategy: what trains, and by the number of images the test accuracy, the gap and the seconds."""
    strategies, sizes = axes_of(results)
    shown = Table(
        title="Test accuracy (its deviation over seeds) / training minus validation accuracy / seconds",
        box=box.MARKDOWN,
    )
    shown.add_column("strategy")
    for name in ("trainable", *(f"{n:,} images" for n in sizes)):
        shown.add_column(name, justify="right")
    by = groups(results)
    for how in strategies:
        cells = [_cell(by[how, n]) if (how, n) in by else "-" for n in sizes]
        trains = next(one["trainable"] for one in results if one["strategy"] == how)
        shown.add_row(NAMES[how], f"{trains:,}", *cells)
    return shown


def _cell(results: Sequence[Result]) -> str:
    (gap, _), (seconds, _) = (mean(results, name) for name in ("gap", "seconds"))
    return f"{spread(*mean(results, 'test'))} / {gap:+.3f} / {seconds:.0f} s"


def plot(results: Sequence[Result], path: Path) -> Path:
    """Draws accuracy, gap and seconds by the number of images, and accuracy by what trains; returns the file."""
    strategies, sizes = axes_of(results)
    by, figure = groups(results), Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for k, how in enumerate(strategies):
        drawn = {**style(k), "label": NAMES[how], "capsize": 3, "linewidth": 1.5}
        some = [n for n in sizes if (how, n) in by]
        for axis, name in zip((axes[0, 0], axes[0, 1], axes[1, 0]), ("test", "gap", "seconds")):
            values, bars = np.transpose([mean(by[how, n], name) for n in some])
            axis.errorbar(some, values, bars, **drawn)
        if last := by.get((how, sizes[-1])):
            accuracy, bar = mean(last, "test")
            axes[1, 1].errorbar([last[0]["trainable"]], [accuracy], [bar], **drawn)
    for axis, name in zip(
        (axes[0, 0], axes[0, 1], axes[1, 0]), ("test accuracy", "training minus validation", "seconds")
    ):
        named(axis, "training images", name)
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.minorticks_off()
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 1].axhline(0, color="#bbbbbb", linewidth=1, zorder=0)
    named(axes[1, 1], "parameters that train", f"test accuracy, {sizes[-1]:,} images")
    figure.supxlabel(BARS, fontsize="small")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    return saved(figure, path)


def saved(figure: Figure, path: Path, dpi: int = 110) -> Path:
    """Writes a figure as PNG, whole or not at all; returns the file."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    record.replace(path, drawn.getvalue())
    return path


def style(k: int) -> dict[str, Any]:
    """How the k-th of several is drawn: eight colours, and hollow marks of another shape from the ninth on."""
    colour = COLOURS[k % 8]
    return {"color": colour, "marker": MARKS[(k + k // 8) % 8], "markerfacecolor": "white" if k >= 8 else colour}


def named(axis: Axes, x: str, y: str) -> None:
    axis.set_xscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(color="#eeeeee")
    axis.spines[["top", "right"]].set_visible(False)
