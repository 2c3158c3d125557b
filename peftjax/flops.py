"""Counts the products of a program: exact, the same on every backend, and with loops in full."""

import math
from typing import Any, Callable

import jax


def flops(fn: Callable[..., Any], *args: Any) -> int:
    """The floating-point operations of a function's products and convolutions, twice their multiplications.

    Elementwise work is not counted. A scan counts as often as it runs, a branch as its dearest one, and a loop without
    a known number of steps once. What `jax.checkpoint` computes again is counted again.

    Args:
      fn: the function; a train step, with its gradients inside.
      *args: its arguments; abstract arrays serve.

    Returns:
      The number, of all devices together.

    Example:
      >>> import jax.numpy as jnp
      >>> flops(lambda x, w: x @ w, jnp.ones((2, 3)), jnp.ones((3, 4)))
      48
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * _size(eqn.outvars[0]) * math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
        return 2 * _size(eqn.outvars[0]) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    if name in ("ragged_dot", "ragged_dot_general"):
        rows, width = eqn.invars[0].aval.shape[-2:]
        return 2 * rows * width * eqn.outvars[0].aval.shape[-1]
    bodies = map(_body, jax.tree.leaves(list(params.values()), is_leaf=lambda x: _body(x) is not None))
    inner = [_count(body) for body in bodies if body is not None]
    if name == "scan":
        return params["length"] * sum(inner)
    return max(inner, default=0) if name == "cond" else sum(inner)


def _body(x: Any) -> Any:
    """The equations that a parameter holds, or None."""
    x = getattr(x, "jaxpr", x)
    return x if hasattr(x, "eqns") else None


def _size(var: Any) -> int:
    return math.prod(var.aval.shape)
