"""Being asked to stop: SIGTERM, on which a run saves its state and ends."""

import signal
from typing import Any, Callable

import jax
from jax.experimental import multihost_utils

from peftjax.runs import Runs


class Interrupted(Exception):
    """A run was asked to stop, and its state is saved."""


class Interruption:
    """Listens for SIGTERM while a run with checkpoints goes on.

    Of several processes, one that is asked stops them all, after the same step: JAX's own preemption service tells them.

    Args:
      runs: where the state is saved; without it, SIGTERM does what it always does.
    """

    def __init__(self, runs: Runs | None):
        self._runs, self._asked, self._before = runs, False, None

    def __enter__(self) -> "Interruption":
        if self._runs is not None and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def check(self, step: int, save: Callable[[], None]) -> None:
        """Saves and raises `Interrupted` where a stop was asked for; to be called after every step."""
        if self._runs is None:
            return
        if self._asked or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)):
            save()
            self._runs.wait()
            raise Interrupted(f"stopped by SIGTERM after step {step}; the state is in {self._runs.folder}")
