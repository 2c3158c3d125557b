"""The flag --config as scripts read it: a method takes all of its arguments, and what nothing would read is refused."""

import contextlib
import inspect

import pytest
from absl import flags

import peftjax as pj
from experiments import compare, pages, recipes, sweep


def given(*asked, page="reviews.py"):
    """The page that these flags give."""
    values, argv = flags.FlagValues(), ["script", *asked]
    pages.define(page, values, argv)
    values(argv)
    return pages.read(values)


@pytest.mark.parametrize(
    "asked,made",
    [
        (["lora.init=pissa", "lora.rslora=True"], pj.lora(8, 16.0, init="pissa", rslora=True)),
        (["lora.rslora", "lora.rank=4"], pj.lora(4, 16.0, rslora=True)),
        (["lora.targets=('query','value')", "lora.exclude=.*/0/.*"], pj.lora(8, 16.0, targets=("query", "value"), exclude=".*/0/.*")),
        (["lora.rank_pattern={'.*query': 2}", "lora.train_a=False"], pj.lora(8, 16.0, rank_pattern={".*query": 2}, train_a=False)),
        (["method=adapter", "adapter.activation=gelu"], pj.adapter("houlsby", bottleneck=48, activation="gelu")),
        (["method=prefix", "prefix.hidden=8"], pj.prefix(16, hidden=8)),
        (["method=oft", "oft={'rank': 4}"], pj.oft(4)),
    ],
)  # fmt: skip
def test_a_block_takes_every_argument(asked, made):
    c = given(*(f"--config.{one}" for one in asked))
    assert recipes.method(c, 10) == pj.chain(made, pj.unfreeze("classifier"))


def test_every_argument_of_every_method_is_known():
    """Those of its block on the page, too."""
    c = given()
    for name in recipes.METHODS:
        recipes.check(name, c.get(name, {}))
        taken = inspect.signature(getattr(pj, name)).parameters
        recipes.check(name, {k: x.default for k, x in taken.items() if k != "total_steps"})


def test_patterns_are_laid_and_kept():
    c = given("--config.lora.rank_pattern={'.*query': 2}", page="sweep.py")
    laid = sweep.Setting("lora", 0.1, 4).laid(c, 1)
    assert sweep.kept(laid, "lora", sweep.FREE)["lora"] == {
        "rank": 4, "alpha": 16.0, "dropout": 0.0, "rank_pattern": {".*query": 2}
    }  # fmt: skip
    assert (c.lora.rank, c.seed, laid.seed) == (8, 0, 1)


@pytest.mark.parametrize(
    "script,asked,words",
    [
        (compare, ["seed=3"], "--config.seed= would change nothing here: c.seeds says it"),
        (compare, ["rate.lora=0.1"], "--config.rate.lora= would change nothing here: c.winners says them"),
        (compare, ["lora.rank=4"], "--config.lora.rank= would change nothing here: c.winners says it"),
        (compare, ["winners=", "epochs=4"], "--config.epochs= would change nothing here: c.passes says it"),
        (sweep, ["method=lora"], "--config.method= would change nothing here: c.methods says it"),
        (sweep, ["adapter.bottleneck=4"], "--config.adapter.bottleneck= would change nothing here: c.sizes says it"),
        (sweep, ["join=auto"], "--config.join= would change nothing here: one process does all runs"),
        (compare, ["winners=", "rate.lora=0.1", "lora.rank=4"], None),
        (sweep, ["rates.vera=0.1,0.2", "methods=vera", "adapter.kind=pfeiffer"], None),
    ],
)
def test_flags_that_a_script_would_not_heed_are_refused(script, asked, words):
    name = f"{script.__name__.rpartition('.')[2]}.py"
    values, argv = flags.FlagValues(), ["script", *(f"--config.{one}" for one in asked)]
    pages.define(name, values, argv)
    values(argv)
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        pages.refuse(script.unheeded(pages.read(values)), values)


@pytest.mark.parametrize("script", [compare, sweep])
def test_the_commands_of_a_script_are_ones_that_it_takes(script):
    """Those that its first lines show, as far as the list of runs."""
    name = f"{script.__name__.rpartition('.')[2]}.py"
    commands = [line.split()[2:] for line in script.__doc__.splitlines() if line.startswith("python ")]
    assert len(commands) > 1
    for asked in commands:
        values, argv = flags.FlagValues(), ["script", *asked]
        flags.DEFINE_bool("quick", False, "", flag_values=values)
        pages.define(name, values, argv)
        values(argv)
        c = pages.read(values)
        if values.quick:
            compare.quicken(c, values["config"].override_values)
        pages.refuse(script.unheeded(c), values)
        assert compare.runs(c) if script is compare else sweep.settings(c)


@pytest.mark.parametrize(
    "asked,words",
    [
        ("sede=1", "--config.sede: the page has no such setting; the nearest is seed"),
        ("rate.lorra=1", "--config.rate.lorra: the page has no such setting; the nearest is lora"),
        ("lora.int=pissa", "method 'lora' has no argument 'int', only rank, alpha, targets"),
        ("dora.init_=pissa", "method 'dora' has no argument 'init_', only rank"),
        ("adalora.total_steps=9", "method 'adalora' has no argument 'total_steps', only rank, target_rank"),
        ("lora.rslora=maybe", "method 'lora', rslora 'maybe': expected True or False, such as False"),
        ("adapter.reduction=many", "method 'adapter', reduction 'many': expected a number, such as 16"),
        ("lora={'ranks': 3}", "method 'lora' has no argument 'ranks'"),
        ("lora.init=pisa", "unknown init 'pisa'; expected one of kaiming"),
    ],
)
def test_what_nothing_reads_is_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        recipes.method(given(f"--config.{asked}"), 10)
