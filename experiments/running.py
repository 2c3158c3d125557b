"""What the training scripts take alike from a page: a mesh, checkpoints to go on from, and places where a run is shown."""

import contextlib
import math
import shutil
from pathlib import Path
from typing import Any, Iterator, Mapping

import ml_collections
from absl import flags, logging
from jax.sharding import Mesh
from rich.console import Console

import peftjax as pj
from experiments import assets, display, logs, processes
from experiments.interruption import Interrupted
from experiments.train import Shown
from peftjax.runs import Runs
from peftjax.sharding_rules import Rules, by_rules, make_mesh, within

CHECKPOINTS = "checkpoints"  # the folder, in that of the run
# What may change when a run goes on.
FREE = ("out", "resume", "every", "failing", "mesh", "accumulate", "join", "timeout", "tensorboard", "profile")

# What numbers of a page may be: whole ones by the least, others by the least and by what they are below.
LEAST = {"batch": 1, "accumulate": 1, "epochs": 1, "patience": 1, "length": 1, "seed": 0, "every": 0, "failing": 1}
RANGES = {"dropout": (0.0, 1.0), "warmup": (0.0, 1.0), "decay": (0.0, math.inf)}


@contextlib.contextmanager
def script(name: str) -> Iterator[None]:
    """What a script does; where its page, a file or a run is wrong, a line says so, and the process ends with 1.

    What orbax has to say of every checkpoint is hidden, on every process, unless `--verbosity=` asks for it.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)
    assets.keep_compiled()
    try:
        yield
    except (ValueError, OSError, FloatingPointError, assets.Missing, Interrupted) as error:
        raise SystemExit(f"{name}: {error}") from error


def check(c: ml_collections.ConfigDict) -> None:
    """Raises where a page has values that no run can have: what would be found after minutes is found at once.

    Raises:
      ValueError: another `resume` than "auto" and "no", another `profile` than "first:end", or a number out of its range.
    """
    for name, least in LEAST.items():
        if name in c and not (type(c[name]) is int and c[name] >= least):
            raise ValueError(f"{name} {c[name]!r}; expected a whole number, {least} at least, as --config.{name}={least}")
    for name, (low, high) in RANGES.items():
        if name in c and not (isinstance(c[name], (int, float)) and low <= c[name] < high):
            raise ValueError(f"{name} {c[name]!r}; expected a number from {low:g}, below {high:g}: set --config.{name}=")
    for name, value in {"clip": c.clip, **{f"rate.{name}": rate for name, rate in c.rate.items()}}.items():
        if not (isinstance(value, (int, float)) and value > 0 and (value < math.inf or name == "clip")):
            raise ValueError(f"{name} {value!r}; expected a number above 0: set --config.{name}=")
    if c.resume not in ("auto", "no"):
        raise ValueError(f"resume {c.resume!r}; expected auto or no")
    if c.profile:
        logs.span(c.profile)


def laid(c: ml_collections.ConfigDict, rules: Rules, params: Any) -> tuple[Mesh | None, Any]:
    """The mesh that `--config.mesh=` names and, by a model's rules, where its parameters lie; None twice for one device."""
    if not c.mesh:
        return None, None
    mesh = make_mesh(c.mesh)
    return mesh, by_rules(within(rules, mesh), params, mesh)


@contextlib.contextmanager
def shown(c: ml_collections.ConfigDict, console: Console, folder: Path, metric: str = "accuracy") -> Iterator[Shown]:
    """A bar, and in the folder of the run what `--config.tensorboard=` and `--config.profile=` ask for."""
    with contextlib.ExitStack() as stack:
        places: list[Any] = [display.Bar(console, metric)]
        if c.tensorboard and processes.is_first():
            places.append(logs.TensorBoard(folder / "tensorboard", metric))
        if c.profile:
            places.append(logs.Profile(folder / "profile", c.profile))
        yield logs.Together([stack.enter_context(place) for place in places])


def forget(folder: Path, result: Mapping[str, Any]) -> None:
    """Deletes the checkpoints of a run that is a row of the results: nobody goes on from them. Logs stay.

    Those of one that failed stay too: its row says that the last good state is there.
    """
    if "failed" in result:
        return
    for place in list(folder.glob(f"**/{CHECKPOINTS}")):
        shutil.rmtree(place)
        for above in (place.parent, folder):
            if above.is_dir() and not any(above.iterdir()):
                above.rmdir()


def checkpoints(
    c: ml_collections.ConfigDict, folder: Path, method: pj.Method, roles: pj.Roles, settings: Mapping[str, Any]
) -> contextlib.AbstractContextManager[Runs | None]:
    """The checkpoints of a run, in its folder, as `--config.resume=` has it.

    Args:
      c: the page.
      folder: of the run.
      method, roles: what made the tree.
      settings: what has to be the same when the run goes on, by name; what is free is left out.

    Raises:
      ValueError: as `check` does; or the folder holds something else.
    """
    check(c)
    if c.resume == "no":
        return contextlib.nullcontext()
    kept = {name: value for name, value in settings.items() if name not in FREE}
    return Runs(folder / CHECKPOINTS, method, roles, metric="epoch", lowest=False, settings=kept)
