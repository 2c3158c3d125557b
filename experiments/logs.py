"""Where a run's numbers go beside the terminal: TensorBoard's files, and profiles of chosen steps."""

import warnings
from pathlib import Path
from typing import Any, Sequence

import jax
from tensorboardX import SummaryWriter

from experiments.train import Score, Shown


class TensorBoard:
    """Writes losses, examples a second and scores into a folder: `tensorboard --logdir=FOLDER` shows them.

    Args:
      folder: where to.
      metric: what the scores are called.
    """

    def __init__(self, folder: Path, metric: str):
        self._writer, self._metric, self._step = SummaryWriter(str(folder)), metric, 0

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: Any) -> None:
        self._writer.close()

    def epoch(self, number: int, steps: int, done: int) -> None:
        """Finds the step at which a run goes on."""
        self._step = (number - 1) * steps + done

    def step(self, number: int, loss: float, rate: float) -> None:
        """Writes the numbers of a step."""
        self._step = number
        self._writer.add_scalar("training/loss", loss, number)
        self._writer.add_scalar("training/examples_per_second", rate, number)

    def score(self, number: int, score: Score, best: bool, skipped: int) -> None:
        """Writes the score of an epoch, and how many of its steps were left out, at its last step."""
        self._writer.add_scalar(f"validation/{self._metric}", score.value, self._step)
        self._writer.add_scalar("validation/loss", score.loss, self._step)
        self._writer.add_scalar("training/skipped", skipped, self._step)
        self._writer.flush()


def span(steps: str) -> tuple[int, int]:
    """The first step and the end of "first:end", such as "10:13" for the steps 10, 11 and 12.

    Raises:
      ValueError: other words, a first step below 2 (the first one compiles), or an end that is not behind it.
    """
    parts = steps.split(":")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not 1 < int(parts[0]) < int(parts[1]):
        raise ValueError(f'profile {steps!r}; expected "first:end" with 1 < first < end, such as "10:13"')
    return int(parts[0]), int(parts[1])


class Profile:
    """Writes a profile of chosen steps into a folder, which TensorBoard and Perfetto show; warns where no such step came.

    Args:
      folder: where to.
      steps: as `span` reads them.
    """

    def __init__(self, folder: Path, steps: str):
        self._folder, (self._first, self._end), self._runs, self._wrote = folder, span(steps), False, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        self._stop()
        if error is None and not self._wrote:
            warnings.warn(f"no profile was written: step {self._first} did not follow another in this run")

    def epoch(self, number: int, steps: int, done: int) -> None:
        """Nothing."""

    def step(self, number: int, loss: float, rate: float) -> None:
        """Begins before the first step, and ends after the last."""
        if number == self._first - 1:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True
        if number >= self._end - 1:
            self._stop()

    def score(self, number: int, score: Score, best: bool, skipped: int) -> None:
        """Nothing."""

    def _stop(self) -> None:
        if self._runs:
            jax.profiler.stop_trace()
            self._runs, self._wrote = False, True


class Together:
    """Shows progress in several places."""

    def __init__(self, places: Sequence[Shown]):
        self._places = places

    def epoch(self, number: int, steps: int, done: int) -> None:
        """Begins an epoch."""
        for place in self._places:
            place.epoch(number, steps, done)

    def step(self, number: int, loss: float, rate: float) -> None:
        """Shows a step."""
        for place in self._places:
            place.step(number, loss, rate)

    def score(self, number: int, score: Score, best: bool, skipped: int) -> None:
        """Shows a score."""
        for place in self._places:
            place.score(number, score, best, skipped)
