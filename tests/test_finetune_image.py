"""Transfer learning on images end to end, on a tiny network and a folder; what it reads, and what it refuses."""

import io
import json

import grain
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console
from test_cnn import TINY

from experiments import (
    assets,
    catalogue,
    digits,
    finetune_image,
    images,
    record,
    report,
    vision,
)
from experiments.configs import digits as page
from experiments.ledger import Ledger

pytestmark = pytest.mark.third_party


def picture(side, rng, channels=3):
    """Noise with a bright half on one side."""
    x = rng.integers(0, 90, (14, 12, channels))
    x[:, slice(0, 6) if side == "left" else slice(6, 12)] += 160
    return x.astype(np.uint8)


def saved(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, mode).save(path)


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
    c.update({"model": "tiny", "data": str(folder), "size": 12, "batch": 10, "steps": 24, "checks": 2, "out": str(out)})
    c.update({"rows": (40,), "seeds": (0,), "strategies": ("probe,gradual",), "stages": (2,), "few": 2, **changes})
    c.augment.shift, c.rate.gradual = 0, 3e-2
    return c


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A whole call: its rows, what it printed, and its file of results."""
    out, console = tmp_path_factory.mktemp("out"), Console(file=io.StringIO(), width=160)
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setitem(vision.NETS, "tiny", TINY)
        rows = finetune_image.run(configured(folder, out), console)
    return rows, console.file.getvalue(), out / f"images-{folder.stem}.jsonl"


def test_a_call_does_every_run(finished):
    rows, printed, path = finished
    results = {row["strategy"]: row for row in rows}
    assert list(results) == ["probe", "gradual"]
    for how, result in results.items():
        assert set(result) == {
            "strategy", "rows", "seed", "training", "validation", "test", "seconds", "trainable", "best"
        }  # fmt: skip
        assert result["test"] > 0.7 and 0 < result["seconds"] < 100, (how, result)
        assert report.NAMES[how] in printed
    assert len(results["gradual"]["best"]) == 2 and results["probe"]["trainable"] == 9
    assert "40 images" in printed and path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line)["config"]["strategy"] for line in path.read_text().splitlines()] == list(results)


def test_gradual_unfreezing_traces_once_per_stage(folder, tmp_path, monkeypatch):
    """Whatever the seed and the images; and a stage begins where the one before it ended."""
    monkeypatch.setitem(vision.NETS, "tiny", TINY)
    c = configured(folder, tmp_path, seeds=(0, 1), rows=(20, 40), steps=8)
    lab, counts = finetune_image.Lab(c, images.load(c.data, c.size), Console(file=io.StringIO())), []
    for one in finetune_image.runs(c):
        if one.strategy == "gradual":
            counts.append(lab.result(one)["trainable"])
    assert list(lab._tools) == [("gradual", 0), ("gradual", 1)] and len(counts) == 4
    for tools in lab._tools.values():
        assert [run._cache_size() for run in tools.step._jitted.values()] == [1]
    first, all_of_it = (tools.step for tools in lab._tools.values())
    assert first is not all_of_it and set(counts) == {sum(x.size for x in jax.tree.leaves(lab.model.pretrained(0)[0]))}


def test_a_second_call_goes_on(finished, folder, monkeypatch):
    """What is done is read; a row that was half written is taken out and done again; the rest stays as it was."""
    rows, _, path = finished
    monkeypatch.setitem(vision.NETS, "tiny", TINY)
    whole = path.read_text()
    done = []
    monkeypatch.setattr(
        finetune_image.Lab, "result", lambda self, one: done.append(one) or dict(rows[1], seed=one.seed)
    )
    again = finetune_image.run(configured(folder, path.parent), Console(file=io.StringIO()))
    assert again == rows and not done and path.read_text() == whole
    path.write_text(whole[:-50])
    again = finetune_image.run(configured(folder, path.parent), Console(file=io.StringIO()))
    assert [one.strategy for one in done] == ["gradual"] and again[:1] == rows[:1]
    assert path.read_text().startswith(whole.splitlines()[0] + "\n")
    other = configured(folder, path.parent, steps=30)
    assert Ledger(path, finetune_image.VERSION).find(finetune_image.runs(other)[0].settings(other)) is None


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


def test_says_what_is_wrong_with_a_configuration(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(vision.NETS, "tiny", TINY)
    for changes, message in (
        ({"rows": ("many",)}, r"rows \('many',\): expected whole numbers, as --config.rows=0,1"),
        ({"strategies": ("last", "frist")}, "strategy 'frist'; expected one of probe, last, few"),
        ({"rows": (400,)}, r"rows \(400,\): expected 2, the number of classes, to 42"),
        ({"steps": 3}, "steps 3 in 2 stages: expected at least 2 in each"),
        ({"model": "resnet"}, "model 'resnet'; expected one of efficientnet, squeezenet, tiny"),
        ({"data": str(tmp_path / "none")}, "is no folder, nor can it be the name of a data set"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune_image.run(configured(folder, tmp_path, **changes), Console(file=io.StringIO()))


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


def test_what_a_folder_must_not_hold(tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="holds 0 folders; expected one of images for each of two classes"):
        images.load(str(tmp_path), 8)
    saved(tmp_path / "left" / "a.png", picture("left", rng))
    (tmp_path / "right").mkdir()
    (tmp_path / "right" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="right holds no image; expected files that end in .png"):
        images.load(str(tmp_path), 8)
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
