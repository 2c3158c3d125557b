"""Learning rates over the steps of a run."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def warm_then_linear(rate: float, warmup: float, steps: int) -> optax.Schedule:
    """Rises linearly to `rate` over a share `warmup` of all steps, then falls linearly to 0."""
    warm = _warm(warmup, steps)
    rise, fall = optax.linear_schedule(0.0, rate, warm), optax.linear_schedule(rate, 0.0, steps - warm)
    return optax.join_schedules([rise, fall], [warm])


def _warm(warmup: float, steps: int) -> int:
    return max(1, round(warmup * steps))


class Rate(NamedTuple):
    """Where a learning rate stands: scalars, so that one compiled step serves every rate and every number of steps."""

    done: jax.Array
    rate: jax.Array
    warm: jax.Array
    steps: jax.Array


def at_rate(rate: float, warmup: float, steps: int) -> optax.GradientTransformation:
    """Scales updates by minus `warm_then_linear`, whose numbers lie in the state."""

    def init(_: Any) -> Rate:
        numbers = (rate, float(_warm(warmup, steps)), float(steps))
        return Rate(jnp.zeros((), jnp.int32), *(jnp.asarray(x, jnp.float32) for x in numbers))

    def update(updates: Any, state: Rate, params: Any = None) -> tuple[Any, Rate]:
        done, rate, warm, steps = state
        at = done.astype(jnp.float32)
        now = rate * jnp.clip(jnp.minimum(at / warm, (steps - at) / jnp.maximum(steps - warm, 1)), 0, 1)
        return jax.tree.map(lambda x: -now.astype(x.dtype) * x, updates), state._replace(done=done + 1)

    return optax.GradientTransformation(init, update)
