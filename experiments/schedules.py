"""Learning rates over the steps of a run."""

import optax


def warm_then_linear(rate: float, warmup: float, steps: int) -> optax.Schedule:
    """Rises linearly to `rate` over a share `warmup` of all steps, then falls linearly to 0."""
    warm = max(1, round(warmup * steps))
    rise, fall = optax.linear_schedule(0.0, rate, warm), optax.linear_schedule(rate, 0.0, steps - warm)
    return optax.join_schedules([rise, fall], [warm])
