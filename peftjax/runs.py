"""Checkpoints of a run: all that moves, and what it was made with; the base itself is never written.

Orbax writes them: `import peftjax.runs` needs `orbax-checkpoint`, which the extra `experiments` brings, and without it
raises `ModuleNotFoundError`, which says so. `peftjax.save` writes an adapter alone, and needs no Orbax.
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Iterator, Mapping

import jax
import numpy as np

try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy as keep
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'peftjax.runs: {error}; checkpoints of runs need orbax-checkpoint: pip install "peftjax[experiments]"',
        name=error.name,
    ) from error

from peftjax.fingerprint import compare, sums
from peftjax.flat import unique
from peftjax.method import Method
from peftjax.overlay import is_key, short
from peftjax.roles import Roles
from peftjax.training import TrainState
from peftjax.tree import entries, strip

FORMAT = 2
ARRAYS, PAGE = "arrays", "page"
MOVING = ("trainable", "opt_state", "model_state", "step", "skipped", "failing")


class Runs:
    """The checkpoints in one folder: the latest ones, and the best by a metric of the caller's.

    Args:
      folder: theirs alone, and the same for all processes; made where it is missing.
      method: the method that made the tree.
      roles: the roles that its `init` was given, if any.
      latest: how many of the latest checkpoints to keep; 1, for a run goes on from the last one.
      best: how many of the best to keep besides, of those that were saved with the metric; 1, to be taken in the end.
      metric: the name of the metric that says which are best, the smallest first; see `lowest`.
      lowest: False where the largest are best.
      settings: what else has to be the same when a run goes on, as JSON-able values by name.
      timeout: the seconds that several processes wait for each other while they save, before it counts as failed; 600,
        for an adapter is small, and a disk that is full on one of them is said nowhere else.

    Raises:
      ValueError: the folder is a file, or holds something else; or a number that is none of checkpoints, or of seconds.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj, tempfile
      >>> from peftjax.runs import Runs
      >>> method = pj.unfreeze("b")
      >>> tuned = method.init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> fresh = pj.train_state(tuned, optax.sgd(0.1))
      >>> with tempfile.TemporaryDirectory() as folder, Runs(folder, method) as runs:
      ...     for _ in "begun", "resumed":
      ...         state, data = runs.restore(fresh) or (fresh, {"batch": 0})
      ...         print(data)
      ...         runs.save(state, data={"batch": 3})
      {'batch': 0}
      {'batch': 3}
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        method: Method,
        roles: Roles | None = None,
        *,
        latest: int = 1,
        best: int = 1,
        metric: str = "loss",
        lowest: bool = True,
        settings: Mapping[str, Any] | None = None,
        timeout: int = 600,
    ):
        for name, number, least in (("latest", latest, 1), ("best", best, 0), ("timeout", timeout, 1)):
            if type(number) is not int or number < least:
                raise ValueError(f"{name}={number!r}: expected a whole number, {least} at least")
        self.folder = Path(os.path.realpath(folder))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; expected a folder of checkpoints, or a place for one")
        if self.folder.is_dir() and (odd := sorted(x.name for x in self.folder.iterdir() if not _is_ours(x.name))):
            raise ValueError(
                f"{self.folder} holds other files ({', '.join(odd[:3])}); expected a folder of checkpoints alone"
            )
        self.metric = metric
        made = {"method": method.to_dict(), "roles": roles and roles.to_dict(), "settings": dict(settings or {})}
        self._made = {"format": FORMAT, **json.loads(json.dumps(made))}
        self._base: tuple[Any, dict[str, Any]] = (None, {})
        value = lambda metrics: metrics[metric]
        policies = [keep.LatestN(latest)]
        if best:
            policies.append(
                keep.BestN(get_metric_fn=value, reverse=lowest, n=best, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies),
            best_fn=value,
            best_mode="min" if lowest else "max",
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=timeout),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        last = self._manager.latest_step()
        self._last = -1 if last is None else last
        self._compared = last is None  # whether what is there has been compared with what is saved or restored

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *error: Any) -> None:
        with self._written():
            self._manager.close()

    def wait(self) -> None:
        """Returns when all that was saved is on the disk.

        Raises:
          OSError: it could not be written, as on a full disk; earlier checkpoints stay, and it says which is the last.
        """
        with self._written():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Says in few words what went wrong with a file, and what is there still."""
        try:
            yield
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            whole = sorted(int(x.name) for x in self.folder.iterdir() if x.name.isdigit()) if self.folder.is_dir() else []
            there = f"the last one that is whole is {whole[-1]}" if whole else "there is no whole one"
            raise OSError(f"{self.folder}: a checkpoint could not be written, and {there}: {_reason(error)}") from error

    @property
    def numbers(self) -> list[int]:
        """The numbers of the checkpoints that are there and whole, in rising order."""
        self.wait()
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The number of the best checkpoint, or None where none has the metric."""
        return self._manager.best_step()

    def save(self, state: TrainState, *, data: Any = None, metrics: Mapping[str, float] | None = None) -> None:
        """Writes a checkpoint of a state, in the background; every process has to call it.

        It is numbered by the state's step, or by the number after the last one where there is one of that step already.

        Args:
          state: the state. Its arrays are copied before this returns, so the next step may donate them.
          data: where the data stands: a JSON-able value, the same on all processes.
          metrics: what tells the best checkpoints, as `{"loss": 0.3}`.

        Raises:
          OSError: this one or the one before could not be written; see `wait`.
          ValueError: the metrics lack the one by which the best are told, or it is not finite; or, at the first call, the
            folder holds checkpoints of another run, which those of this one would replace.
        """
        if metrics is not None and not np.isfinite(metrics.get(self.metric, np.nan)):
            raise ValueError(f"metrics {dict(metrics)}: expected a finite {self.metric!r}, which tells the best")
        held = _held(state)
        own = self._page(state, held)
        if not self._compared:
            self._refuse_others(own)
        page = {**own, "data": data, "sums": sums(held)["leaves"]}
        items = ocp.args.Composite(**{ARRAYS: ocp.args.StandardSave(held), PAGE: ocp.args.JsonSave(page)})
        told = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        self._last = max(int(state.step), self._last + 1)
        with self._written():
            self._manager.save(self._last, args=items, metrics=told, force=True)

    def restore(self, state: TrainState, number: int | None = None) -> tuple[TrainState, Any] | None:
        """The state of a checkpoint, and where the data stood.

        Args:
          state: one like it, of the same base, method and optimizer, such as a fresh `train_state`: it gives the base's
            buffers and, for every array, where it lies. The mesh may be another than the saved one's.
          number: which checkpoint; None for the latest.

        Returns:
          `(state, data)`, or None where there is no checkpoint yet and no number was asked for: a run that begins or goes
          on is `state, data = runs.restore(fresh) or (fresh, None)`.

        Raises:
          ValueError: another method, base, optimizer or rank, with what was found and expected; no such checkpoint; or one
            that is damaged, or that something else wrote.
        """
        numbers = self.numbers
        if number is None and not numbers:
            return None
        if number is not None and number not in numbers:
            raise ValueError(f"{self.folder} holds no checkpoint {number}; expected one of {numbers}")
        at = numbers[-1] if number is None else number
        page, held, where = self._saved_page(at), _held(state), f"{self.folder}, checkpoint {at}"
        self._compare(where, page, self._page(state, held))
        self._compared = True
        like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in held.items()}
        found = self._read(at, ARRAYS, ocp.args.StandardRestore(like))
        saved, now = page["sums"], sums(found)["leaves"]
        if odd := [name for name in now if now[name] != saved.get(name)]:
            raise ValueError(f"{where} is damaged: it holds other numbers than were saved as {', '.join(odd[:3])}")
        return _filled(state, found), page["data"]

    def _refuse_others(self, own: Mapping[str, Any]) -> None:
        """Raises where the last checkpoint that was there is another run's."""
        try:
            self._compare(f"{self.folder}, checkpoint {self._last}", self._saved_page(self._last), own)
        except ValueError as error:
            raise ValueError(
                f"{error}\nIt is another run's, and saving would replace it: give this run a folder of its own"
            ) from None
        self._compared = True

    def _saved_page(self, at: int) -> dict[str, Any]:
        page = self._read(at, PAGE, ocp.args.JsonRestore())
        if not isinstance(page, dict) or page.get("format") != FORMAT:
            version = page.get("format") if isinstance(page, dict) else None
            raise ValueError(
                f"{self.folder}, checkpoint {at} has format {version!r}, expected {FORMAT}: written by another version?"
            )
        return page

    def _read(self, at: int, item: str, how: Any) -> Any:
        """One item of a checkpoint. Of what is damaged, or by another hand, Orbax raises whatever it meets with first."""
        try:
            return self._manager.restore(at, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:
            raise ValueError(
                f"{self.folder}, checkpoint {at} cannot be read, so it is damaged, or `Runs` did not write it; to go on "
                f"from an earlier one, delete its folder: {type(error).__name__}: {_line(error)}"
            ) from error

    def _page(self, state: TrainState, held: Mapping[str, Any]) -> dict[str, Any]:
        base = strip(state.tuned)
        leaves = jax.tree.leaves(base)
        if self._base[0] is None or any(x is not y for x, y in zip(self._base[0], leaves, strict=True)):
            self._base = (leaves, sums(base))
        return {**self._made, "base": self._base[1], "arrays": {name: short(x) for name, x in held.items()}}

    @staticmethod
    def _compare(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        if found["method"] != expected["method"]:
            raise ValueError(
                f"{where} has another method:\n  found    {found['method']}\n  expected {expected['method']}"
            )
        compare(found["base"], expected["base"], where)
        parts = {"roles": "other roles", "settings": "other settings", "arrays": "another optimizer or tree"}
        for part, what in parts.items():
            old, new = found[part] or {}, expected[part] or {}
            odd = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
            if odd:
                lines = [f"{name}: found {old.get(name, 'none')}, expected {new.get(name, 'none')}" for name in odd[:5]]
                more = [f"and {len(odd) - 5} more"] if len(odd) > 5 else []
                raise ValueError(f"{where} has {what}:\n  " + "\n  ".join(lines + more))


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: of errors that came of each other, the first that is none of waiting for the others."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    told = [x for x in causes if not isinstance(x, (TimeoutError, jax.errors.JaxRuntimeError))]
    if not told:
        return f"not all processes got to its end; is the disk of one full, or is one gone? {_line(error)}"
    return _line(told[0])


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def _is_ours(name: str) -> bool:
    return name.split(".")[0].isdigit() or name.startswith(("_", "."))


def _held(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds, by name: what moves, the random key, and the overlays' own frozen arrays."""
    named = [(_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(_moving(state))]
    key = [] if state.key is None else [("key", jax.random.key_data(state.key))]
    own = [e for e in entries(state.tuned) if not e.is_base and not e.trains and not e.is_key]
    return unique([*named, *key, *((f"frozen/{e.key}", e.value) for e in own)])


def _moving(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in MOVING}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _filled(state: TrainState, found: Mapping[str, Any]) -> TrainState:
    """The state with the arrays of a checkpoint in the place of its own."""
    moving = jax.tree_util.tree_map_with_path(lambda path, _: found[_name(path)], _moving(state))
    key: Any = found.get("key")
    if is_key(state.key):
        key = jax.random.wrap_key_data(key, impl=jax.random.key_impl(state.key))
    own = (found.get(f"frozen/{e.key}", e.value) for e in entries(state.tuned) if not e.trains)
    frozen = jax.tree.map(lambda _: next(own), state.frozen)
    return dataclasses.replace(state, **moving, key=key, frozen=frozen)
