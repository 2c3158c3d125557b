"""What each chip holds and exchanges in a step of Llama-3.1-8B, on 8 to 256 chips: from compilations, without a TPU.

    python experiments/bench/scaling.py

compiles a step of LoRA and of full fine-tuning for v5e slices (the extra `plan` brings the compiler), an example of 4,096
tokens for each chip, everything split over all chips ("fsdp"), and what the README shows beside these. It writes
`scaling.json`, and from it `scaling.md` and `scaling.png`. What `scaling.json` holds already is not compiled again: a row
takes about a minute on two idle cores (44 to 84 s, as `scaling.json` says of each), and three or four beside other work.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from experiments import record
from experiments.report import saved

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "experiments" / "configs" / "llama-3.1-8b.json"
SLICES = {8: "v5e:2x4", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
METHODS = {"lora": "LoRA, rank 16", "full": "full fine-tuning"}
COLORS = {"lora": "#0072b2", "full": "#d55e00"}
GIB = 2**30
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a row is of: the flags of `peftjax.plan`; of `batch`, None is an example for each chip."""

    topology: str
    method: str
    mesh: str = "fsdp:-1"
    remat: str = "layers"
    batch: int | None = None
    length: int = 4096


SCALED = [Plan(topology, name) for name in METHODS for topology in SLICES.values()]
BESIDE = [
    *(Plan("v5p:4x4x4", name) for name in METHODS),
    Plan("v5e:2x4", "lora", "fsdp:4,model:2", "products", 4),
    Plan("v5e:2x4", "full", "fsdp:4,model:2", "layers", 4),
    *(Plan("v5e:2x4", name, "fsdp:2,model:4", length=1024) for name in METHODS),
]


def compiled(plan: Plan, model: Path = MODEL) -> Row:
    """A row, compiled in a process of its own."""
    command = [sys.executable, "-m", "peftjax.plan", f"--model={model}", f"--topology={plan.topology}"]
    command += [f"--mesh={plan.mesh}", f"--remat={plan.remat}", *([f"--batch={plan.batch}"] if plan.batch else [])]
    env = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--length={plan.length}", f"--methods={plan.method}", "--json"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"scaling: {plan.topology}, {plan.method}: {done.stderr.strip().splitlines()[-1]}")
    by = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {"plan": dataclasses.asdict(plan), **json.loads(done.stdout)[0], "versions": by}


def of(plans: Sequence[Plan], rows: Sequence[Row]) -> list[Row]:
    """The rows of some plans, in their order, of those that are there."""
    by = {Plan(**r["plan"]): r for r in rows}
    return [by[plan] for plan in plans if plan in by]


def moved(row: Row) -> int:
    """The bytes that the collectives of a step give on one chip."""
    return sum(traffic["bytes"] for traffic in row["collectives"].values())


def page(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "# Llama-3.1-8B on 8 to 256 chips",
        "",
        f"`python experiments/bench/scaling.py`: one step on {rows[0]['device']} chips of {rows[0]['hbm'] / GIB:.4g} GiB,",
        "compiled for slices that were not there. Every chip has one example of 4,096 tokens; parameters, gradients and",
        'moments are split over all chips (mesh "fsdp"), layers are computed again in the backward pass, AdamW, bfloat16.',
        "Sizes in GiB on each chip; exchanged is what a step's collectives give there. What does not fit the compiler refuses:",
        "the sum may be above what a chip has, for not all temporaries are there while all arguments are.",
        "",
        "B of LoRA lies as the outputs of its weight, which this mesh does not split: it is whole on every chip, with its",
        "moments, and on 256 chips weighs more than a 256th of everything. On 8 and 16 chips the compiler gathers weights",
        "in pieces while it multiplies, from 64 on whole ones, once for what is computed again and for the backward pass.",
        "",
        "| method | chips | arguments | temporaries | total | fits | TFLOPs | Mcycles | exchanged |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for r in rows:
        sizes = [r["arguments"], r["temporaries"], r["total"]]
        cells = ["-" if n is None else f"{n / GIB:.2f}" for n in sizes]
        cells += ["yes" if r["fits"] else "no", f"{r['flops'] / 1e12:.1f}", f"{r['cycles'] / 1e6:,.0f}"]
        cells += [f"{moved(r) / GIB:.1f}"]
        lines.append(f"| {METHODS[r['name']]} | {r['devices']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![Bytes on each chip, held and exchanged](scaling.png)", ""])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Two panels over the number of chips: what each chip holds, and what it exchanges."""
    figure, (held, sent) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, label in METHODS.items():
        mine = [r for r in rows if r["name"] == name and r["total"] is not None]
        chips, color = [r["devices"] for r in mine], COLORS[name]
        held.plot(chips, [r["total"] / GIB for r in mine], "o-", color=color, label=f"{label}: total")
        held.plot(chips, [r["arguments"] / GIB for r in mine], "s--", color=color, label=f"{label}: state and batch")
        sent.plot(chips, [moved(r) / GIB for r in mine], "o-", color=color, label=label)
    memory = rows[0]["hbm"] / GIB
    held.axhline(memory, color="0.4", linewidth=1)
    held.text(
        0.98, memory, "memory of a chip", transform=held.get_yaxis_transform(), ha="right", va="bottom", fontsize=8
    )
    for axes, title in ((held, "Held by each chip"), (sent, "Exchanged by each chip in a step")):
        axes.set(xscale="log", title=title, xlabel="chips", ylabel="GiB", xticks=sorted({r["devices"] for r in rows}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
    held.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.88))
    sent.legend(frameon=False, fontsize=8)
    saved(figure, path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Compiles what is missing, and writes the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="compile everything again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where to write")
    asked = parser.parse_args()
    kept = asked.out / "scaling.json"
    rows = json.loads(kept.read_text()) if kept.is_file() and not asked.again else []
    for plan in (*SCALED, *BESIDE):
        if not of([plan], rows):
            rows.append(compiled(plan))
            record.replace(kept, json.dumps(rows, indent=1) + "\n")
            print(f"{plan} in {rows[-1]['seconds']:.0f} s", flush=True)
    record.replace(asked.out / "scaling.md", page(of(SCALED, rows)))
    plot(of(SCALED, rows), asked.out / "scaling.png")


if __name__ == "__main__":
    main()
