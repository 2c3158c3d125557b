"""The scripts end to end, on a tiny random BERT and a tiny file; and the real MiniLM where it is in the cache."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import optax
import pytest
from rich.console import Console
from test_bert import SIZES, torch_tensors, write
from test_experiments_data import tokenizer

import peftjax as pj
from experiments import assets, data, finetune, logs, predict, text_model, train
from experiments.configs import reviews
from experiments.models import bert
from experiments.models.load import load
from experiments.schedules import at_rate, warm_then_linear
from experiments.tokens import Tokens

pytestmark = pytest.mark.third_party  # optax's Adam needs the usual promotion

SMALL = {**SIZES, "num_hidden_layers": 1}
ROOT = Path(__file__).parents[1]
GOOD, BAD, PLAIN = ["fine", "great", "witty"], ["dull", "poor", "weak"], ["a", "the", "film", "story", "was", "plot"]


def configured(folder, **changes):
    """The configuration of the reviews, made tiny."""
    c = reviews.get_config()
    tiny = {"model": str(folder / "model"), "data": str(folder / "mine.csv"), "length": 8, "fixed": True, "batch": 16}
    c.update({**tiny, "epochs": 10, "patience": 10, "out": str(folder / "runs"), **changes})
    c.rate.lora = 3e-2
    return c


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a file of sentences that a single word decides."""
    folder = tmp_path_factory.mktemp("experiments")
    ids = np.ones((1, 2), np.int32)
    params = jax.jit(bert.Bert(bert.Config(**SMALL), "first").init)(jax.random.key(0), ids, ids)["params"]
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: np.asarray(x) + 0.2 * rng.standard_normal(x.shape).astype(np.float32), params)
    write(folder / "model", torch_tensors(noisy), **SMALL)
    tokenizer(folder / "model", GOOD + BAD + PLAIN)
    lines = ["text,label"]
    for k in range(200):
        words = [*rng.choice(PLAIN, rng.integers(2, 5)), rng.choice((BAD, GOOD)[k % 2])]
        lines.append(f"{' '.join(rng.permutation(words))},{('bad', 'good')[k % 2]}")
    (folder / "mine.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def finished(place):
    """A whole run: its folder, its results, and what it printed."""
    console = Console(file=io.StringIO(), width=120)
    with jax.numpy_dtype_promotion("standard"):
        results = finetune.run(configured(place), console)
    return place / "runs" / "mine-lora-seed0", results, console.file.getvalue()


def test_a_run_prints_a_table(finished):
    folder, results, printed = finished
    assert [r.name for r in results] == [
        "majority",
        "TF-IDF + logistic regression",
        "frozen linear probe",
        "this run (lora)",
    ]
    for part in (
        "examples/s",
        "epoch 2: validation accuracy",
        "Test rows: 30",
        "MCC",
        "trainable",
        *(r.name for r in results),
    ):
        assert part in printed
    accuracy = [r.scores["accuracy"] for r in results]
    assert accuracy[-1] > accuracy[0] + 0.25
    assert results[1].error == pytest.approx(np.sqrt(accuracy[1] * (1 - accuracy[1]) / 30))


def test_a_run_leaves_a_record(finished):
    folder, results, _ = finished
    row = json.loads((folder.parent / "results.jsonl").read_text().splitlines()[0])
    assert set(row) == {"time", "commit", "versions", "device", "config", "results"}
    assert row["config"]["lora"] == {"rank": 8, "alpha": 16.0, "dropout": 0.0} and row["config"]["seed"] == 0
    assert row["device"]["platform"] == "cpu" and row["versions"]["jax"] == jax.__version__
    assert row["results"]["test"] == [dataclasses.asdict(r) for r in results]
    assert (
        len(row["results"]["validation"]) == 10 == len(row["results"]["losses"])
        and 1 <= row["results"]["best_epoch"] <= 10
    )


def test_the_adapter_classifies(finished):
    folder, results, _ = finished
    texts = ["the plot was great", "a dull story", "fine"]
    found = [line.split() for line in predict.said(folder, texts)]
    assert [name for name, _ in found] == ["good", "bad", "good"] and all(0.5 < float(p) <= 1 for _, p in found)
    model = text_model.TextModel(text_model.read(folder))
    tuned = pj.load(folder / "adapter", model.params)
    assert pj.count(tuned).trainable == results[-1].trainable
    with pytest.raises(ValueError, match="none that is empty"):
        predict.said(folder, [" "])
    with pytest.raises(ValueError, match="has no model.json; expected the folder of a run"):
        predict.said(folder.parent, ["fine"])


def test_the_scripts_run_as_files_and_give_the_same_bits(finished, place):
    """Two runs of one seed are equal to the bit; on the command line, options change the page."""
    folder, _, _ = finished
    options = {
        "model": place / "model",
        "data": place / "mine.csv",
        "length": 8,
        "fixed": True,
        "batch": 16,
        "epochs": 10,
    }
    options |= {"patience": 10, "rate.lora": 3e-2, "out": place / "again"}
    script = [
        sys.executable,
        str(ROOT / "experiments" / "finetune.py"),
        *(f"--config.{k}={v}" for k, v in options.items()),
    ]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"XDG_CACHE_HOME": str(place)}
    done = subprocess.run(script, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "this run (lora)" in done.stdout
    mine, again = (x / "adapter" / "adapter.safetensors" for x in (folder, place / "again" / "mine-lora-seed0"))
    assert mine.read_bytes() == again.read_bytes()
    script = [sys.executable, str(ROOT / "experiments" / "predict.py"), f"--adapter={folder}", "a great film"]
    done = subprocess.run(script, cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("good  0.") and done.stdout.endswith("  a great film\n")


@pytest.mark.ci
def test_full_fine_tuning(finished, place):
    """Every parameter trains, the pooler's too where it is the pooler that the head reads; and what it logs."""
    c = configured(place, method="full", epochs=1, pool="first", tensorboard=True, profile="3:5")
    result = finetune.run(c, Console(file=io.StringIO()))[-1]
    body = sum(x.size for x in jax.tree.leaves(load(place / "model", "first")[1]))
    assert (result.name, result.trainable) == ("this run (full)", 34 + body)
    (events,) = (finetune.folder_of_run(c) / "tensorboard").iterdir()
    for name in (b"training/loss", b"training/examples_per_second", b"validation/accuracy", b"validation/loss"):
        assert name in events.read_bytes()
    (profile,) = (finetune.folder_of_run(c) / "profile").rglob("*.xplane.pb")
    assert profile.read_bytes().count(b"jit_advance") >= 2


@pytest.mark.ci
def test_a_network_without_pretraining_is_saved_as_one_that_was_tuned(place, tmp_path):
    """It begins elsewhere, and is read again over the weights that everyone has."""
    c = configured(place, method="scratch", epochs=2, out=str(tmp_path))
    finetune.run(c, Console(file=io.StringIO()))
    rows = data.load(str(place / "mine.csv"))
    model = text_model.TextModel(text_model.read(tmp_path / "mine-scratch-seed0"), c.dropout)
    fitted = finetune.fit(c, model, rows.train, rows.validation, Console(file=io.StringIO()))
    tuned = pj.load(tmp_path / "mine-scratch-seed0" / "adapter", model.params)
    for name, x in pj.extract(tuned).items():
        np.testing.assert_array_equal(x, pj.extract(fitted.trained.tuned)[name])
    assert all(x is y for x, y in zip(jax.tree.leaves(pj.strip(fitted.tuned)), jax.tree.leaves(model.params)))
    assert len(predict.said(tmp_path / "mine-scratch-seed0", ["fine"])) == 1


def test_a_profile_of_steps_that_never_came_says_so(tmp_path):
    with pytest.warns(UserWarning, match="no profile was written: step 10"), logs.Profile(tmp_path, "10:13") as profile:
        profile.step(12, 0.0, 1.0)
    assert not list(tmp_path.iterdir())


def test_a_baseline_that_fails_loses_no_run(place, tmp_path):
    """Texts of single letters have no words that TF-IDF counts: it is left out, with the reason."""
    lines = [f"{'xyz'[k % 3]} {'ab'[k % 2]},{('bad', 'good')[k % 2]}" for k in range(60)]
    (tmp_path / "short.csv").write_text("\n".join(["text,label", *lines]))
    console = Console(file=io.StringIO(), width=160)
    c = configured(place, data=str(tmp_path / "short.csv"), out=str(tmp_path), epochs=1, method="head")
    results = finetune.run(c, console)
    assert [r.name for r in results] == ["majority", "frozen linear probe", "this run (head)"]
    assert "the baseline 'words' is left out: no text to train on has a word of two letters" in console.file.getvalue()
    assert (tmp_path / "short-head-seed0" / "adapter" / "adapter.safetensors").is_file()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def test_an_adapter_is_saved_before_anything_else_can_fail(place, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "computed", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        finetune.run(configured(place, out=str(tmp_path), epochs=1, method="head"), Console(file=io.StringIO()))
    assert predict.said(tmp_path / "mine-head-seed0", ["fine"])


def test_the_seed_draws_everything(finished, place):
    """The order of the data, and A of LoRA, before any training."""
    model = text_model.TextModel(text_model.read(finished[0]))
    rows = data.load(str(place / "mine.csv"))
    seen = {}

    def spy(step, state, epoch, *_):
        seen[len(seen)] = (pj.extract(state.tuned), [b["index"] for b in epoch(1)], jax.random.key_data(state.key))
        return train.Trained(state.tuned, train.Progress())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "train", spy)
        for seed in (0, 0, 1):
            c = configured(place, seed=seed)
            finetune.fit(c, model, rows.train, rows.validation, Console(file=io.StringIO()))
    jax.tree.map(np.testing.assert_array_equal, seen[0], seen[1])
    for one, other in zip(seen[0][0].items(), seen[2][0].values()):
        assert (one[1] == other).all() == (not one[0].endswith("/a")), one[0]
    assert not np.array_equal(seen[0][1], seen[2][1]) and not np.array_equal(seen[0][2], seen[2][2])


# The test rows


def test_the_test_rows_open_once():
    sealed = data.Sealed(data.Rows(["a"], np.zeros(1, np.int32)))
    assert not sealed.opened and len(sealed.open()) == 1
    with pytest.raises(RuntimeError, match="the test split was read before"):
        sealed.open()


def test_training_never_reads_the_test_rows(finished, place, monkeypatch):
    """They are sealed until training has ended, and are read once."""
    events = []
    rows = data.load(str(place / "mine.csv"))

    class Watched(data.Sealed):
        def open(self):
            events.append("test rows")
            return super().open()

    def fit(*args):
        events.append("training begins")
        trained = original(*args)
        events.append("training ends")
        return trained

    original = finetune.fit
    watched = dataclasses.replace(rows, test=Watched(rows.test.open()))
    monkeypatch.setattr(data, "load", lambda *_: watched)
    monkeypatch.setattr(finetune, "fit", fit)
    results = finetune.run(configured(place, epochs=1, method="head"), Console(file=io.StringIO()))
    assert (results[-1].name, results[-1].trainable) == ("this run (head)", 34)
    assert events == ["training begins", "training ends", "test rows"]


def test_a_run_that_peeks_at_the_test_rows_fails(finished, place, monkeypatch):
    rows = data.load(str(place / "mine.csv"))
    monkeypatch.setattr(data, "load", lambda *_: rows)

    def peeking(step, state, *_):
        rows.test.open()
        return train.Trained(state.tuned, train.Progress())

    monkeypatch.setattr(finetune, "train", peeking)
    with pytest.raises(RuntimeError, match="the test split was read before"):
        finetune.run(configured(place), Console(file=io.StringIO()))


# The loop


@pytest.fixture
def loop():
    """`loop(scores, patience)`: what training gives, where the epochs score so."""
    params = {"w": np.ones((3, 2), np.float32)}
    tuned = pj.unfreeze("w").init(jax.random.key(0), params)
    apply = pj.wrap(lambda params, batch: batch["ids"] @ params["w"])
    batch = {"ids": np.ones((2, 3), np.float32), "label": np.zeros(2, np.int32), "weight": np.ones(2, np.float32)}

    def run(scores, patience, rate=0.1, steps=1):
        left, seen, tx = iter(scores), [], optax.sgd(rate)

        def validate(state, check):
            seen.append(np.asarray(state.tuned["w"].value))
            return train.Score(*next(left))

        step = pj.make_train_step(apply, train.cross_entropy, tx)
        limits = train.Limits(len(scores), patience)
        epoch = lambda _: grain.MapDataset.source([batch] * steps)
        return train.train(step, pj.train_state(tuned, tx), epoch, validate, limits, logs.Together([])), seen

    return run


def test_the_best_epoch_is_kept(loop):
    trained, seen = loop([(0.5, 1.0), (0.7, 1.0), (0.7, 1.2), (0.6, 0.5)], patience=2)
    assert trained.progress.best == 2 and len(trained.progress.scores) == 4 == len(trained.progress.seconds)
    np.testing.assert_array_equal(trained.tuned["w"].value, seen[1])
    assert not np.array_equal(seen[1], seen[3])


def test_stops_when_the_score_no_longer_rises(loop):
    trained, seen = loop([(0.5, 1.0), (0.5, 1.0), (0.9, 0.1)], patience=1)
    assert trained.progress.best == 1 and len(seen) == 2
    trained, seen = loop([(0.5, 1.0), (0.5, 0.9), (0.4, 0.1)], patience=1)
    assert trained.progress.best == 2 and len(seen) == 3


def test_losses_that_are_not_finite_stop_the_run_after_a_few(loop):
    words = "5 steps in a row.*is the learning rate too high.* was not kept, which --config.resume=auto does"
    with pytest.raises(FloatingPointError, match=words):
        loop([(0.5, 1.0)], patience=3, rate=np.nan, steps=9)
    trained, seen = loop([(0.5, 1.0)], patience=3, rate=np.inf, steps=4)
    np.testing.assert_array_equal(seen[0], np.ones((3, 2)))


def test_scores():
    found = train.score(np.log(np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)), np.array([1, 1]))
    assert found.value == 0.5 and found.loss == pytest.approx(-np.log([0.75, 0.5]).mean())


def test_says_what_is_wrong_with_a_configuration(place):
    for changes, message in (
        ({"method": "prompts"}, "method 'prompts'; expected one of lora, dora, .*, scratch"),
        ({"task": "rank"}, "task 'rank'; expected one of classify, regress, tokens, span"),
        ({"profile": "1:3"}, 'profile .1:3.; expected "first:end" with 1 < first < end'),
        ({"batch": 0}, "batch 0; expected a whole number, 1 at least, as --config.batch=1"),
        ({"epochs": 0}, "epochs 0; expected a whole number, 1 at least"),
        ({"seed": -1}, "seed -1; expected a whole number, 0 at least"),
        ({"warmup": 2.0}, "warmup 2.0; expected a number from 0, below 1"),
        ({"dropout": 1.5}, "dropout 1.5; expected a number from 0, below 1"),
        ({"clip": -1.0}, "clip -1.0; expected a number above 0"),
        ({"batch": 512}, "140 rows to train on are fewer than a batch of 512; set --config.batch="),
        ({"mesh": "data:3"}, "the sizes multiply to 3, expected 8, the number of devices"),
        ({"pool": "max"}, "pool 'max'; expected mean or first"),
        ({"length": 13}, "length 13; this model takes 3 to 12 tokens"),
        ({"data": "nowhere.csv"}, "nowhere.csv: expected a file"),
        ({"model": str(place / "mine.csv")}, "is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune.run(configured(place, **changes), Console(file=io.StringIO()))


# The real model


def test_minilm(usual_promotion):
    """The real weights, against transformers' model; and they know which sentences are alike."""
    transformers = pytest.importorskip("transformers")
    folder = assets.home() / f"{assets.MINILM.package}-{assets.MINILM.version}"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{assets.MINILM.what} is not in the cache; experiments/finetune.py fetches it")
    config, params = load(assets.fetch(assets.MINILM), "first")
    assert len(jax.tree.leaves(params)) == 103 and sum(x.size for x in jax.tree.leaves(params)) == 22_713_216
    tokens = Tokens(folder, 16)
    texts = ["a man is eating food", "someone has a meal", "the stock market fell sharply today"]
    batch = finetune.batches(tokens(texts), {}, 3, (16,))[0]
    hidden, pooled = jax.jit(bert.Bert(config, "first").apply)({"params": params}, batch["ids"], batch["mask"])
    with usual_promotion():
        theirs = transformers.FlaxBertModel(transformers.BertConfig.from_pretrained(folder), _do_init=False)
        expected = theirs(batch["ids"], batch["mask"], params=params)
    real = batch["mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(hidden)[real], np.asarray(expected[0])[real], atol=2e-5)
    np.testing.assert_allclose(pooled, expected[1], atol=2e-5)
    means = np.array(bert.mean(hidden, jax.numpy.asarray(batch["mask"])))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert means[0] @ means[1] > 0.5 > 0.2 > means[0] @ means[2]


def test_the_rate_is_that_of_the_schedule():
    """And it is no part of the program: another rate is another state."""
    for rate, warmup, steps in ((0.5, 0.25, 12), (2.0, 0.0, 3), (1.0, 1.0, 4)):
        tx, schedule = at_rate(rate, warmup, steps), warm_then_linear(rate, warmup, steps)
        state, update = tx.init(None), jax.jit(tx.update)
        for k in range(steps):
            moved, state = update({"w": np.ones(2, np.float32)}, state)
            np.testing.assert_allclose(moved["w"], -float(schedule(k)), rtol=1e-6, atol=1e-7)
    assert jax.jit(at_rate(1.0, 0.1, 9).update).lower({"w": moved["w"]}, state).as_text() == (
        jax.jit(at_rate(2.0, 0.2, 99).update).lower({"w": moved["w"]}, state).as_text()
    )
