"""The only file that knows which jax is running."""

from typing import Any, Callable, Sequence

import jax
from jax.extend import core as jex


def type_of(x: Any) -> Any:
    """The full type of an array: shape, dtype, weak type, sharding and varying axes."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
