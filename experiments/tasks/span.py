"""The part of a text that answers a question (extractive question answering)."""

import collections
import dataclasses
import re
import string
from pathlib import Path
from typing import Any, ClassVar, Mapping, Self, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments import data, files
from experiments.baselines import Baseline, Baselines, Features
from experiments.batches import PerToken
from experiments.tasks.task import Encoded, Task, objects
from experiments.tokens import Tokens, Window

LONGEST = 30  # tokens of an answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """Where an answer begins in its context, in characters, and what it says."""

    start: int
    text: str


@dataclasses.dataclass(frozen=True)
class Span(Task):
    """A softmax over a text's tokens for the first token of an answer, and one for the last.

    A context that is too long for the model becomes several windows. The first token of a window stands for "not here".

    Attributes:
      stride: how many tokens a window shares with the next.
    """

    stride: int
    per_token: ClassVar[bool] = True
    metric: ClassVar[str] = "F1"
    options: ClassVar[tuple[str, ...]] = ("question", "context", "answer")

    @classmethod
    def read(cls, c: ml_collections.ConfigDict) -> tuple[Self, data.Dataset[data.Rows]]:
        """As `Task` has it; `--config.question=`, `--config.context=` and `--config.answer=` name the columns of a file.

        An answer is a text, which is taken where it first occurs, or {"text": [...], "answer_start": [...]}, as in
        SQuAD: the first is trained on, and the nearest counts.
        """
        if c.data == "reviews":
            raise ValueError("task 'span' has no data set of its own; name a file with --config.data=")
        if type(c.stride) is not int or not 0 <= c.stride < c.length:
            raise ValueError(f"stride {c.stride!r}; expected a whole number from 0, below the length, {c.length}")
        found = files.rows(Path(c.data), question=c.question, context=c.context, answer=c.answer)
        texts, answers = [], []
        for k, row in enumerate(found, 1):
            for column in (c.question, c.context):
                data.check_text(c.data, k, row[column])
            texts.append((row[c.question], row[c.context]))
            answers.append(_answers(f"{c.data}, row {k}", row[c.answer], row[c.context]))
        return cls(c.stride), data.cut({"train": data.Rows(objects(texts), objects(answers))}, ())

    @property
    def outputs(self) -> int:
        """Of the first token and of the last."""
        return 2

    def parsed(self, given: Sequence[str]) -> list[Any]:
        """As `Task` has it: questions and contexts in turn.

        Raises:
          ValueError: a question without a context.
        """
        texts = super().parsed(given)
        if len(texts) % 2:
            raise ValueError(f"{len(texts)} texts: expected a question and its context, or several such pairs")
        return list(zip(texts[::2], texts[1::2]))

    def read_texts(self, tokens: Tokens, texts: Sequence[Any]) -> Encoded:
        """Windows of questions with their contexts; kept is of which text each is."""
        found = tokens.pairs(list(texts), self.stride)
        windows = [window for own in found for window in own]
        owners = np.repeat(np.arange(len(found)), [len(own) for own in found])
        inputs = {"segments": PerToken([x.segments for x in windows], 0)}
        return Encoded([x.ids for x in windows], inputs, (windows, owners, texts))

    def labels(self, encoded: Encoded, rows: data.Rows) -> np.ndarray:
        """The places of the answer's first and last token in each window, both 0 where it is not within."""
        windows, owners, _ = encoded.source
        return np.array([_place(x, rows.labels[owner][0]) for x, owner in zip(windows, owners)], np.int32)

    def loss(self, out: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean cross-entropy of both places."""
        logits = jnp.where(batch["mask"][:, :, None] > 0, out, jnp.finfo(out.dtype).min)
        each = optax.softmax_cross_entropy_with_integer_labels(logits.swapaxes(1, 2), batch["label"]).mean(1)
        return (each * batch["weight"]).sum(), {"weight": batch["weight"].sum()}

    def answers(self, outputs: np.ndarray, encoded: Encoded) -> np.ndarray:
        """The part of the context from a first token to a last one whose logits have the largest sum."""
        windows, owners, texts = encoded.source
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(texts)
        for window, owner, out in zip(windows, owners, outputs):
            score, (start, end) = _best(window, out)
            best[owner] = max(best[owner], (score, texts[owner][1][start:end]), key=lambda x: x[0])
        return objects([text for _, text in best])

    def scores(self, answers: np.ndarray, rows: data.Rows) -> dict[str, float]:
        """F1 of words and exact match, of the nearest answer given, as SQuAD measures them.

        They are written here: of the libraries that have them, torchmetrics needs torch, evaluate fetches them from a hub
        at run time, and transformers is large; the tests compare with it.
        """
        best = lambda score, said, given: max(score(said, answer.text) for answer in given)
        both = list(zip(answers, rows.labels))
        return {
            "F1": float(np.mean([best(_overlap, *pair) for pair in both])),
            "exact match": float(np.mean([best(_is_same, *pair) for pair in both])),
        }

    def baselines(self, data: data.Dataset[data.Rows], test: data.Rows, features: Features) -> Baselines:
        """The whole context."""
        said = Baseline("the whole context", objects([context for _, context in test.texts]), 0, 0.0)
        return {"context": lambda: said}


def _answers(where: str, answer: Any, context: str) -> tuple[Answer, ...]:
    """The answers of a row, each found in its context."""
    given = [(context.find(answer), answer)] if isinstance(answer, str) else _of_squad(answer)
    if not given or not all(type(start) is int and isinstance(text, str) and text.strip() for start, text in given):
        raise ValueError(
            f'{where}: expected an answer, or {{"text": [texts], "answer_start": [whole numbers]}} with as many of '
            f"both, found {answer!r}"
        )
    for start, text in given:
        if start < 0 or context[start : start + len(text)] != text:
            at = "" if isinstance(answer, str) else f" at {start}"
            raise ValueError(f"{where}: the answer {text!r} is not in the context{at}")
    return tuple(Answer(start, text) for start, text in given)


def _of_squad(answer: Any) -> list[tuple[Any, Any]]:
    """Where answers begin, and their texts; none where it is not two lists of one length."""
    if not isinstance(answer, Mapping):
        return []
    texts, starts = answer.get("text"), answer.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return []
    return list(zip(starts, texts))


def _place(window: Window, answer: Answer) -> tuple[int, int]:
    """The first and the last token of an answer."""
    end = answer.start + len(answer.text)
    inside = [k for k, at in enumerate(window.places) if at is not None and at[0] < end and answer.start < at[1]]
    if not inside or window.places[inside[0]][0] > answer.start or window.places[inside[-1]][1] < end:  # type: ignore[index]
        return 0, 0
    return inside[0], inside[-1]


def _best(window: Window, out: np.ndarray) -> tuple[float, tuple[int, int]]:
    """The best part of a window's context: its score, and where it begins and ends, in characters."""
    places = [(k, at) for k, at in enumerate(window.places) if at is not None and at[0] < at[1]]
    if not places:
        return -np.inf, (0, 0)
    first, last = (out[[k for k, _ in places], column].astype(np.float64) for column in (0, 1))
    sums = first[:, None] + last[None]
    length = np.arange(len(places))[None] - np.arange(len(places))[:, None]
    sums = np.where((length >= 0) & (length < LONGEST), sums, -np.inf)
    i, j = np.unravel_index(sums.argmax(), sums.shape)
    return float(sums[i, j]), (places[i][1][0], places[j][1][1])


def _words(text: str) -> list[str]:
    """What is compared: small letters, without punctuation and articles."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _is_same(said: str, given: str) -> float:
    return float(_words(said) == _words(given))


def _overlap(said: str, given: str) -> float:
    """F1 of the words that both have."""
    mine, theirs = _words(said), _words(given)
    common = sum((collections.Counter(mine) & collections.Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs)) if common else float(mine == theirs)
