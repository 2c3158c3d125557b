"""The sweep and the comparison on a tiny BERT: what they choose, write, resume and refuse."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.stats
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from test_experiments import place  # noqa: F401

from experiments import compare, comparison, report, sweep
from experiments.configs import compare as comparing
from experiments.configs import sweep as sweeping
from experiments.ledger import Ledger

pytestmark = pytest.mark.third_party  # optax's Adam needs the usual promotion


def tiny(c, place, **changes):  # noqa: F811
    c.update({"model": str(place / "model"), "data": str(place / "mine.csv"), "length": 8, "fixed": True, "batch": 16})
    c.update({"out": str(place / "results"), **changes})
    return c


def printed(run, c):
    console = Console(file=io.StringIO(), width=140)
    with jax.numpy_dtype_promotion("standard"):  # fixtures of a module are not marked
        return run(c, console), console.file.getvalue()


@pytest.fixture(scope="module")
def swept(place):  # noqa: F811
    """A sweep of two methods: its page, its winners, and what it printed."""
    c = tiny(sweeping.get_config(), place, methods=("lora", "head"), rows=96, epochs=6, seeds=(0, 1))
    with c.unlocked():
        c.rates.lora, c.rates.head, c.sizes.lora = (1e-6, 3e-2), (3e-2,), (2,)
    return c, *printed(sweep.run, c)


def test_a_sweep_chooses_on_validation(swept):
    c, best, said = swept
    lines = [json.loads(x) for x in open(f"{c.out}/sweep.jsonl")]
    assert len(lines) == 6 and "6 of 6" in said and "Best on validation" in said
    value = lambda rate: np.mean(
        [x["results"]["value"] for x in lines if x["config"]["rate"] == rate and x["config"]["method"] == "lora"]
    )
    assert best["lora"]["rate"] == 3e-2 and best["lora"]["size"] == 2 and best["lora"]["tried"] == 2
    assert value(3e-2) > value(1e-6)
    assert (best["lora"]["value"], best["lora"]["least"]) == pytest.approx((value(3e-2), value(1e-6)))
    assert sweep.read_winners(sweep.Path(c.out) / "winners.json", c) == json.loads(json.dumps(best))


def test_a_sweep_goes_on(swept):
    """A half-written last row is done again; winners of other methods stay."""
    c, best, _ = swept
    path = sweep.Path(c.out) / "sweep.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    again, said = printed(sweep.run, c)
    assert "1 of 1: head" in said and set(again) == {"lora", "head"} and len(path.read_text().splitlines()) == 6
    assert sweep.winners({sweep.Setting("ia3", 0.1, None): [0.5, 0.7], sweep.Setting("ia3", 0.2, None): [0.6, 0.6]})["ia3"] == {
        "rate": 0.1, "size": None, "value": pytest.approx(0.6), "deviation": pytest.approx(np.std([0.5, 0.7], ddof=1)),
        "least": pytest.approx(0.6), "tried": 2,
    }  # fmt: skip


def test_the_committed_winners_are_those_of_the_committed_runs():
    """And the README and the page show them."""
    c, folder = sweeping.get_config(), comparing.WINNERS.parent
    ledger, values = Ledger(folder / "reviews-sweep.jsonl", sweep.VERSION), {}
    for one in sweep.settings(c):
        keys = [sweep.kept(one.laid(c, seed), one.method, sweep.FREE) for seed in c.seeds]
        values[one] = [ledger.find(key)["value"] for key in keys]
    best = sweep.read_winners(comparing.WINNERS, c)
    assert best == {name: {**x, "rows": c.rows} for name, x in sweep.winners(values).items()} and set(best) == set(c.methods)
    readme = (sweep.Path(sweep.__file__).parents[1] / "README.md").read_text()
    for name, x in best.items():
        size = "-" if x["size"] is None else x["size"]
        cells = (f"{x['rate']:g}", size, f"{x['value']:.3f} ({x['deviation']:.3f})", f"{x['least']:.3f}", x["tried"])
        assert f"| {comparison.name(name)} | {' | '.join(map(str, cells))} |" in readme, name
        assert f"{name:<8} {x['rate']:<6g} {size!s:<5} {x['value']:.3f} ({x['deviation']:.3f})" in sweeping.__doc__, name


def test_the_readme_shows_the_committed_comparison():
    """Its table is of the committed rows, and so are the page's figures; no method that should be close is far behind."""
    c, folder = comparing.get_config(), comparing.WINNERS.parent
    ledger, best = Ledger(folder / "reviews-compare.jsonl", compare.VERSION), compare.winners(c)
    results = []
    for one in compare.runs(c):
        kept = compare.kept_of(compare.page(c, one, best), one)
        results.append(ledger.find({**kept, **dataclasses.asdict(one)}))
    assert len(results) == 99 and None not in results and {one["tested"] for one in results} == {2000}
    shown, readme = comparison.table(results), (sweep.Path(sweep.__file__).parents[1] / "README.md").read_text()
    rows = [f"| {' | '.join(cells)} |" for cells in zip(*(list(column.cells) for column in shown.columns))]
    assert len(rows) == 11 and [row for row in rows if row not in readme] == []
    by = report.groups(results, "method")
    for name in (*c.baselines, *c.methods):
        some = [[one["accuracy"] for one in by[name, n]] for n in c.rows]
        said = "  ".join(f"{np.mean(x):.3f} ({min(x):.3f}-{max(x):.3f})" for x in some)
        assert f"    {name:<8} {said}" in comparing.__doc__, name
    for name in ("lora", "dora", "adapter"):
        assert comparison.difference(by[name, 3000], by["full", 3000])[2] > -0.01, name


def test_sizes_that_were_not_swept_are_those_of_the_page(tmp_path):
    c = comparing.get_config()
    c.winners = str(tmp_path / "winners.json")
    won = {"loha": {"rate": 0.1, "size": None}, "lora": {"rate": 0.2, "size": 4}}
    (tmp_path / "winners.json").write_text(json.dumps({"version": sweep.VERSION, "methods": won}))
    c.methods, c.baselines, c.loha.rank = ("loha", "lora"), (), 3
    best = compare.winners(c)
    ranks = {one.method: compare.page(c, one, best)[one.method].rank for one in compare.runs(c)}
    assert ranks == {"loha": 3, "lora": 4}
    unheeded = compare.unheeded(c)
    assert "lora.rank" in unheeded and "loha.rank" not in unheeded and "rate" in unheeded


def test_tries_are_drawn(swept):
    c = sweeping.get_config()
    c.tries = 2
    assert [sum(one.method == m for one in sweep.settings(c)) for m in c.methods] == [2] * len(c.methods)
    c.methods = ("lora,prefix",)  # as a flag gives them
    assert {one.method for one in sweep.settings(c)} == {"lora", "prefix"}
    for changes, words in (
        ({"methods": ("lorra",)}, "method 'lorra'; expected one of lora, dora"),
        ({"tries": -1}, "tries -1; expected a whole number, 0 at least"),
        ({"rows": 8}, "rows 8; expected a whole number, 32 at least"),
        ({"rates": {**c.rates, "lora": ("high",)}}, r"rates.lora \('high',\): expected numbers, as --config.rates.lora=0.001"),
        ({"sizes": {**c.sizes, "lora": (4.5,)}}, r"sizes.lora \(4.5,\): expected whole numbers, as --config.sizes.lora=0,1"),
        ({"resume": "yes"}, "resume 'yes'; expected auto or no"),
    ):
        wrong = sweeping.get_config()
        with wrong.unlocked():
            wrong.update({"methods": ("lora",), **changes})
        with pytest.raises(ValueError, match=words):
            sweep.settings(wrong)


def test_every_method_with_a_size_can_be_swept_by_flags():
    c = sweeping.get_config()
    assert set(c.sizes) == {name for name, size in sweep.recipes.METHODS.items() if size}
    assert all(c.rates.get(name) for name in sweep.recipes.NAMES)
    c.methods, c.sizes.oft = ("oft", "loha"), (16, 32)
    assert {(one.method, one.size) for one in sweep.settings(c)} == {("oft", 16), ("oft", 32), ("loha", None)}
    assert "oft.block_size" in sweep.unheeded(c) and "loha.rank" not in sweep.unheeded(c)


@pytest.mark.ci
def test_a_method_that_came_to_no_end_has_no_winner_of_before(place, tmp_path):  # noqa: F811
    c = tiny(sweeping.get_config(), place, methods=("lora",), rows=96, epochs=1, seeds=(0,), out=str(tmp_path))
    with c.unlocked():
        c.rates.lora, c.sizes.lora = (1e38,), ()
    before = {"lora": {"rate": 1e-3, "size": 8}, "head": {"rate": 1e-2, "size": None}}
    path = tmp_path / "winners.json"
    path.write_text(json.dumps({"version": sweep.VERSION, **sweep.origin(c), "methods": before}))
    assert printed(sweep.run, c)[0] == {}
    assert sweep.read_winners(path, c) == {"head": before["head"]}


@pytest.fixture(scope="module")
def compared(swept, place):  # noqa: F811
    c = tiny(comparing.get_config(), place, methods=("lora", "head"), rows=(64, 96), passes=(2, 2), seeds=(0, 1))
    c.winners = f"{swept[0].out}/winners.json"
    return c, *printed(compare.run, c)


def test_a_comparison(compared):
    c, results, said = compared
    assert len(results) == 2 * 2 * 4 and "16 of 16" in said
    for part in ("TF-IDF + logistic regression", "frozen linear probe", "LoRA", "96 rows", "minus full"):
        assert part in said
    lora = [one for one in results if one["method"] == "lora" and one["rows"] == 96]
    assert all(comparison.correct(one).mean() == one["accuracy"] and len(one["validation"]) == 2 for one in lora)
    kept = [json.loads(x)["config"] for x in open(f"{c.out}/compare.jsonl")]
    assert {(one["rate"], one["lora"]["rank"]) for one in kept if one.get("method") == "lora" and "lora" in one} == {(3e-2, 2)}
    folder = compare.Path(c.out)
    for what in ("parameters", "seconds", "rows", "curves"):
        assert (folder / f"compare-{what}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (folder / "compare.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 4
        and "<td>LoRA</td>" in page
        and "http:" not in page
        and "https:" not in page
    )


def test_what_is_drawn(compared):
    """The points of the plots are means over seeds; those without training from scratch have a panel of their own."""
    results = compared[1]
    scratch = [{**one, "method": "scratch", "accuracy": 0.1} for one in results if one["method"] == "head"]
    above, below = comparison._by_rows([*results, *scratch]).axes
    drawn = lambda axis: {box.get_label(): box.lines[0].get_xydata() for box in axis.containers}
    assert set(drawn(below)) - set(drawn(above)) == {"from scratch"} and above.get_ylim()[0] > 0.1 > below.get_ylim()[0]
    mean = lambda n: np.mean([one["accuracy"] for one in results if (one["method"], one["rows"]) == ("lora", n)])
    np.testing.assert_allclose(drawn(above)["LoRA"], [(64, mean(64)), (96, mean(96))])
    (only,) = comparison._scatter(results, "trainable", "parameters").axes
    trains = next(one["trainable"] for one in results if one["method"] == "lora")
    np.testing.assert_allclose(drawn(only)["LoRA"], [(trains, mean(96))])
    losses, scores = comparison._curves(results).axes[:2]
    last = [one for one in results if (one["method"], one["rows"]) == ("lora", 64)]
    line = next(x for x in losses.lines if x.get_label() == "LoRA")
    np.testing.assert_allclose(line.get_ydata(), np.mean([one["training_loss"] for one in last], 0))
    assert any(np.allclose(x.get_ydata(), np.mean([one["validation"] for one in last], 0)) for x in scores.lines)


def test_a_difference_is_of_the_seeds_that_both_have(compared):
    results = compared[1]
    without = [one for one in results if (one["method"], one["seed"]) != ("head", 1)]
    renamed = [{**one, "method": "full"} if one["method"] == "head" else one for one in without]
    cells = lambda some: dict(zip(*(list(column.cells) for column in [comparison.table(some).columns[k] for k in (0, -2)])))
    assert cells(renamed)["LoRA"].endswith(", one seed)") and cells(renamed)["full fine-tuning"] == "-"
    other = [{**one, "seed": 7} if one["method"] == "full" else one for one in renamed]
    assert cells(other)["LoRA"] == "-"


def test_a_comparison_is_not_done_twice(compared):
    c, results, _ = compared
    again, said = printed(compare.run, c)
    assert again == results and " of " not in said.split("runs are in")[0].split("\n")[0]


@pytest.mark.full
def test_the_scripts_run_as_files(place, tmp_path):  # noqa: F811
    """The comparison with what the sweep before it has won."""
    tiny = {"model": place / "model", "data": place / "mine.csv", "length": 8, "fixed": True, "batch": 16, "out": tmp_path}
    swept = {"methods": "head", "rates.head": "0.03,", "rows": 32, "epochs": 1, "seeds": "0,"}
    compared = {"methods": "head", "rows": "32,", "passes": "2,", "seeds": "0,", "winners": tmp_path / "winners.json"}
    for script, own, said in ((sweep, swept, "Best on validation"), (compare, compared, "compare.html")):
        command = [sys.executable, script.__file__, *(f"--config.{k}={v}" for k, v in (tiny | own).items())]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    methods = [json.loads(line)["results"]["method"] for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    assert methods == ["words", "probe", "head"] and (tmp_path / "compare.html").is_file()


@pytest.fixture
def unplotted(monkeypatch):
    """Comparisons without pictures, which take longer than these runs."""
    monkeypatch.setattr(comparison, "write", lambda results, folder: [])


def readable(folder):
    """The names of runs in a folder, without the marks that tell their other settings apart."""
    found = [run.name.rpartition("-") for run in folder.iterdir()]
    assert all(len(mark) == 8 for _, _, mark in found)
    return sorted(name for name, _, _ in found)


@pytest.mark.ci
def test_runs_that_differ_in_any_setting_have_their_own_folders(place, tmp_path, unplotted, monkeypatch):  # noqa: F811
    """With checkpoints and logs no run goes on from another's state: the results are those without checkpoints."""
    small = {"methods": ("lora",), "out": str(tmp_path), "resume": "auto", "tensorboard": True}
    c = tiny(sweeping.get_config(), place, **small, rows=32, epochs=1, seeds=(0,))
    with c.unlocked():
        c.rates.lora, c.sizes.lora = (1e-3, 3e-2), (2, 4)
    printed(sweep.run, c)
    names = [f"mine-lora-seed0-rank{size}-rate{rate}-rows32" for size in (2, 4) for rate in (0.001, 0.03)]
    assert readable(tmp_path / "sweep") == names
    with c.unlocked():
        c.lora.alpha, c.rates.lora, c.sizes.lora = 3.0, (1e-3,), (2,)
    printed(sweep.run, c)
    assert readable(tmp_path / "sweep") == [names[0], *names]
    assert all(len(list((run / "tensorboard").iterdir())) == 1 for run in (tmp_path / "sweep").iterdir())
    c = tiny(comparing.get_config(), place, **small, baselines=("words",), rows=(32, 96), passes=(3, 3), seeds=(0,))
    c.winners, c.rate.lora = "", 3e-2
    with monkeypatch.context() as patch:
        patch.setattr(compare.running, "forget", lambda folder, result: None)
        found = printed(compare.run, c)[0]
    assert readable(tmp_path / "compare") == [f"mine-lora-seed0-rank8-rate0.03-rows{n}" for n in (32, 96)]
    assert not list((tmp_path / "sweep").rglob("checkpoints"))  # nobody goes on from runs that are rows
    (tmp_path / "compare.jsonl").unlink()  # as if they had been killed just before their rows were written
    again = printed(compare.run, c)[0]
    ours = lambda results: [(one["correct"], one["seconds"]) for one in results if one["method"] == "lora"]
    assert ours(again) == ours(found)  # to the second: it was read, and not done again
    c.update({"resume": "no", "tensorboard": False, "out": str(tmp_path / "alone")})
    alone = printed(compare.run, c)[0]
    assert [one["correct"] for one in found] == [one["correct"] for one in alone]


def test_a_file_that_changed_is_another_data_set(place, tmp_path, unplotted):  # noqa: F811
    """The same path with other labels: nothing of what was measured before is shown for it."""
    path, text = tmp_path / "own.csv", (place / "mine.csv").read_text()
    small = {"methods": ("head",), "baselines": ("words",), "rows": (96,), "passes": (1,), "seeds": (0,), "winners": ""}
    c = tiny(comparing.get_config(), place, **small)
    c.update({"data": str(path), "out": str(tmp_path)})
    path.write_text(text)
    before = printed(compare.run, c)[0]
    head, *lines = text.split("\n")
    path.write_text("\n".join([head, *(line.split(",")[0] + ",bad" for line in lines[:90]), *lines[90:]]))
    after, said = printed(compare.run, c)
    assert "2 of 2" in said and [one["correct"] for one in after] != [one["correct"] for one in before]
    path.write_text(text)
    assert printed(compare.run, c)[0] == before


def test_without_winners_the_page_says_the_rate():
    c = comparing.get_config()
    c.update(compare.QUICK)
    made = {one.method: compare.page(c, one, compare.winners(c)) for one in compare.runs(c)}
    assert list(made) == ["words", "probe", "lora", "adapter", "full", "scratch"]
    assert (made["lora"].rate.lora, made["lora"].lora.rank, made["lora"].epochs) == (c.rate.lora, c.lora.rank, 3)


def test_a_quick_comparison_is_what_flags_ask_for():
    """Flags are stronger than --quick; the page as a script reads it."""
    values = flags.FlagValues()
    asked = ["compare.py", "--config.methods=lora,full", "--config.rows=100,250", "--config.passes=2,3"]
    page = str(sweep.Path(comparing.__file__))
    config_flags.DEFINE_config_file("config", page, flag_values=values, sys_argv=asked)
    values(asked)
    compare.quicken(values["config"].value, values["config"].override_values)
    made = compare.runs(values["config"].value)
    assert {one.method for one in made} == {"words", "probe", "lora", "full"}
    assert {one.rows for one in made} == {100, 250}
    assert {one.seed for one in made} == {0} and values["config"].value.winners == ""
    c = values["config"].value
    assert compare.page(c, made[-1], compare.winners(c)).epochs == 3
    assert "rate" not in compare.unheeded(values["config"].value)  # which its own page says now


def test_the_paired_difference():
    packed = lambda bits: np.packbits(np.array(bits, bool)).tobytes().hex()
    made = lambda seed, bits: {"seed": seed, "correct": packed(bits), "tested": 4}
    mine, theirs = [made(0, [1, 1, 0, 1]), made(1, [1, 1, 1, 1])], [made(0, [1, 0, 0, 1]), made(1, [1, 1, 0, 0])]
    # d: (0, 1, 0, 0) and (0, 0, 1, 1). By row 0, 1/2, 1/2, 1/2: variance 1/16. By seed 1/4, 1/2: variance 1/32.
    much, low, high = comparison.difference(mine, theirs)
    rows, seeds = 1 / 16 / 4, 1 / 32 / 2
    freedom = (rows + seeds) ** 2 / (rows**2 / 3 + seeds**2 / 1)
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(rows + seeds)
    assert (much, low, high) == pytest.approx((3 / 8, 3 / 8 - half, 3 / 8 + half))
    much, low, high = comparison.difference(mine[:1], theirs[:1])  # 0, 1, 0, 0: the rows alone, with three degrees
    assert (much, low) == pytest.approx((1 / 4, 1 / 4 - 3.18244630528 * np.sqrt(1 / 4 / 4)))
    assert comparison.difference(mine, mine) == (0, 0, 0)
    with pytest.raises(ValueError, match="no seed that both methods have"):
        comparison.difference(mine[:1], theirs[1:])


def test_a_baseline_that_cannot_be_computed_is_named(place, tmp_path, unplotted):  # noqa: F811
    lines = [f"{'xyz'[k % 3]} {'ab'[k % 2]},{('bad', 'good')[k % 2]}" for k in range(60)]
    (tmp_path / "short.csv").write_text("\n".join(["text,label", *lines]))
    small = {"methods": ("head",), "baselines": ("words",), "rows": (32,), "passes": (1,), "seeds": (0,), "winners": ""}
    c = tiny(comparing.get_config(), place, **small)
    c.update({"data": str(tmp_path / "short.csv"), "out": str(tmp_path)})
    words = "method='words', rows=32, seed=0.: no text .*; --config.baselines= does without 'words'"
    with pytest.raises(ValueError, match=words):
        printed(compare.run, c)
    c.baselines = ()
    assert [one["method"] for one in printed(compare.run, c)[0]] == ["head"]


@pytest.mark.ci
def test_runs_that_come_to_no_end_are_left_out(place, tmp_path):  # noqa: F811
    """Those behind them are done; scratch begins without pretraining; of one seed there is no deviation.

    Where checkpoints are kept, those of a run that failed are, for its row names them.
    """
    small = {"methods": ("lora", "scratch"), "baselines": ("words",), "rows": (32, 64), "passes": (3,), "seeds": (0, 0)}
    c = tiny(comparing.get_config(), place, winners="", **small)
    c.rate.lora = 1e38
    c.update({"out": str(tmp_path), "resume": "auto"})
    results, said = printed(compare.run, c)
    failed = [json.loads(line)["results"].get("failed", "") for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    kept = {str(path) for path in tmp_path.glob("**/checkpoints")}
    assert len(kept) == 2 == len([x for x in failed if x]) and all(x.endswith(tuple(kept)) for x in failed if x)
    assert [(one["method"], one["rows"]) for one in results] == [(m, n) for n in (32, 64) for m in ("words", "scratch")]
    assert "left out: lora, 64 rows, seed 0: 5 steps in a row" in said and "(0.000)" not in said
    words = {one["rows"]: one["trainable"] for one in results if one["method"] == "words"}
    assert words[32] < words[64] and re.search(rf"TF-IDF \+ logistic regression *\| +{words[64]} \|", said)
    c.methods, c.baselines = ("",), ("words",)
    assert len(printed(compare.run, c)[0]) == 2  # without curves
    c.methods, c.baselines, c.rows = ("lora",), (), (64,)
    with pytest.raises(ValueError, match="not one of these runs came to its end"):
        printed(compare.run, c)
    assert sweep.winners({sweep.Setting("lora", 0.1, 8): [-np.inf], sweep.Setting("head", 0.1, None): [0.5]}) == {
        "head": {"rate": 0.1, "size": None, "value": 0.5, "deviation": None, "least": 0.5, "tried": 1}
    }


@pytest.mark.ci
def test_compiling_is_not_among_the_seconds(place, monkeypatch):  # noqa: F811
    """Every step that a run takes has been compiled when its clock begins, also by a later run with longer texts."""
    seen, whole = [], sweep.finetune.train

    def train(step, *given):
        compiled = lambda: [run._cache_size() for run in step._jitted.values()]
        before, made = compiled(), whole(step, *given)
        seen.append((before, compiled()))
        return made

    monkeypatch.setattr(sweep.finetune, "train", train)
    c = tiny(comparing.get_config(), place, method="lora", fixed=False, epochs=1, patience=1)
    task, rows = compare.tasks.read(c)
    model, tools = sweep.TextModel(sweep.Page(c.model, c.pool, c.length, c.fixed, task), c.dropout), {}
    width = np.searchsorted(model.widths, [len(ids) for ids in model.tokens(rows.train.texts)])
    for some in (rows.train[np.flatnonzero(width == width.min())], rows.train):
        assert len(some) >= c.batch
        printed(lambda c, console: sweep.finetune.fit(c, model, some, rows.validation, console, tools), c)
    assert [before == after for before, after in seen] == [True, True]
    assert seen[0][0][0] == 1 < seen[1][0][0] == len({*width})


def test_the_probes_clock_begins_when_its_encoder_is_compiled(place, monkeypatch):  # noqa: F811
    c, clocks, made = tiny(comparing.get_config(), place, fixed=False), [], []
    task, rows = compare.tasks.read(c)
    model = sweep.TextModel(sweep.Page(c.model, c.pool, c.length, c.fixed, task), c.dropout)
    traced = lambda params, batch: made.append(batch["ids"].shape) or sweep.TextModel.features(model, params, batch)
    monkeypatch.setattr(model, "features", traced)
    monkeypatch.setattr(compare.baselines.time, "perf_counter", lambda: clocks.append(len(made)) or 0.0)
    compare.baselines.probe(rows, rows.test.open(), sweep.finetune.features(c, model))
    assert clocks[0] == clocks[1] > 1


def test_says_what_is_wrong(compared, tmp_path):
    c = compared[0]
    wrong = lambda **changes: tiny(comparing.get_config(), sweep.Path(c.out).parent, winners=c.winners, **changes)
    for changes, words in (
        ({"methods": ("lorra",)}, "method 'lorra'; expected one of words, probe, lora"),
        ({"task": "regress"}, "task 'regress': methods are compared on 'classify'"),
        ({"passes": (1, 2)}, r"passes \(1, 2\) over rows \(250, 1000, 3000\): expected a number for each, from 1, or one"),
        ({"passes": (0,)}, "expected a number for each, from 1"),
        ({"methods": ("dora",)}, "has no winner of 'dora'; expected one: run experiments/sweep.py for it"),
        ({"rows": (8,), "passes": (1,)}, r"rows \(8,\): expected 16 at least, which are a batch"),
        ({"profile": "7"}, "profile '7'; expected"),
    ):
        with pytest.raises(ValueError, match=words):
            compare.run(wrong(**changes), Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="rows 999: expected 1 to 140, the number of training rows"):
        compare.run(wrong(methods=("lora",), rows=(999,), passes=(1,)), Console(file=io.StringIO()))
    (tmp_path / "old.jsonl").write_text('{"config": {"version": 0}, "results": {}}\n')
    with pytest.raises(ValueError, match="line 1 is of version 0; expected 1: move the file away"):
        Ledger(tmp_path / "old.jsonl", 1)
    for text, words in (
        ("{", "is damaged"),
        ('{"version": 1}', 'is damaged: expected winners under "methods"'),
        ('{"version": 7}', "is of version 7; expected 1"),
        ("[]", "version None"),
    ):
        (tmp_path / "winners.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            sweep.read_winners(tmp_path / "winners.json", c)
    with pytest.raises(ValueError, match="expected a file of winners, as experiments/sweep.py writes it"):
        sweep.read_winners(tmp_path / "none.json", c)


def test_winners_are_of_one_data_set_model_and_task(swept, tmp_path, monkeypatch):
    """Those that do not say so, as they were written before, are of the reviews; a sweep looks before its first run."""
    path, best = tmp_path / "winners.json", {"lora": {"rate": 1e-3, "size": 8}}
    path.write_text(json.dumps({"version": 1, "methods": best}))
    c = sweeping.get_config()
    assert sweep.read_winners(path, c) == best
    c.out = str(tmp_path)
    monkeypatch.setattr(sweep.finetune, "fit", lambda *_: pytest.fail("a run began"))
    for name, x in (("data", "glue/sst2"), ("model", "bert-base-uncased"), ("task", "regress")):
        other = c.copy_and_resolve_references()
        other[name] = x
        words = rf"winners.json holds winners of {name} '\w+'; expected '{x}': run experiments/sweep.py for it, with an"
        with pytest.raises(ValueError, match=words):
            sweep.run(other, Console(file=io.StringIO()))
    path.write_text('{"version": 7, "methods": {}}')
    with pytest.raises(ValueError, match="is of version 7; expected 1"):
        sweep.run(c, Console(file=io.StringIO()))
    saved = json.loads((sweep.Path(swept[0].out) / "winners.json").read_text())
    assert saved["data"] == swept[0].data and saved["task"] == "classify" and len(saved["digest"]) == 64
    path.write_text(json.dumps({**saved, "digest": "0" * 64}))
    with pytest.raises(ValueError, match="holds winners of digest '0000"):
        sweep.read_winners(path, swept[0])
