"""The scaling page and its plot say what was compiled."""

import json
from pathlib import Path

import pytest

from experiments.bench import scaling

HERE = Path(scaling.__file__).parent
ROWS = json.loads((HERE / "scaling.json").read_text())


def test_the_page_is_of_these_rows():
    assert (HERE / "scaling.md").read_text() == scaling.page(ROWS)
    chips = {name: [r["devices"] for r in ROWS if r["name"] == name] for name in scaling.METHODS}
    assert chips["lora"] == chips["full"] == sorted(scaling.SLICES)


def test_what_the_page_shows():
    """More chips hold less each; LoRA exchanges less on every slice, and holds less up to 64 chips."""
    lora, full = ([r for r in ROWS if r["name"] == name] for name in scaling.METHODS)
    for rows in (lora, full):
        held = [r["arguments"] for r in rows]
        assert held == sorted(held, reverse=True)
    for mine, theirs in zip(lora, full, strict=True):
        assert scaling.moved(mine) < scaling.moved(theirs) and mine["flops"] < theirs["flops"]
        assert mine["total"] < theirs["total"] or mine["devices"] > 64


def test_the_plot_is_drawn(tmp_path):
    scaling.plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_compile_is_said(tmp_path):
    with pytest.raises(SystemExit, match="scaling: v9:2x4, lora: plan: topology 'v9:2x4': expected local, or a slice"):
        scaling.compiled("v9:2x4", "lora")
