"""A tag for each word, as in finding names."""

import collections
import dataclasses
import re
import time
from pathlib import Path
from typing import Any, ClassVar, Mapping, Self, Sequence

import jax
import ml_collections
import numpy as np
import optax
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import f1_score

from experiments import data, files
from experiments.baselines import Baseline, Baselines, Features
from experiments.batches import IGNORED, PerToken
from experiments.tasks.task import Encoded, Task, objects
from experiments.tokens import Tokens

OUTSIDE = "O"


@dataclasses.dataclass(frozen=True)
class Tag(Task):
    """A softmax over tags at the first token of each word, and cross-entropy.

    Attributes:
      names: of the tags, in order.
    """

    names: tuple[str, ...]
    per_token: ClassVar[bool] = True
    metric: ClassVar[str] = "F1"
    options: ClassVar[tuple[str, ...]] = ("words", "tags")

    @classmethod
    def read(cls, c: ml_collections.ConfigDict) -> tuple[Self, data.Dataset[data.Rows]]:
        """As `Task` has it; `--config.words=` and `--config.tags=` name the columns of a file.

        Both hold lists, or strings with spaces between words and between tags.
        """
        if c.data == "reviews":
            raise ValueError("task 'tokens' has no data set of its own; name a file with --config.data=")
        found = files.rows(Path(c.data), words=c.words, tags=c.tags)
        pairs = [_pair(f"{c.data}, row {k}", row[c.words], row[c.tags]) for k, row in enumerate(found, 1)]
        rows = data.cut({"train": data.Rows([words for words, _ in pairs], objects([t for _, t in pairs]))}, ())
        names = tuple(sorted({tag for tags in rows.train.labels for tag in tags}))
        if len(names) < 2:
            raise ValueError(f"{c.data}: every tag to train on is {names[0]!r}; expected at least two kinds")
        return cls(names), rows

    @property
    def outputs(self) -> int:
        """A logit for each tag."""
        return len(self.names)

    def parsed(self, given: Sequence[str]) -> list[Any]:
        """As `Task` has it: words with spaces between them."""
        return [text.split() for text in super().parsed(given)]

    def read_texts(self, tokens: Tokens, texts: Sequence[Any]) -> Encoded:
        """Words, as tokens; kept is which word begins at each."""
        made = tokens.words(texts)
        firsts = [_firsts(words) for _, words in made]
        return Encoded([ids for ids, _ in made], source=(firsts, [len(words) for words in texts]))

    def labels(self, encoded: Encoded, rows: data.Rows) -> PerToken:
        """The tag of each word at its first token; a tag that is not among the names counts for nothing."""
        at = {name: k for k, name in enumerate(self.names)}
        label = lambda word, tags: IGNORED if word is None else at.get(tags[word], IGNORED)
        return PerToken([[label(word, tags) for word in first] for first, tags in zip(encoded.source[0], rows.labels)])

    def loss(self, out: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy, of words."""
        counts = (batch["label"] != IGNORED) * batch["weight"][:, None]
        each = optax.softmax_cross_entropy_with_integer_labels(out, batch["label"].clip(0)) * counts
        return each.sum(), {"weight": counts.sum()}

    def answers(self, outputs: np.ndarray, encoded: Encoded) -> np.ndarray:
        """The tags of each row's words; those of words that were cut off are "O", or the first tag."""
        firsts, counts = encoded.source
        usual = OUTSIDE if OUTSIDE in self.names else self.names[0]
        made = []
        for best, first, count in zip(outputs.argmax(2), firsts, counts):
            tags = [usual] * count
            for place, word in enumerate(first):
                if word is not None:
                    tags[word] = self.names[best[place]]
            made.append(tags)
        return objects(made)

    def scores(self, answers: np.ndarray, rows: data.Rows) -> dict[str, float]:
        """F1 of whole entities where tags are of B- and I-, or of BIOES or BILOU, else averaged over the tags; and the share
        of words."""
        given, said = [[tag for tags in column for tag in tags] for column in (rows.labels, answers)]
        if all(re.fullmatch(r"O|[BIESLU]-.+", name) for name in self.names):
            both = ([list(map(_bioes, tags)) for tags in column] for column in (rows.labels, answers))
            f1 = entity_f1(*both, zero_division=0)
        else:
            f1 = f1_score(given, said, average="macro", zero_division=0.0)
        return {"F1": float(f1), "accuracy": float(np.mean([x == y for x, y in zip(given, said)]))}

    def baselines(self, data: data.Dataset[data.Rows], test: data.Rows, features: Features) -> Baselines:
        """The most frequent tag of each word."""
        return {"usual": lambda: _usual(data.train, test)}

    def said(self, answer: Any, outputs: np.ndarray) -> str:
        """The tags."""
        return " ".join(answer)


def _bioes(tag: str) -> str:
    """A tag of BILOU as seqeval reads it: the last of an entity, L-, is E-, and one that is all of it, U-, is S-."""
    return {"L-": "E-", "U-": "S-"}.get(tag[:2], tag[:2]) + tag[2:]


def _usual(train: data.Rows, test: data.Rows) -> Baseline:
    """The most frequent tag of each word, and of all words where it is new."""
    start = time.perf_counter()
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for words, tags in zip(train.texts, train.labels):
        for word, tag in zip(words, tags):
            seen[word].update([tag])
    every = sum(seen.values(), collections.Counter()).most_common(1)[0][0]
    best = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    answers = objects([[best.get(word, every) for word in words] for words in test.texts])
    return Baseline("each word's usual tag", answers, len(best), time.perf_counter() - start)


def _pair(where: str, words: Any, tags: Any) -> tuple[list[str], list[str]]:
    """The words and tags of a row."""
    both = [x.split() if isinstance(x, str) else x for x in (words, tags)]
    for name, x in zip(("words", "tags"), both):
        if not isinstance(x, list) or not x or not all(isinstance(part, str) and part.strip() for part in x):
            raise ValueError(f"{where}: expected a list of {name}, or a text of them, found {x!r}")
    if len(both[0]) != len(both[1]):
        raise ValueError(f"{where}: {len(both[0])} words and {len(both[1])} tags; expected one tag for each word")
    return both[0], both[1]


def _firsts(words: Sequence[int | None]) -> list[int | None]:
    """Which word begins at each token."""
    return [word if k == 0 or words[k - 1] != word else None for k, word in enumerate(words)]
