"""The scaling page and its plot say what was compiled."""

import json
import re
from pathlib import Path

import pytest

from experiments.bench import scaling

HERE = Path(scaling.__file__).parent
EVERY = json.loads((HERE / "scaling.json").read_text())
ROWS = scaling.of(scaling.SCALED, EVERY)
GIB = 2**30


def test_the_readme_is_of_these_rows():
    """Its table, and what it says of products that are kept."""
    readme = re.sub(r"\s+", " ", (Path(__file__).parents[1] / "README.md").read_text())
    beside = scaling.of(scaling.BESIDE, EVERY)
    assert len(EVERY) == len(scaling.SCALED) + len(scaling.BESIDE) and len(beside) == len(scaling.BESIDE)
    shown = [r for r in (*ROWS, *beside[:2]) if r["plan"]["topology"] in ("v5e:2x4", "v5e:8x8", "v5p:4x4x4")]
    assert len(shown) == 6
    for r in shown:
        sizes = f"{r['arguments'] / GIB:.2f} | {r['temporaries'] / GIB:.2f} | {r['total'] / GIB:.2f} of {r['hbm'] / GIB:.4g}"
        work = f"{r['flops'] / 1e12:.1f} | {r['cycles'] / 1e6:,.0f} | {scaling.moved(r) / GIB:.1f}"
        assert f"| {sizes} | {'yes' if r['fits'] else 'no'} | {work} |" in readme, r["plan"]
    kept = beside[2:4]
    said = [f"{r['total'] / GIB:.2f} GiB" for r in kept] + [f"{r['cycles'] / 1e6:,.0f} Mcycles" for r in kept]
    ratio = lambda key, pair: pair[0][key] / pair[1][key]
    first = [r for r in ROWS if r["plan"]["topology"] == "v5e:2x4"]
    said += [f"(LoRA {ratio('flops', kept):.2f} of it)", f"({ratio('cycles', kept):.2f})"]
    said += [f"v5e-8 a LoRA step takes {ratio('cycles', first):.2f} of full", f"and {ratio('flops', first):.2f} of its TFLOPs"]
    once = [ratio("cycles_once", pair) for pair in (first, kept, beside[4:])]
    said += ["LoRA has {:.2f} of full's in the first two rows, {:.2f} here, and {:.2f} with".format(*once)]
    assert max(once[1:]) < 0.48 < 0.5 < ratio("flops", kept)
    assert [words for words in said if words not in readme] == []


def test_every_row_says_what_compiled_it_and_took_less_than_two_minutes():
    assert {tuple(r["versions"]) for r in EVERY} == {("jax", "libtpu")}
    assert 0 < max(r["seconds"] for r in EVERY) < 120


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
        scaling.compiled(scaling.Plan("v9:2x4", "lora"))
