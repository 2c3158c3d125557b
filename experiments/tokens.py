"""A checkpoint's tokenizer: texts, words and pairs of texts as token ids."""

import dataclasses
from pathlib import Path
from typing import Any, Sequence

from tokenizers import Tokenizer

from experiments.columns import Ids


@dataclasses.dataclass(frozen=True)
class Window:
    """A pair of texts as tokens: `ids`, `segments` (0 and 1), and of each token of the second text, (start, end) there."""

    ids: list[int]
    segments: list[int]
    places: list[tuple[int, int] | None]


def _window(encoding: Any) -> Window:
    places = [at if part == 1 else None for part, at in zip(encoding.sequence_ids, encoding.offsets)]
    return Window(encoding.ids, encoding.type_ids, places)


class Tokens:
    """Turns texts to ids.

    Args:
      folder: a checkpoint's, with its `tokenizer.json`.
      length: the most tokens of a text; what is longer is cut.
    """

    def __init__(self, folder: Path, length: int):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library's own, of no kind
            raise ValueError(f"{path} is damaged: {error}") from error
        # A file may hold the settings of whoever saved it; here, batches are padded when their length is known.
        self._tokenizer.enable_truncation(length)
        self._tokenizer.no_padding()
        self.length = length

    def words(self, examples: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int | None]]]:
        """The ids of each example of words, and of which word each token is."""
        made = self._tokenizer.encode_batch([list(words) for words in examples], is_pretokenized=True)
        return [(x.ids, x.word_ids) for x in made]

    def pairs(self, pairs: Sequence[tuple[str, str]], stride: int) -> list[list[Window]]:
        """Each pair of texts as one window or more, in which the second is cut where both together are too long.

        Args:
          pairs: of texts.
          stride: how many tokens of the second text the next window has again.

        Raises:
          ValueError: a stride as long as a window, or a first text that leaves a window nothing but the stride.
        """
        self._check_room(pairs, stride)
        self._tokenizer.enable_truncation(self.length, stride=stride, strategy="only_second")
        try:
            made = self._tokenizer.encode_batch(list(pairs))
        finally:
            self._tokenizer.enable_truncation(self.length)
        return [[_window(x) for x in (whole, *whole.overflowing)] for whole in made]

    def _check_room(self, pairs: Sequence[tuple[str, str]], stride: int) -> None:
        """What the library would panic at, or say without a word of which pair."""
        free = self.length - self._tokenizer.num_special_tokens_to_add(True)
        if not 0 <= stride < free:
            raise ValueError(f"stride {stride}; of {self.length} tokens, {free} are for a pair: expected 0 to {free - 1}")
        self._tokenizer.no_truncation()
        try:
            for (first, second), count in zip(pairs, self._counts([first for first, _ in pairs])):
                room = free - count
                if room <= stride and self._counts([second])[0] > room:
                    raise ValueError(
                        f"{first[:60]!r} has {count} tokens, and leaves {room} of {self.length} to a window of what comes "
                        f"with it; expected more than the {stride} that windows share: set --config.length= or "
                        "--config.stride="
                    )
        finally:
            self._tokenizer.enable_truncation(self.length)

    def _counts(self, texts: list[str]) -> list[int]:
        return [len(x.ids) for x in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def __call__(self, texts: Sequence[str]) -> Ids:
        """The ids of each text, with the marks that the model expects around it; made when they are asked for."""
        return Ids(texts, lambda some: [encoding.ids for encoding in self._tokenizer.encode_batch(some)])
