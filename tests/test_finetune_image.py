"""Transfer learning on images end to end, on a tiny network and a folder; what it reads, and what it refuses."""

import conftest  # noqa: F401  (for the processes started here: the same platform, and what is compiled is shared)

import contextlib
import copy
import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import re
import signal
import time
import zlib
from typing import NamedTuple

import grain
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from covers import some
from flax import nnx
from ml_collections import config_flags
from PIL import Image
from rich.console import Console
from test_cnn import tree

import peftjax as pj
from experiments import (
    assets,
    catalogue,
    digits,
    finetune_image,
    images,
    pages,
    record,
    report,
    train,
    transfer,
    vision,
)
from experiments.configs import digits as page
from experiments.ledger import Ledger
from experiments.models.efficientnet import EfficientNet, Stage
from experiments.models.squeezenet import Fire

pytestmark = pytest.mark.third_party
STEPS = 24
STRATEGIES = ["probe", "few", "scratch", "gradual"]
# Most of the time is tracing: a network of four layers, one of them a block.
SMALL = dataclasses.replace(
    vision.NETS["efficientnet"],
    make=lambda classes, rngs: EfficientNet(classes, (Stage(1, 2, 4, 3, 2),), 4, 8, rngs=rngs),
    read=lambda: tree(vision.Classifier(SMALL, 5)._initial(jax.random.key(7))),
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_finetune_image"])


def picture(side, rng, channels=3):
    """Noise with a bright half on one side."""
    x = rng.integers(0, 90, (14, 12, channels))
    x[:, slice(0, 6) if side == "left" else slice(6, 12)] += 160
    return x.astype(np.uint8)


def saved(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, mode).save(path)


@pytest.fixture(autouse=True, scope="module")
def small():
    """A network of this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vision.NETS, "small", SMALL)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty photographs of two classes."""
    place, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for k in range(60):
        side = ("left", "right")[k % 2]
        saved(place / side / f"{k}.png", picture(side, rng))
    return place


def configured(folder, out, **changes):
    c = page.get_config()
    c.update({"model": "small", "data": str(folder), "size": 12, "batch": 10, "steps": STEPS, "checks": 2, "out": str(out)})
    c.update({"rows": (40,), "seeds": (0,), "strategies": (",".join(STRATEGIES),), "stages": (2,), "few": 2, **changes})
    c.augment.shift, c.rate.few, c.rate.gradual = 0, 3e-2, 3e-2
    return c


class Call(NamedTuple):
    """A whole call: its rows, what it printed, its file of results, each training, how many steps there were, its lab."""

    rows: list
    printed: str
    path: pathlib.Path
    trainings: list
    steps: int
    lab: transfer.Lab

    @property
    def results(self):
        """The rows without what differs each time."""
        return [{k: v for k, v in row.items() if k != "seconds"} for row in self.rows]


def called(c, drawn=False):
    kept, steps, labs, console = [], [], [], Console(file=io.StringIO(), width=160)

    def watched(step, *args):
        kept.append(train.train(lambda *given: steps.append(0) or step(*given), *args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch, conftest._usual_promotion():
        patch.setattr(transfer, "train", watched)
        if not drawn:
            patch.setattr(report, "plot", lambda results, path: path)
        patch.setattr(finetune_image, "Lab", lambda *args: labs.append(transfer.Lab(*args)) or labs[-1])
        rows = finetune_image.run(c, console)
    path = pathlib.Path(c.out) / f"images-{pathlib.Path(c.data).stem}.jsonl"
    return Call(rows, console.file.getvalue(), path, kept, len(steps), labs[-1])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    return called(configured(folder, tmp_path_factory.mktemp("out")), drawn=True)


def test_a_call_does_every_run(finished):
    rows, printed, path, *_ = finished
    results = {row["strategy"]: row for row in rows}
    assert list(results) == STRATEGIES
    for how, result in results.items():
        assert set(result) == {
            "strategy", "rows", "seed", "training", "validation", "test", "seconds", "trainable", "best", "skipped_steps"
        }  # fmt: skip
        assert result["test"] > 0.7 and 0 < result["seconds"] < 100, (how, result)
        assert report.NAMES[how] in printed
    assert len(results["gradual"]["best"]) == 2 and results["probe"]["trainable"] == 9
    assert "40 images" in printed and path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line)["config"]["strategy"] for line in path.read_text().splitlines()] == list(results)


def test_gradual_unfreezing_traces_once_per_stage(finished):
    """Whatever the seed and the images; and a stage begins where the one before it ended."""
    lab, gradual = finished.lab, finished.rows[-1]
    others = [transfer.Run("gradual", rows, seed) for rows, seed in ((20, 0), (20, 1), (40, 1))]
    counts = [gradual["trainable"], *(lab.result(one)["trainable"] for one in others)]
    assert list(lab._tools) == [("few", 0), ("scratch", 0), ("gradual", 0), ("gradual", 1)]
    for tools in lab._tools.values():
        assert [run._cache_size() for run in tools.step._jitted.values()] == [1]
    first, all_of_it = (lab._tools["gradual", stage].step for stage in (0, 1))
    assert first is not all_of_it and set(counts) == {sum(x.size for x in jax.tree.leaves(lab.model.pretrained(0)[0]))}


def test_a_state_is_chosen_on_validation_images_and_then_tested(finished, folder, monkeypatch):
    """The first check of the last stage, here, which the scores say is the best; nothing opens the test split before."""
    data, judged = images.load(str(folder), 12), []
    lab, values = copy.copy(finished.lab), iter([0.1, 0.9, 0.8, 0.2, 0.5, 0.5, 0.5])
    lab.data, _ = data, lab.__dict__.pop("test")

    def score(logits, labels):
        judged.append((logits, labels is data.validation.labels, data.test.opened))
        return train.Score(next(values), 0.0)

    monkeypatch.setattr(transfer, "score", score)
    assert lab.result(transfer.Run("gradual", 40, 0))["best"] == [2, 1]
    assert [known for _, known, _ in judged] == [True] * 4 + [False, True, False]
    assert [opened for *_, opened in judged] == [False] * 6 + [True]
    of_validation = [logits for logits, known, _ in judged if known]
    np.testing.assert_array_equal(of_validation[4], of_validation[2])
    assert not np.allclose(of_validation[4], of_validation[3])


def test_the_probe_is_chosen_on_validation_images_and_then_tested(finished, folder, monkeypatch):
    data, lab, chosen = images.load(str(folder), 12), copy.copy(finished.lab), []
    lab.data, _ = data, lab.__dict__.pop("test")

    def linear(x, labels, chosen_on, others):
        chosen.append((others is data.validation.labels, data.test.opened))
        return fit(x, labels, chosen_on, others)

    fit = transfer.baselines.linear
    monkeypatch.setattr(transfer.baselines, "linear", linear)
    assert lab.result(transfer.Run("probe", 40, 0))["test"] == finished.rows[0]["test"]
    assert chosen == [(True, False)] and data.test.opened


@pytest.mark.parametrize("strategy", ["few", "scratch"])
def test_what_a_strategy_moves(strategy, finished):
    """The last layers of the pretrained network alone; or all of another one."""
    at, lab = STRATEGIES.index(strategy) - 1, finished.lab
    pretrained, other = (tree(begin(0)[0]) for begin in (lab.model.pretrained, lab.model.initial))
    begin, other = (other, pretrained) if strategy == "scratch" else (pretrained, other)
    end = {path.removesuffix("/value"): x for path, x in pj.extract(finished.trainings[at].tuned).items()}
    last = ("head", "classifier")
    assert set(end) == {path for path in begin if strategy == "scratch" or path.startswith(last)}
    assert finished.rows[at + 1]["trainable"] == sum(x.size for x in end.values())
    apart = lambda tree: max(np.abs(x - tree[path]).max() for path, x in end.items())
    assert apart(other) > 2 * apart(begin) > 0


def _settings_of(c):
    return finetune_image.runs(c)[0].settings(finetune_image.completed(c))


def test_a_second_call_goes_on(finished, folder, monkeypatch):
    """What is done is read; a row that was half written is taken out and done again; the rest stays as it was."""
    rows, _, path, *_ = finished
    whole = path.read_text()
    done = []
    monkeypatch.setattr(
        transfer.Lab, "result", lambda self, one: done.append(one) or dict(rows[-1], seed=one.seed)
    )
    again = finetune_image.run(configured(folder, path.parent), Console(file=io.StringIO()))
    assert again == rows and not done and path.read_text() == whole
    path.write_text(whole[:-50])
    again = finetune_image.run(configured(folder, path.parent), Console(file=io.StringIO()))
    assert [one.strategy for one in done] == ["gradual"] and again[:-1] == rows[:-1]
    assert path.read_text().startswith(whole.splitlines()[0] + "\n")
    ledger = Ledger(path, finetune_image.VERSION)
    for steps in (24, 30):
        settings = _settings_of(configured(folder, path.parent, strategies=("gradual",), steps=steps))
        assert (ledger.find(settings) is not None) == (steps == 24)


def gradually(folder, out, **changes):
    return called(configured(folder, out, strategies=("gradual",), **changes))


def folder_of_run(folder, out, **changes):
    """Where its one run of gradual unfreezing keeps checkpoints and logs."""
    c = finetune_image.completed(configured(folder, out, strategies=("gradual",), **changes))
    return finetune_image.runs(c)[0].folder(c)


def child(folder, out, changes):
    vision.NETS["small"] = SMALL
    gradually(folder, out, **changes)


def saved_in(place):
    return [int(x.name) for x in place.glob("*") if x.name.isdigit()]


@pytest.mark.ci
@pytest.mark.parametrize("stage,how", some([(2, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGTERM)], 3))
def test_a_run_that_is_stopped_goes_on_to_the_bit(stage, how, finished, folder, tmp_path):
    """Within the stage where it was, its statistics too; and its checkpoints go when it is a row."""
    changes = {"resume": "auto", "every": 1}
    process = PROCESSES.Process(target=child, args=(folder, tmp_path, changes))
    process.start()
    place = folder_of_run(folder, tmp_path, **changes) / f"stage{stage}" / "checkpoints"
    end = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < end and not saved_in(place):
        time.sleep(0.005)
    os.kill(process.pid, how)
    process.join(10)
    assert process.exitcode not in (0, None)
    done = (stage - 1) * STEPS // 2 + max(saved_in(place))
    del changes["every"]  # which is free, and writing takes its time
    found = gradually(folder, tmp_path, **changes)
    assert found.steps == STEPS - done and 0 < done < STEPS
    assert found.results == finished.results[-1:] and not [x for x in tmp_path.iterdir() if x.is_dir()]
    for one, other in zip(found.trainings, finished.trainings[-2:], strict=True):
        assert one.progress.losses == other.progress.losses and one.progress.scores == other.progress.scores
        same = lambda x, y: np.testing.assert_array_equal(x, y)
        jax.tree.map(same, (pj.extract(one.tuned), one.model_state), (pj.extract(other.tuned), other.model_state))


@pytest.fixture(scope="module")
def logged(folder, tmp_path_factory):
    """A short call with logs and a profile, and the folder of its run."""
    out, settings = tmp_path_factory.mktemp("logged"), {**SHORT, "tensorboard": True, "profile": "2:4"}
    return gradually(folder, out, **settings), folder_of_run(folder, out, **settings)


SHORT = {"batch": 8, "steps": 8}


@pytest.mark.ci
def test_logs_and_a_profile_of_each_run(logged):
    for stage in ("stage1", "stage2"):
        place = logged[1] / stage
        (events,) = (place / "tensorboard").iterdir()
        for name in (b"training/loss", b"training/skipped", b"validation/accuracy"):
            assert name in events.read_bytes()
        (profile,) = (place / "profile").rglob("*.xplane.pb")
        assert profile.read_bytes().count(b"jit_advance") >= 2


@pytest.mark.ci
def test_a_mesh_gives_what_one_device_gives(logged, folder, tmp_path):
    found, want = gradually(folder, tmp_path, mesh="data:2,fsdp:2,model:2", **SHORT), logged[0]
    assert [row["best"] for row in found.rows] == [row["best"] for row in want.rows]
    for one, other in zip(found.trainings, want.trainings, strict=True):
        assert len(jax.tree.leaves(one.model_state)[0].devices()) == 8
        np.testing.assert_allclose(one.progress.losses, other.progress.losses, rtol=1e-5)
        # Adam goes as far where a gradient is 0 but for rounding, as all are at first but the head's.
        np.testing.assert_allclose(*([s.loss for s in x.progress.scores] for x in (one, other)), rtol=1e-3)
    wide = next(x for name, x in pj.extract(found.trainings[-1].tuned).items() if "expand/conv" in name)
    assert tuple(wide.sharding.spec) == (None, None, "fsdp", "model")


@pytest.mark.parametrize("strategy,name", [("lora", r"fire\d/\w+"), ("adapters", r"fire\d/expand\dx\d")])
def test_the_targets_are_the_networks_own(strategy, name):
    """SqueezeNet under LoRA and adapters, with nothing said of targets."""
    c = finetune_image.completed(configured("digits", "out", model="squeezenet"))
    model = vision.Classifier(vision.NETS["squeezenet"], 10)
    params, stats = jax.eval_shape(lambda: model.initial(0))
    (method,), roles = transfer.STRATEGIES[strategy](c), model.roles(params, stats, 32)
    tuned = jax.eval_shape(lambda params: method.init(jax.random.key(0), params, roles), params)
    modules = {"/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(params)}
    targets = {module for module in modules if re.fullmatch(name, module)} | {"classifier"}
    trains = pj.extract(tuned)
    assert {next(x for x in modules if path.startswith(f"{x}/")) for path in trains} == targets
    assert sum(x.size for x in trains.values()) < 80_000


class Shallow(nnx.Module):
    """Two parts of SqueezeNet, between a convolution and its head."""

    def __init__(self, classes, *, rngs):
        self.conv1, self.fire2 = nnx.Conv(3, 16, (3, 3), 2, rngs=rngs), Fire(16, 8, 8, rngs=rngs)
        self.fire3, self.classifier = Fire(16, 8, 8, rngs=rngs), nnx.Conv(16, classes, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.classifier(self.fire3(self.fire2(self.conv1(x)))).mean((1, 2))


@pytest.mark.ci
def test_overlays_on_convolutions_train(folder, tmp_path, monkeypatch):
    """With the targets of SqueezeNet, to which no statistics belong."""
    net = dataclasses.replace(vision.NETS["squeezenet"], make=lambda n, rngs: Shallow(n, rngs=rngs))
    start = tree(vision.Classifier(net, 5).initial(0)[0])
    monkeypatch.setitem(vision.NETS, "squeezenet", dataclasses.replace(net, read=lambda: start))
    changes = {"model": "squeezenet", "strategies": ("lora,adapters",), "steps": 2, "checks": 1}
    rows = called(configured(folder, tmp_path, **changes)).rows
    assert [(row["strategy"], row["skipped_steps"]) for row in rows] == [("lora", 0), ("adapters", 0)]
    assert all(row["trainable"] > 2 * 17 for row in rows)  # the head's


def test_targets_that_are_not_there_are_found_before_any_run(folder, tmp_path):
    c = configured(folder, tmp_path, strategies=("last", "lora"))
    c.lora.targets = "fire.*"
    with pytest.raises(ValueError, match="fire"):
        finetune_image.run(c, Console(file=io.StringIO()))
    assert not list(tmp_path.iterdir())


def test_the_committed_rows_are_those_of_the_page():
    c = finetune_image.completed(page.get_config())
    path = pathlib.Path(finetune_image.__file__).parent / "results" / "images-digits.jsonl"
    ledger, runs = Ledger(path, finetune_image.VERSION), finetune_image.runs(c)
    c.update({"mesh": "data:8", "resume": "auto", "every": 5, "tensorboard": True, "profile": "3:5"})
    results = [ledger.find(one.settings(c)) for one in runs]
    assert len(results) == 63 and None not in results
    shown = zip(*(list(column.cells) for column in report.table(results).columns))
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    assert [f"| {' | '.join(cells)} |" in readme for cells in shown] == [True] * 7
    for name in {one.strategy for one in runs}:
        by_rows = [[r["test"] for r in results if (r["strategy"], r["rows"]) == (name, n)] for n in c.rows]
        line = "    ".join(f"{np.mean(x):.3f} ({min(x):.3f}-{max(x):.3f})" for x in by_rows)
        assert re.search(rf"^    {name} +{re.escape(line)}$", page.__doc__, re.M), (name, line)


UNREAD = {"few": 2, "lora.rank": 4, "adapter.bottleneck": 4, "stages": (2,), "image": "photo", "label": "side"}
TRAINED = {"layerwise": 0.8, "augment.flip": True, "steps": 60, "measured": 10, "batch": 16, "momentum": 0.5}
FREE = {"out": "other", "every": 5, "resume": "auto", "mesh": "data:8", "rows": (250,), "strategies": ("last",)}
READ = {
    "probe": (),
    "last": ("rate.last", *TRAINED),
    "few": ("few", "rate.few", *TRAINED),
    "lora": ("lora.rank", "rate.lora", *TRAINED),
    "adapters": ("adapter.bottleneck", "rate.adapters", *TRAINED),
    "gradual": ("stages", "rate.gradual", *TRAINED),
}


@pytest.mark.parametrize("strategy", READ)
def test_a_run_depends_on_what_it_reads(strategy, tmp_path):
    """By that its row is found, and two that differ in it share no folder."""
    one = transfer.Run(strategy, 250, 0)
    c, rates = page.get_config(), {f"rate.{name}": 0.5 for name in READ if name != "probe"}
    settings, place = one.settings(c), one.folder(c)
    for name, value in {**UNREAD, **TRAINED, **rates, "size": 40, "model": "squeezenet", "data": str(tmp_path)}.items():
        other = page.get_config()
        other.update_from_flattened_dict({name: value})
        read = name in READ[strategy] or name in ("size", "model", "data")
        assert ((one.settings(other) != settings), (one.folder(other) != place)) == (read, read), name
    c.update(FREE)
    assert one.settings(c) == settings and one.folder(c).name == place.name
    named, columns = page.get_config(), page.get_config()
    named.data = columns.data = "tiny_photos"
    columns.label = "side"
    assert one.settings(named) != one.settings(columns)


@pytest.mark.parametrize(
    "asked,refused",
    [
        (["image=photo"], "image"),
        (["label=side"], "label"),
        (["data={folder}", "label=side"], "label"),
        (["data=tiny_photos", "label=side"], None),
        (["data={folder}", "size=12"], None),
    ],
)
def test_columns_that_a_data_set_has_not_are_refused(asked, refused, folder):
    argv = ["script", *(f"--config.{one}".format(folder=folder) for one in asked)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", page.__file__, flag_values=values, sys_argv=argv)
    values(argv)
    with (
        pytest.raises(ValueError, match=f"--config.{refused}= would change nothing here: '.*' has no columns")
        if refused
        else contextlib.nullcontext()
    ):
        pages.refuse(finetune_image.unheeded(values.config), values)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"resume": "yes"}, "resume 'yes'"),
        ({"profile": "1:3"}, "profile .1:3."),
        ({"mesh": "data:3"}, "the sizes multiply to 3"),
        ({"steps": 3}, "steps 3 in 2 stages"),
        ({"batch": 41}, "40 rows to train on are fewer"),
        ({"strategies": ("frist",)}, "strategy 'frist'"),
        ({"few": 0, "strategies": ("few",)}, "last_layers"),
        ({"model": "resnet"}, "model 'resnet'"),
    ],
)
def test_a_page_that_no_run_can_read_is_refused_before_anything_is_fetched(changes, message, tmp_path, monkeypatch):
    def fetched(*_):
        raise AssertionError("fetched")

    monkeypatch.setattr(images, "load", fetched)
    c = configured("digits", tmp_path, model="squeezenet")
    c.update(changes)
    with pytest.raises(ValueError, match=message):
        finetune_image.run(c, Console(file=io.StringIO()))
    with pytest.raises(AssertionError, match="fetched"):
        finetune_image.run(configured("digits", tmp_path, model="squeezenet"), Console(file=io.StringIO()))


def test_rows_of_a_file_of_results(tmp_path):
    path = tmp_path / "x.jsonl"
    assert record.read(path) == []
    path.write_text('{"a": 1}\n{"a": 2}')
    assert record.read(path) == [{"a": 1}, {"a": 2}] and path.read_text() == '{"a": 1}\n{"a": 2}\n'
    path.write_text('{"a": 1}\n{"a":')
    assert record.read(path) == [{"a": 1}] and path.read_text() == '{"a": 1}\n'
    path.write_text('{"a"\n{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1 is no row of results"):
        record.read(path)


def test_says_what_is_wrong_with_a_configuration(folder, tmp_path):
    for changes, message in (
        ({"rows": ("many",)}, r"rows \('many',\): expected whole numbers, as --config.rows=0,1"),
        ({"strategies": ("last", "frist")}, "strategy 'frist'; expected one of probe, last, few"),
        ({"rows": (400,)}, r"rows \(400,\): expected 2, the number of classes, to 42"),
        ({"batch": 41}, "40 rows to train on are fewer than a batch of 41; set --config.batch="),
        ({"resume": "yes"}, "resume 'yes'; expected auto or no"),
        ({"profile": "1:3"}, 'profile .1:3.; expected "first:end"'),
        ({"mesh": "data:3"}, "the sizes multiply to 3, expected 8, the number of devices"),
        ({"steps": 3}, "steps 3 in 2 stages: expected at least 2 in each"),
        ({"model": "resnet"}, "model 'resnet'; expected one of efficientnet, squeezenet, small"),
        ({"data": str(tmp_path / "none")}, "is no folder, nor can it be the name of a data set"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune_image.run(configured(folder, tmp_path, **changes), Console(file=io.StringIO()))


def test_a_plot_shows_of_the_largest_size_what_has_it(tmp_path, monkeypatch):
    shown = [("last", 20, 8), ("last", 40, 8), ("lora", 20, 16)]
    one = {"seed": 0, "training": 0.9, "validation": 0.8, "seconds": 1.0}
    rows = [{**one, "strategy": how, "rows": n, "trainable": t, "test": t / n} for how, n, t in shown]
    drawn = []
    monkeypatch.setattr(report, "saved", lambda figure, path: drawn.extend(figure.axes))
    report.plot(rows, tmp_path / "x.png")
    assert drawn[3].get_ylabel() == "test accuracy, 40 images"
    assert [(x.get_label(), [*x.lines[0].get_xdata()]) for x in drawn[3].containers] == [("last layer", [8])]
    assert [x.get_label() for x in drawn[0].containers] == ["last layer", "LoRA"]


# Images


def test_a_folder(folder):
    found = images.load(str(folder), 12)
    test = found.test.open()
    assert found.names == ("left", "right") and [len(x) for x in (found.train, found.validation, test)] == [42, 9, 9]
    assert found.train.pixels.shape == (42, 12, 12, 3) and found.train.pixels.dtype == np.uint8
    halves = found.train.pixels[..., 0].reshape(42, 12, 2, 6).mean((1, 3))
    np.testing.assert_array_equal(halves.argmax(1), found.train.labels)
    np.testing.assert_array_equal(images.load(str(folder), 12).train.pixels, found.train.pixels)


def test_a_folder_with_splits_and_grey_images(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 8), ("test", 2)):
        for k in range(n):
            side = ("left", "right")[k % 2]
            saved(tmp_path / split / side / f"{k}.jpg", picture(side, rng, 1))
    found = images.load(str(tmp_path), 8)
    assert [len(x) for x in (found.train, found.validation, found.test.open())] == [7, 1, 2]
    assert found.train.pixels.shape == (7, 8, 8, 1)
    saved(tmp_path / "train" / "left" / "9.png", picture("left", rng))
    assert images.load(str(tmp_path), 8).train.pixels.shape == (8, 8, 8, 3)
    (tmp_path / "test" / "middle").mkdir()
    with pytest.raises(ValueError, match="test: the classes middle are in one split alone"):
        images.load(str(tmp_path), 8)


@pytest.mark.parametrize("names", [("train", "val"), ("val", "test"), ("left", "test", "train")])
def test_folders_beside_splits_are_not_passed_over(names, tmp_path):
    for name in names:
        saved(tmp_path / name / "left" / "a.png", picture("left", np.random.default_rng(0)))
    with pytest.raises(ValueError, match=f"holds the folders {', '.join(sorted(names))}; expected train, and of validation"):
        images.load(str(tmp_path), 8)


def test_a_photograph_stands_as_its_camera_says(tmp_path):
    pixels, turned = picture("left", np.random.default_rng(0)), Image.Exif()
    turned[0x0112] = 3  # by 180 degrees
    for side, exif in (("left", None), ("right", turned)):
        (tmp_path / side).mkdir()
        for k in range(4):
            Image.fromarray(pixels).save(tmp_path / side / f"{k}.png", exif=exif)
    found = images.load(str(tmp_path), 12).train
    up, down = (found.pixels[found.labels == k][0] for k in range(2))
    np.testing.assert_array_equal(up, down[::-1, ::-1])


def test_a_folder_that_changed_is_another_data_set(tmp_path):
    for side in ("left", "right"):
        for name in ("a", "c"):
            saved(tmp_path / side / f"{name}.png", picture(side, np.random.default_rng(0)))
    settings = lambda: _settings_of(configured(tmp_path, "out", model="squeezenet"))
    before = settings()
    assert settings() == before and "digest" not in finetune_image.completed(page.get_config())
    (tmp_path / "left" / "a.png").rename(tmp_path / "right" / "b.png")
    moved = settings()
    saved(tmp_path / "right" / "b.png", picture("left", np.random.default_rng(1)))
    assert before != moved != settings() != before


@pytest.fixture
def two(tmp_path):
    """A folder of two classes, of four images each."""
    rng = np.random.default_rng(0)
    for k in range(8):
        saved(tmp_path / "two" / ("left", "right")[k % 2] / f"{k}.png", picture(("left", "right")[k % 2], rng))
    return tmp_path / "two"


def test_what_is_hidden_is_no_class_and_no_part_of_a_data_set(two):
    """Nor do the splits' own folders hold any."""
    before, rng = images.digest(str(two)), np.random.default_rng(0)
    (two / ".DS_Store").write_text("none")
    (two / "left" / ".DS_Store").write_text("none")
    saved(two / ".ipynb_checkpoints" / "0-checkpoint.png", picture("left", rng))
    assert images.load(str(two), 8).names == ("left", "right") and images.digest(str(two)) == before
    for split in ("train", "test"):
        saved(two.parent / "splits" / split / ".cache" / "a.png", picture("left", rng))
        for side in ("left", "right"):
            saved(two.parent / "splits" / split / side / "a.png", picture(side, rng))
            saved(two.parent / "splits" / split / side / "b.png", picture(side, rng))
    assert images.load(str(two.parent / "splits"), 8).names == ("left", "right")


def test_an_image_behind_a_link_is_a_part_of_a_data_set(two):
    (two / "right").rename(two.parent / "elsewhere")
    (two / "right").symlink_to(two.parent / "elsewhere")
    before = images.digest(str(two))
    saved(two.parent / "elsewhere" / "1.png", picture("left", np.random.default_rng(1)))
    assert images.digest(str(two)) != before


def test_the_digits_are_no_folder_unless_it_is_given_as_a_path(two, monkeypatch):
    two.rename(two.parent / "digits")
    monkeypatch.chdir(two.parent)
    sevens = [picture("left", np.random.default_rng(0))] * 9
    monkeypatch.setattr(catalogue, "digits", lambda: ({"train": (sevens, [0] * 9)}, ("7",)))
    assert images.load("digits", 8).names == ("7",) and images.load("./digits", 8).names == ("left", "right")
    assert images.digest("digits") == {} != images.digest("./digits")


@pytest.mark.parametrize("place", ["", "train"])
def test_files_beside_the_classes_are_not_passed_over(place, two):
    if place:
        (two / place).mkdir()
        for side in ("left", "right"):
            (two / side).rename(two / place / side)
    (two / place / "notes.txt").write_text("none")
    saved(two / place / "one.png", picture("left", np.random.default_rng(0)))
    message = f"{two / place} holds notes.txt and 1 more; expected folders alone, one of images for each class"
    for read in (images.digest, lambda name: images.load(name, 8)):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(str(two))


def _with_size(content, width, height):
    """A PNG whose head says that it is of another size."""
    head = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + content[24:29]
    return content[:12] + head + zlib.crc32(head).to_bytes(4) + content[33:]


@pytest.mark.parametrize(
    "damage,kind",
    [
        (lambda x: x[: x.index(b"IDAT") - 4] + bytes(4) + x[x.index(b"IDAT") :], "SyntaxError"),
        (lambda x: x[: len(x) // 2], "OSError"),
        (lambda x: _with_size(x, 60_000, 60_000), "DecompressionBombError"),
    ],
    ids=["chunk", "half", "enormous"],
)
def test_an_image_that_cannot_be_read_is_named(damage, kind, two):
    path = two / "left" / "0.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"left/0.png is no image that can be read \({kind}: "):
        images.load(str(two), 8)


@pytest.mark.ci
def test_a_run_that_comes_to_no_end_is_left_out(folder, tmp_path):
    """The one behind it is done, and its last good state is where its row says; that of a run that ends is nowhere."""
    c = configured(folder, tmp_path, strategies=("last", "few", "probe"), steps=8, checks=1, resume="auto", failing=3)
    c.rate.last = 1e38
    console = Console(file=io.StringIO(), width=200)
    rows = finetune_image.run(c, console)
    assert [row["strategy"] for row in rows] == ["few", "probe"]
    said = re.search(r"left out: last, 40 rows, seed 0: 3 steps in a row.* before them is in (\S+)", console.file.getvalue())
    assert [str(path) for path in pathlib.Path(c.out).glob("**/checkpoints")] == [said[1]] and os.listdir(said[1])


def test_what_a_folder_must_not_hold(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="holds 0 folders; expected one of images for each of two classes"):
        images.load(str(tmp_path), 8)
    saved(tmp_path / "left" / "a.png", picture("left", rng))
    (tmp_path / "right").mkdir()
    with pytest.raises(ValueError, match="right holds no image; expected files that end in .png"):
        images.load(str(tmp_path), 8)
    (tmp_path / "right" / "notes.txt").write_text("none")
    (tmp_path / "right" / "more").mkdir()
    (tmp_path / "right" / ".hidden").write_text("none")
    with pytest.raises(ValueError, match="right holds more and 1 more; expected images alone, files that end in .png"):
        images.load(str(tmp_path), 8)
    (tmp_path / "right" / "more").rmdir()
    (tmp_path / "right" / "notes.txt").unlink()
    saved(tmp_path / "right" / "b.png", picture("right", rng, 4))
    with pytest.raises(ValueError, match=r"b.png has 4 channels \(RGBA\); expected 1 \(grey\) or 3 \(RGB\), of 8 bits"):
        images.load(str(tmp_path), 8)
    (tmp_path / "right" / "b.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ValueError, match="b.png is no image that can be read"):
        images.load(str(tmp_path), 8)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return assets.home()


def test_the_digits(cache, monkeypatch):
    """Read from a table of pixels, through tensorflow-datasets, in splits that stay the same."""
    cache.mkdir()
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.integers(0, 256, (60, 784)), np.arange(60)[:, None] % 10], 1)
    np.savetxt(cache / "mnist_5k.csv.gz", rows, fmt="%.18e", delimiter=",")
    monkeypatch.setattr(digits, "fetch", lambda asset: cache)
    monkeypatch.setattr(digits, "SIZES", {"train": 40, "validation": 10, "test": 10})
    found = images.load("digits", 28)
    assert [len(x) for x in (found.train, found.validation, found.test.open())] == [40, 10, 10]
    known = {x[:-1].astype(np.uint8).tobytes(): x[-1] for x in rows}
    assert [known[x.tobytes()] for x in found.train.pixels] == found.train.labels.tolist()
    assert found.names == tuple("0123456789") and images.load("digits", 32).train.pixels.shape == (40, 32, 32, 1)


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """A data set that is registered here, of images of several sizes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "photo": tfds.features.Image(shape=(None, None, 3)),
            "side": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for k in range(20):
            held = io.BytesIO()
            Image.fromarray(picture(("left", "right")[k % 2], rng)[: 12 + k % 3]).save(held, "png")
            held.seek(0)
            yield k, {"photo": held, "side": k % 2}


def test_a_data_set_by_name(cache):
    found = images.load("tiny_photos", 12, "photo", "side")
    assert [len(x) for x in (found.train, found.validation, found.test.open())] == [14, 3, 3]
    assert found.train.pixels.shape == (14, 12, 12, 3) and found.names == ("0", "1")
    halves = found.train.pixels[..., 0].reshape(14, 12, 2, 6).mean((1, 3))
    np.testing.assert_array_equal(halves.argmax(1), found.train.labels)
    with pytest.raises(ValueError, match="has no column 'image' nor 'label', only .*Name yours with --config.image="):
        images.load("tiny_photos", 12)
    with pytest.raises(ValueError, match="expected an image"):
        catalogue.images("tiny_photos", "side", "side")


def test_batches():
    made = images.Images(np.arange(5, dtype=np.uint8)[:, None, None, None], np.arange(5, dtype=np.int32))
    whole = list(images.batches(made, 2))
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in whole]), [0, 1, 2, 3, 4, 4])
    np.testing.assert_array_equal(np.concatenate([b["weight"] for b in whole]), [1, 1, 1, 1, 1, 0])
    drawn = images.batches(made, 2, steps=5, seed=(0, 1))
    assert isinstance(drawn, grain.MapDataset) and len(drawn) == 5
    order = np.concatenate([b["index"] for b in drawn])
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4] and list(order[:5]) != list(order[5:])
    again = np.concatenate([b["index"] for b in images.batches(made, 2, 5, (0, 1))])
    np.testing.assert_array_equal(order, again)
    assert all((b["image"].ravel() == b["label"]).all() for b in drawn)
    with pytest.raises(ValueError, match="5 images to draw from are fewer than a batch of 6"):
        images.batches(made, 6, steps=1)
