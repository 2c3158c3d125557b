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

    Of several processes, one that is asked stops them all, at the same check: JAX's own preemption service tells them. It
    begins to listen when they join and would do so to their end; behind the run, SIGTERM does what it always does again.

    Args:
      runs: where the state is saved; without it, SIGTERM does what it always does.
    """

    def __init__(self, runs: Runs | None):
        self._runs, self._several = runs, jax.process_count() > 1
        self._asked, self._checks = False, 0
        self._before: Any = None

    def __enter__(self) -> "Interruption":
        if self._runs is not None or self._several:
            self._before = signal.getsignal(signal.SIGTERM)  # as Python knows it, without the service
        if self._runs is None:
            self._as_before()
        elif not self._several:
            signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        self._as_before()

    def _as_before(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def check(self, step: int, save: Callable[[], None]) -> None:
        """Saves and raises `Interrupted` where a stop was asked for; all processes call it equally often.

        Args:
          step: of the state, for the message.
          save: what saves it.
        """
        if self._runs is None:
            return
        self._checks += 1
        if self._asked or (self._several and multihost_utils.reached_preemption_sync_point(self._checks)):
            save()
            self._runs.wait()
            raise Interrupted(f"stopped by SIGTERM after step {step}; the state is in {self._runs.folder}")
