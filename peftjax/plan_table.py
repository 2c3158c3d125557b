"""The plan as a table in the terminal."""

from typing import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from peftjax.step_cost import GIB, Cost

# What a column is called, over its unit: the numbers alone fit a terminal of 80 columns.
COLUMNS = (
    "trainable\nM",
    "args\nGiB",
    "temps\nGiB",
    "total\nGiB",
    "fits\n",
    "work\nTFLOPs",
    "time\nMcycles",
    "moved\nGiB",
    "compiled\ns",
)


def show(costs: Sequence[Cost], title: str, console: Console | None = None) -> None:
    """Prints a row a method: what each device holds, computes and exchanges in a step.

    Args:
      costs: of `peftjax.plan.plan`.
      title: what they are of.
      console: where to print; by default the terminal.
    """
    console = Console() if console is None else console
    first = costs[0]
    hbm = "" if first.hbm is None else f" of {first.hbm / GIB:.4g} GiB"
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("method\n", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for c in costs:
        table.add_row(*_cells(c))
    line = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
    line(f"{title}; on each of {first.devices} x {first.device}{hbm}:")
    console.print(table)
    console.print(_moved(costs))
    for c in costs:
        if c.error is not None:
            line(f"{c.name}: {c.error}")


def _moved(costs: Sequence[Cost]) -> Table:
    """What the collectives of a step give, by kind, and its results that do not take the place of its arguments."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("method", "moved"):
        table.add_column(name, no_wrap=True)
    for name in ("times", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in costs:
        for kind, traffic in sorted(c.collectives.items()):
            table.add_row(c.name, kind, f"{traffic.count:,}", f"{traffic.bytes / GIB:,.2f}")
        if c.outputs is not None:
            table.add_row(c.name, "results", "1", f"{c.outputs / GIB:,.2f}")
    return table


def _cells(c: Cost) -> list[str]:
    gib = lambda n: "-" if n is None else f"{n / GIB:,.2f}"
    moved = sum(t.bytes for t in c.collectives.values())
    return [
        c.name,
        f"{c.trainable / 1e6:,.1f}",
        gib(c.arguments),
        gib(c.temporaries),
        gib(c.total),
        {True: "yes", False: "no", None: "?"}[c.fits],
        f"{c.flops / 1e12:,.2f}",
        f"{c.cycles / 1e6:,.0f}" if c.cycles else "-",
        gib(moved) if c.error is None else "-",
        f"{c.seconds:.0f}",
    ]
