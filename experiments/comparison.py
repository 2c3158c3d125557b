"""What runs of several methods gave: a table, plots, and one page that holds all."""

import base64
import html
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich import box
from rich.table import Table

from experiments import record
from experiments.report import BARS, Result, axes_of, groups, mean, named, saved, spread, style

NAMES = {
    "words": "TF-IDF + logistic regression",
    "probe": "frozen linear probe",
    "full": "full fine-tuning",
    "scratch": "from scratch",
    "lora": "LoRA",
    "dora": "DoRA",
    "adapter": "adapters",
    "ia3": "IA3",
    "bitfit": "BitFit",
    "prefix": "prefix tuning",
    "prompt": "prompt tuning",
}
TITLES = {
    "parameters": "Accuracy by what trains",
    "seconds": "Accuracy by training time",
    "rows": "Accuracy by training rows",
    "curves": "Training and validation, pass by pass",
}
TITLE = "Test accuracy, mean (deviation over seeds); points more than full fine-tuning (95 % interval)"


def name(method: str) -> str:
    """What a method is called in tables and plots."""
    return NAMES.get(method, method)


def correct(one: Result) -> np.ndarray:
    """Which test rows a run has right, (N,)."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(one["correct"]), np.uint8))[: one["tested"]].astype(bool)


def paired(mine: Sequence[Result], theirs: Sequence[Result]) -> list[tuple[Result, Result]]:
    """The runs of two methods of the same seed."""
    by_seed = {one["seed"]: one for one in theirs}
    return [(one, by_seed[one["seed"]]) for one in mine if one["seed"] in by_seed]


def difference(mine: Sequence[Result], theirs: Sequence[Result]) -> tuple[float, float, float]:
    """By how much one method is more accurate than another on the same test rows and seeds, with its 95 % interval.

    `d(row, seed)` is 1, 0 or -1. The error's square is that of the mean over rows of `d` averaged over seeds, and that of
    the mean over seeds of `d` averaged over rows; there are few seeds, so the interval is one of Student's t, with the
    degrees of freedom of Welch and Satterthwaite. Of one seed, it is that of the rows alone.

    Returns:
      The difference, and the ends of the interval.

    Raises:
      ValueError: there is no seed that both have.
    """
    if not (both := paired(mine, theirs)):
        raise ValueError("no seed that both methods have")
    d = np.array([correct(a).astype(float) - correct(b) for a, b in both])
    parts = [(x.var(ddof=1) / len(x), len(x) - 1) for x in (d.mean(0), d.mean(1)) if len(x) > 1]
    squared = sum(part for part, _ in parts)
    if not squared:
        return float(d.mean()), float(d.mean()), float(d.mean())
    freedom = squared**2 / sum(part**2 / n for part, n in parts)
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(squared)
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def table(results: Sequence[Result]) -> Table:
    """Per method: what trains, the seconds, the accuracy by the number of rows, and how far it is from full fine-tuning."""
    by, (methods, sizes) = groups(results, "method"), axes_of(results, "method")
    shown = Table(title=TITLE, box=box.MARKDOWN, pad_edge=False)
    shown.add_column("method", overflow="fold")
    for column in ("trainable", *(f"{n:,} rows" for n in sizes), f"minus full ({sizes[-1]:,} rows)", "seconds"):
        shown.add_column(column, justify="right", overflow="fold", min_width=10 if column == "trainable" else None)
    for method in methods:
        last = by.get((method, sizes[-1]), [])
        cells = [spread(*mean(by[method, n], "accuracy")) if (method, n) in by else "-" for n in sizes]
        trains = [by[method, n][0]["trainable"] for n in sizes if (method, n) in by][-1]  # TF-IDF has more of more rows
        shown.add_row(name(method), f"{trains:,}", *cells, _apart(last, by.get(("full", sizes[-1]), [])), _seconds(last))
    return shown


def _apart(mine: Sequence[Result], full: Sequence[Result]) -> str:
    """The difference in points, with its 95 % interval."""
    seeds = len(paired(mine, full))
    if not seeds or mine[0]["method"] == "full":
        return "-"
    much, low, high = (100 * x for x in difference(mine, full))
    alone = "" if seeds > 1 else ", one seed"
    return f"{much:+.1f} ({low:+.1f} to {high:+.1f}{alone})"


def _seconds(results: Sequence[Result]) -> str:
    return f"{mean(results, 'seconds')[0]:.0f}" if results else "-"


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """Writes the plots, and a page with the table and all of them that needs no other file; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "parameters": _scatter(results, "trainable", "parameters that train"),
        "seconds": _scatter(results, "seconds", "seconds of training"),
        "rows": _by_rows(results),
    }
    if any("validation" in one for one in results):  # baselines have no passes
        figures["curves"] = _curves(results)
    made = []
    for what, figure in figures.items():
        made.append(saved(figure, folder / f"compare-{what}.png"))
    made.append(folder / "compare.html")
    record.replace(made[-1], _page(results, dict(zip(figures, made))))
    return made


def _scatter(results: Sequence[Result], value: str, label: str) -> Figure:
    by, largest = groups(results, "method"), axes_of(results, "method")[1][-1]

    def draw(axis: Axes, method: str, **drawn: Any) -> None:
        if some := by.get((method, largest)):
            (x, _), (y, bar) = mean(some, value), mean(some, "accuracy")
            axis.errorbar([x], [y], [bar], capsize=3, linestyle="none", label=name(method), **drawn)

    figure, panels = _panels(results, draw, label, f"test accuracy, {largest:,} rows")
    for axis in panels:
        axis.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _by_rows(results: Sequence[Result]) -> Figure:
    by, sizes = groups(results, "method"), axes_of(results, "method")[1]

    def draw(axis: Axes, method: str, **drawn: Any) -> None:
        some = [n for n in sizes if (method, n) in by]
        values, bars = np.transpose([mean(by[method, n], "accuracy") for n in some])
        axis.errorbar(some, values, bars, capsize=3, label=name(method), linewidth=1.5, **drawn)

    figure, panels = _panels(results, draw, "training rows", "test accuracy")
    for axis in panels:
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.minorticks_off()
    return figure


def _panels(results: Sequence[Result], draw: Callable[..., None], x: str, y: str) -> tuple[Figure, Sequence[Axes]]:
    """Draws each method; one that learns from scratch is so far below the others that these have a panel of their own."""
    methods = axes_of(results, "method")[0]
    others = [method for method in methods if method != "scratch"]
    shown = [others, methods] if 0 < len(others) < len(methods) else [methods]
    figure = Figure(figsize=(8, 4 + 2 * len(shown)), layout="constrained")
    panels = list(figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=(5, 3)[: len(shown)])[:, 0])
    for axis, some in zip(panels, shown):
        for method in some:
            draw(axis, method, **style(methods.index(method)))
        named(axis, x if axis is panels[-1] else "", y)
    if len(shown) == 2:
        panels[0].set_title("without training from scratch", loc="left", fontsize="medium")
        panels[1].set_title("all", loc="left", fontsize="medium")
    figure.supxlabel(BARS, fontsize="small")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure, panels


def _curves(results: Sequence[Result]) -> Figure:
    methods, went = axes_of(results, "method")[0], [one for one in results if "validation" in one]
    by, sizes = groups(went, "method"), axes_of(went, "method")[1]
    figure = Figure(figsize=(11, 4 * len(sizes)), layout="constrained")
    panels = figure.subplots(len(sizes), 2, squeeze=False)
    for n, (losses, scores) in zip(sizes, panels):
        for k, method in enumerate(methods):
            if not (some := by.get((method, n))):
                continue
            average = lambda what: np.mean([one[what] for one in some], 0)
            passes = np.arange(1, 1 + len(some[0]["validation"]))
            losses.plot(passes, average("training_loss"), label=name(method), **style(k))
            losses.plot(passes, average("validation_loss"), linestyle=":", **style(k))
            scores.plot(passes, average("validation"), **style(k))
        for axis, what in ((losses, "loss: training —, validation ···"), (scores, "validation accuracy")):
            named(axis, f"pass over {n:,} rows", what)
            axis.set_xscale("linear")
            axis.set_xticks(passes)
    figure.supxlabel("Curves are means over seeds.", fontsize="small")
    handles = {label: line for axis in panels[:, 0] for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False)
    return figure


def _page(results: Sequence[Result], pictures: Mapping[str, Path]) -> str:
    parts = [f"<h2>{html.escape(TITLES[what])}</h2>\n{_picture(path, TITLES[what])}" for what, path in pictures.items()]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Methods compared</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }}
</style>
<h1>Methods compared</h1>
<p>Test accuracy: mean, and standard deviation over seeds in brackets. "Minus full": the difference from full fine-tuning
on the same test rows and seeds, in points, with its 95 % interval. Seconds are those of training, without compiling.
{BARS} Curves are means.</p>
{_html(table(results))}
{chr(10).join(parts)}
</html>
"""


def _html(shown: Table) -> str:
    rows = zip(*(list(column.cells) for column in shown.columns))
    cell = lambda tag, x: f"<{tag}>{html.escape(str(x))}</{tag}>"
    head = "".join(cell("th", column.header) for column in shown.columns)
    body = "\n".join(f"<tr>{''.join(cell('td', x) for x in row)}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _picture(path: Path, title: str) -> str:
    held = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{held}">'
