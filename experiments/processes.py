"""The processes of one run: joining them, which one writes, and what one of them needs of all."""

from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from peftjax import processes
from peftjax.tree import entries


def join(c: ml_collections.ConfigDict) -> None:
    """Joins this process to the others, as `--config.join=` says; to be called before JAX looks for devices.

    Without checkpoints there is nothing to save on SIGTERM, which ends the process then, as it always does.

    Raises:
      ValueError: words that are none of "", "auto" and "host:port,n,k".
      TimeoutError: not all came; says which did not.
    """
    if not c.join:
        return
    jax.config.update("jax_enable_preemption_service", c.resume == "auto")
    if c.join == "auto":
        return processes.join(timeout=c.timeout)
    parts = c.join.split(",")
    if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit()):
        raise ValueError(f'join {c.join!r}; expected "auto", or "host:port,n,k" for process k of n')
    processes.join(parts[0], int(parts[1]), int(parts[2]), timeout=c.timeout)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def whole(tuned: Any, like: Any) -> Any:
    """A tuned tree on the mesh as one of this process; all processes have to call it.

    Args:
      tuned: the tree.
      like: the same tree before training, on this process: it gives the base, which is not gathered.
    """
    kept = iter(entries(like))

    def local(x: Any) -> Any:
        entry = next(kept)
        if entry.is_base or entry.is_key:
            return entry.value
        return x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(local, tuned)
