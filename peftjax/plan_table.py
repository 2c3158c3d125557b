"""The plan as a table in the terminal."""

from typing import Sequence

from rich.console import Console
from rich.table import Table

from peftjax.plan import GIB, Cost


def show(costs: Sequence[Cost], title: str, console: Console | None = None) -> None:
    """Prints a row a method: what each device holds, computes and exchanges in a step.

    Args:
      costs: of `peftjax.plan.plan`.
      title: what they are of.
      console: where to print; by default the terminal.
    """
    console = Console() if console is None else console
    first = costs[0]
    hbm = "" if first.hbm is None else f" of {first.hbm / GIB:.0f} GiB"
    table = Table(title=title, caption=f"per device: {first.devices} x {first.device}{hbm}", title_justify="left")
    table.add_column("method")
    names = ("trainable", "arguments", "temporaries", "total", "fits", "TFLOPs", "Mcycles", "collectives", "compiled")
    for name in names:
        table.add_column(name, justify="right")
    for c in costs:
        table.add_row(*_cells(c))
    console.print(table)
    for c in costs:
        if c.error is not None:
            console.print(f"{c.name}: {c.error}", markup=False)


def _cells(c: Cost) -> list[str]:
    gib = lambda n: "-" if n is None else f"{n / GIB:.2f} GiB"
    moved = sum(t.bytes for t in c.collectives.values())
    return [
        c.name,
        f"{c.trainable / 1e6:,.1f} M",
        gib(c.arguments),
        gib(c.temporaries),
        gib(c.total),
        {True: "yes", False: "no", None: "?"}[c.fits],
        f"{c.flops / 1e12:.2f}",
        f"{c.cycles / 1e6:,.0f}" if c.cycles else "-",
        gib(moved) if c.error is None else "-",
        f"{c.seconds:.0f} s",
    ]
