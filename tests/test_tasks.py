"""The tasks: what they read and refuse, their scores against values worked by hand, and each one end to end."""

import io
import json
import types

import jax
import numpy as np
import pytest
from covers import some
from rich.console import Console
from test_bert import torch_tensors, write
from test_experiments import SMALL
from test_experiments_data import tokenizer

import peftjax as pj
from experiments import catalogue, finetune, predict, recipes, tasks, text_model
from experiments.batches import IGNORED, PerToken, batches
from experiments.configs import reviews
from experiments.data import Rows
from experiments.models import bert
from experiments.tasks import TASKS, Classify, Regress, Span, Tag
from experiments.tasks.span import Answer
from experiments.tasks.task import objects
from experiments.tokens import Tokens

pytestmark = pytest.mark.third_party  # optax's Adam needs the usual promotion

NAMES, PLAIN = ["ada", "bob", "eve"], ["saw", "met", "the", "old", "who", "by", "did", "of"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, and files for every task which a single word decides."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    ids = np.ones((1, 2), np.int32)
    sizes = {**SMALL, "max_position_embeddings": 32}
    params = jax.jit(bert.Bert(bert.Config(**sizes), "first").init)(jax.random.key(0), ids, ids)["params"]
    noisy = jax.tree.map(lambda x: np.asarray(x) + 0.2 * rng.standard_normal(x.shape).astype(np.float32), params)
    write(folder / "model", torch_tensors(noisy), **sizes)
    tokenizer(folder / "model", NAMES + PLAIN)
    words = [[str(w) for w in rng.permutation([rng.choice(NAMES), *rng.choice(PLAIN, 3)])] for _ in range(120)]
    name = [next(w for w in own if w in NAMES) for own in words]
    rows = {
        "scores": [{"text": " ".join(own), "score": 10.0 + 2 * NAMES.index(who)} for own, who in zip(words, name)],
        "names": [{"words": own, "tags": ["B-PER" if w in NAMES else "O" for w in own]} for own in words],
        "questions": [{"question": "who", "context": " ".join(own), "answer": who} for own, who in zip(words, name)],
    }
    for kind, own in rows.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, own)))
    return folder


def run(place, data, c=None, **changes):
    c = c or reviews.get_config()
    tiny = {"model": str(place / "model"), "data": str(place / data), "length": 12, "fixed": True, "batch": 16}
    c.update({**tiny, "epochs": 12, "patience": 12, "stride": 2, "out": str(place / "runs"), **changes})
    for method in c.rate:
        c.rate[method] = 3e-2
    console = Console(file=io.StringIO(), width=120)
    return finetune.run(c, console), finetune.folder_of_run(c), console.file.getvalue()


@pytest.mark.ci
def test_regress(place):
    results, folder, printed = run(place, "scores.jsonl", task="regress")
    mine = results[-1].scores
    assert mine["Spearman"] > 0.9 and mine["RMSE"] < 0.7 < results[0].scores["RMSE"]
    assert [r.name for r in results][:3] == ["mean", "TF-IDF + ridge regression", "frozen linear probe"]
    assert "validation Spearman" in printed and "RMSE" in printed
    low, high = (float(x) for x in predict.said(folder, ["the old ada", "the old eve"]))
    assert abs(low - 10) < 1.5 and abs(high - 14) < 1.5


@pytest.mark.parametrize("method", some(["prefix", "prompt"], 2))
def test_tokens(place, method):
    """Per-token outputs have no virtual positions: a tag stands at its own word."""
    results, folder, _ = run(place, "names.jsonl", task="tokens", method=method, epochs=10)
    assert results[0].name == "each word's usual tag" and set(results[-1].scores) == {"F1", "accuracy"}
    assert results[-1].scores["F1"] > 0.8
    said = [line.split() for line in predict.said(folder, ["the ada met of", "bob"])]
    assert [len(tags) for tags in said] == [4, 1] and {tag for tags in said for tag in tags} == {"B-PER", "O"}


@pytest.mark.ci
def test_span(place):
    results, folder, printed = run(place, "questions.jsonl", task="span")
    assert results[-1].scores["exact match"] > 0.8 > results[0].scores["F1"]
    assert predict.said(folder, ["who", "the eve saw by"]) == ["eve"]
    # In windows of twelve tokens, the name is in the last.
    assert predict.said(folder, ["who", " ".join(["the old"] * 9 + ["bob met"])]) == ["bob"]
    with pytest.raises(ValueError, match="3 texts: expected a question and its context"):
        predict.said(folder, ["who", "the eve", "who"])


def test_virtual_tokens_are_in_no_mean(place):
    """Where a text's tokens are averaged, virtual ones are left out: the base model is what `disable` gives."""
    page = text_model.Page(str(place / "model"), "mean", 12, True, Classify(("a", "b")))
    model, ids = text_model.TextModel(page), np.array([[2, 4, 5, 3, 0, 0]], np.int32)
    batch = {"ids": ids, "mask": (ids > 0).astype(np.int32)}
    params = {
        **model.params,
        "classifier": {"kernel": jax.random.normal(jax.random.key(0), (16, 2)), "bias": np.zeros(2)},
    }
    for method in (pj.prompt(3, targets=("word_embeddings",)), pj.prefix(3)):
        tuned = method.init(jax.random.key(0), params, pj.roles(model, params, batch))
        want = model(params, batch)
        np.testing.assert_allclose(model.apply(pj.disable(tuned), batch), want, atol=1e-6)
        assert np.abs(model.apply(tuned, batch) - want).max() > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("method", [name for name in recipes.NAMES if name not in ("lora", "full", "head")])
def test_every_method_runs(place, method):
    """By its block of the page, the sizes of which are made to fit the tiny model."""
    small = {"vera": {"rank": 4}, "oft": {"block_size": 4}, "adalora": {"rank": 4, "target_rank": 2}}
    small |= {"adapter": {"bottleneck": 4}, "compacter": {"bottleneck": 4}}
    c = reviews.get_config()
    c[method] = {**c.get(method, {}), **small.get(method, {})}
    if method == "compacter":
        c.compacter.terms = 2
    results, *_ = run(place, "scores.jsonl", c, task="regress", method=method, epochs=1)
    assert np.isfinite(results[-1].scores["RMSE"])


# Scores, by hand


def rows(labels):
    return Rows([""] * len(labels), objects(labels))


def test_scores_of_classes():
    task, said, true = Classify(("a", "b", "c")), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    found = task.scores(said, Rows([""] * 4, true))
    # F1: a 2/3, b 4/5. MCC: (4*3 - (2*1 + 2*3)) / sqrt((16 - 8) (16 - 10)).
    assert found == pytest.approx({"accuracy": 0.75, "F1": (2 / 3 + 4 / 5) / 2, "MCC": 4 / np.sqrt(48)})


def test_scores_of_numbers():
    found = Regress(0.0, 1.0).scores(np.array([1.0, 2.0, 4.0]), Rows([""] * 3, np.array([1.0, 3.0, 2.0])))
    # Ranks 1 2 3 and 1 3 2: 1 - 6 * 2 / 24. Deviations (-4, -1, 5)/3 and (-1, 1, 0): 3/3 / sqrt(42/9 * 2).
    assert found == pytest.approx({"Spearman": 0.5, "Pearson": 1 / np.sqrt(28 / 3), "RMSE": np.sqrt(5 / 3)})
    assert Regress(0.0, 1.0).scores(np.ones(3), Rows([""] * 3, np.arange(3.0)))["Spearman"] == 0


def test_scores_of_tags():
    true = [["B-PER", "I-PER", "O"], ["B-LOC", "O"]]
    said = [["B-PER", "O", "O"], ["B-LOC", "O"]]
    # Of two entities said and two given, one is the same; four words of five are.
    found = Tag(("B-LOC", "B-PER", "I-PER", "O")).scores(objects(said), rows(true))
    assert found == pytest.approx({"F1": 0.5, "accuracy": 0.8})
    # Of BILOU: one of the two entities given is said, and one that is not.
    true, said = [["B-PER", "L-PER", "O"], ["U-LOC", "O"]], [["U-PER", "U-PER", "O"], ["U-LOC", "O"]]
    found = Tag(("B-PER", "I-PER", "L-PER", "O", "U-LOC", "U-PER")).scores(objects(said), rows(true))
    assert found["F1"] == pytest.approx(2 * 1 / (2 + 3))
    # Tags that are no entities: F1 of each tag, 1 for X and 2/3 for Y and 0 for Z.
    found = Tag(("X", "Y", "Z")).scores(objects([["X", "Y"], ["Y"]]), rows([["X", "Y"], ["Z"]]))
    assert found == pytest.approx({"F1": (1 + 2 / 3 + 0) / 3, "accuracy": 2 / 3})


def test_scores_of_answers():
    given = rows([(Answer(0, "The old man!"),), (Answer(0, "bob"), Answer(9, "eve"))])
    found = Span(1).scores(objects(["old man", "an eve saw"]), given)
    # "The" and "an" and "!" do not count; "eve saw" against "eve": precision 1/2, recall 1.
    assert found == pytest.approx({"F1": (1 + 2 / 3) / 2, "exact match": 0.5})


def test_scores_of_answers_are_those_of_transformers():
    """Which is no dependency of the scripts: of random texts with articles, punctuation and repeated words."""
    squad = pytest.importorskip("transformers.data.metrics.squad_metrics")
    rng, words = np.random.default_rng(0), ["the", "The", "a", "old", "man,", "old-man", "man", "an", "É.", "--"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 5))) for _ in range(300)]
    for said, given in zip(texts, reversed(texts)):
        found = Span(1).scores(objects([said]), rows([(Answer(0, given),)]))
        theirs = {"F1": squad.compute_f1(given, said), "exact match": squad.compute_exact(given, said)}
        assert found == pytest.approx(theirs, rel=1e-12)


def test_standard_errors():
    """By leaving rows out in turn: of a mean, s / sqrt(n), and near it where groups are left out."""
    true, said = np.zeros(400), np.random.default_rng(0).normal(size=400)
    task_of_means = types.SimpleNamespace(metric="m", scores=lambda said, rows: {"m": said.mean()})
    few = Regress.error(task_of_means, said[:12], Rows([""] * 12, true[:12]))
    assert few == pytest.approx(said[:12].std(ddof=1) / np.sqrt(12))
    many = Regress.error(task_of_means, said, Rows([""] * 400, true))
    assert many == pytest.approx(said.std(ddof=1) / np.sqrt(400), rel=0.4)


# What is read


def test_labels_of_words_and_of_windows(place):
    tokens, tag = Tokens(place / "model", 8), Tag(("B-PER", "O"))
    read = Rows([["ada", "met", "of-the"]], objects([["B-PER", "O", "B-LOC"]]))
    made = tag.encoded(tokens, read)
    assert len(made.ids[0]) == 7 and made.labels.rows == [[IGNORED, 0, 1, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert tag.answers(np.eye(2)[[[1, 0, 1, 0, 0, 0, 0]]], made)[0] == ["B-PER", "O", "B-PER"]
    span, context = Span(2), "the old saw by ada of did"
    made = span.encoded(tokens, Rows(objects([("who", context)]), objects([(Answer(15, "ada"),)])))
    # Four tokens of the context a window, two of which the next one has again.
    assert made.labels.tolist() == [[0, 0], [5, 5], [3, 3]]
    assert made.everything(8)["segments"].shape == (len(made.ids), 8)


def test_columns_are_filled_up_behind_their_rows():
    columns = {"label": PerToken([[1], [2, 3]]), "pair": np.array([[1, 2], [3, 4]])}
    made = batches([[7], [7, 7]], columns, 2, (3,))[0]
    np.testing.assert_array_equal(made["label"], [[1, IGNORED, IGNORED], [2, 3, IGNORED]])
    np.testing.assert_array_equal(made["pair"], columns["pair"])


@pytest.mark.parametrize(
    "task,row,words",
    [
        ("tokens", {"words": ["a", "b"], "tags": ["O"]}, "row 1: 2 words and 1 tags; expected one tag for each word"),
        ("tokens", {"words": "a b", "tags": "O"}, "row 1: 2 words and 1 tags"),
        ("tokens", {"words": [], "tags": []}, r"expected a list of words, or a text of them, found \[\]"),
        ("tokens", {"words": ["a"], "tags": [3]}, r"expected a list of tags, or a text of them, found \[3\]"),
        (
            "tokens",
            {"words": ["a"]},
            "has no column 'tags', only 'words'. Name yours with --config.words= and --config.tags=",
        ),
        ("tokens", {"words": ["a"], "tags": ["O"]}, "every tag to train on is 'O'; expected at least two kinds"),
        ("span", {"question": "q", "context": "a b", "answer": "c"}, "row 1: the answer 'c' is not in the context"),
        (
            "span",
            {"question": "q", "context": "a b", "answer": {"text": ["b"], "answer_start": [1]}},
            "the answer 'b' is not in the context at 1",
        ),
        (
            "span",
            {"question": "q", "context": "a b", "answer": {"text": [], "answer_start": []}},
            "expected an answer, or",
        ),
        ("span", {"question": "q", "context": "a b", "answer": 3}, "row 1: expected an answer, or .*, found 3"),
        *(
            ("span", {"question": "q", "context": "a b", "answer": answer}, "mine.jsonl, row 1: expected an answer, or")
            for answer in (
                {"text": "b", "answer_start": 2},
                {"text": ["b"], "answer_start": ["x"]},
                {"text": ["b"], "answer_start": [None]},
                {"text": ["b"]},
                {"text": None, "answer_start": None},
                [2, "b"],
                None,
            )
        ),
        ("span", {"question": " ", "context": "a b", "answer": "a"}, "row 1: expected a text, found ' '"),
        ("regress", {"text": "a", "score": "high"}, "row 1: expected a finite number, found 'high'"),
        ("regress", {"text": "a", "score": "nan"}, "row 1: expected a finite number, found 'nan'"),
        ("regress", {"text": "a", "score": 2}, "every number to train on is 2; expected at least two"),
        ("regress", {"text": "a", "score": None}, "row 1: expected a score in 'score', found None"),
    ],
)
def test_says_what_is_wrong_with_rows(tmp_path, task, row, words):
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    c = reviews.get_config()
    c.data = str(tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match=words):
        TASKS[task].read(c)


@pytest.mark.parametrize("task", ["tokens", "span"])
def test_the_reviews_have_neither_tags_nor_questions(task):
    with pytest.raises(ValueError, match=f"task '{task}' has no data set of its own; name a file with --config.data="):
        TASKS[task].read(reviews.get_config())


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"task": "rank"}, "task 'rank'; expected one of classify, regress, tokens, span"),
        ({"task": "span", "text": "body"}, "--config.text=body: task 'span' reads only question, context, answer"),
        ({"task": "regress", "classes": ("a", "b")}, r"--config.classes=.*: task 'regress' reads only text, score"),
        ({"task": "span", "data": "a.jsonl", "stride": 64}, "stride 64; expected a whole number from 0, below the le"),
        ({"task": "span", "data": "a.jsonl", "stride": -1}, "stride -1; expected a whole number from 0, below the le"),
        ({"task": "regress", "score": "stars"}, "--config.score=stars: the reviews have no such column, only text, sc"),
    ],
)
def test_options_that_a_task_would_not_read_are_refused(changes, words):
    c = reviews.get_config()
    c.update(changes)
    with pytest.raises(ValueError, match=words):
        tasks.read(c)


@pytest.mark.parametrize("given", [("good,bad",), ("good, bad",), ("good", "bad")])
def test_classes_as_a_flag_gives_them(tmp_path, given):
    (tmp_path / "mine.csv").write_text("text,label\n" + "fine,good\ndull,bad\n" * 4)
    c = reviews.get_config()
    c.data, c.classes = str(tmp_path / "mine.csv"), given
    assert tasks.read(c)[0].names == ("good", "bad")


def test_answers_of_squad(tmp_path):
    answers = [{"text": ["b", "b c"], "answer_start": [2, 2]}, "a", {"text": ["c"], "answer_start": [4]}]
    lines = [json.dumps({"question": "q", "context": "a b c", "answer": answer}) for answer in answers]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines * 3))
    c = reviews.get_config()
    c.data = str(tmp_path / "mine.jsonl")
    found = {answers for answers in TASKS["span"].read(c)[1].train.labels}
    assert found <= {(Answer(2, "b"), Answer(2, "b c")), (Answer(0, "a"),), (Answer(4, "c"),)} and found


def test_the_scores_of_the_reviews(place, monkeypatch):
    found = {"train": ([f"text {k}" for k in range(20)], [float(k) for k in range(20)])}
    monkeypatch.setattr(catalogue, "scores", lambda name, text, score: found)
    task, read = TASKS["regress"].read(reviews.get_config())
    assert task.mean == pytest.approx(read.train.labels.mean()) and len(read.train) == 14
