"""Keys as attention reads them, after rotary positions, and as a projection puts them out, before."""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

# A number is the base of the usual rotary positions; a function turns keys (n, heads, size) by positions (n,).
Rope = float | Callable[[Any, Any], Any] | None


def turned(keys: np.ndarray, heads: int, rope: Rope, back: bool) -> np.ndarray:
    """Keys (..., n, heads * size) turned by the positions 0, 1, ..., n - 1, or back.

    Raises:
      ValueError: the heads do not divide the features, or `rope` is no rotation.
    """
    n, width = keys.shape[-2:]
    if heads < 1 or width % heads:
        raise ValueError(f"{width} features of keys are not {heads} heads")
    rows = keys.reshape(-1, n, heads, width // heads)
    turn = _by_angles if isinstance(rope, (int, float)) else _by_function
    return np.stack([turn(x, rope, -1 if back else 1) for x in rows]).reshape(keys.shape).astype(np.float32)


def _by_angles(x: np.ndarray, theta: Any, sign: int) -> np.ndarray:
    """By `p / theta ** (2 i / size)`, where entry i pairs with entry i + size / 2."""
    n, _, size = x.shape
    if size % 2 or not theta > 0:
        raise ValueError(f"rope={theta!r} and heads of {size} features; expected a positive number, and even heads")
    angles = sign * np.arange(n)[:, None, None] / float(theta) ** (np.arange(0, size, 2) / size)[None, None]
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _by_function(x: np.ndarray, rope: Any, sign: int) -> np.ndarray:
    places = jnp.arange(x.shape[0])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = np.asarray(rope(jnp.asarray(x), sign * places))
        again = np.asarray(rope(jnp.asarray(made), -sign * places)) if made.shape == x.shape else made
    lengths = lambda y: np.linalg.norm(y, axis=-1)
    same = lambda y, z: np.abs(y - z).max(initial=0) <= 1e-4 * np.abs(z).max(initial=1e-30)
    if made.shape != x.shape or not same(again, x) or not same(lengths(made), lengths(x)):
        raise ValueError(
            f"rope: of keys {x.shape} (n, heads, size) and positions (n,) it makes {made.shape}, and keys change their "
            "lengths, or negative positions do not turn them back; expected a rotation"
        )
    return made
