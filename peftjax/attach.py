"""One line from a model to a tuned model."""

from typing import Any, Callable, Mapping

import jax

from peftjax.evaluate import wrap
from peftjax.method import Method
from peftjax.roles import roles
from peftjax.tokens import wrap_tokens


def attach(
    method: Method,
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    key: jax.Array,
    tokens: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Callable[..., Any], Any]:
    """Finds the roles of a model's parameters, applies a method, and wraps the model.

    Args:
      method: what to apply, such as `peftjax.lora()`.
      fn: the model, `fn(params, *args, **kwargs)`: any function that `jax.jit` could trace.
      params: its pretrained parameters; they stay as they are.
      *args, **kwargs: an example batch; abstract arrays (`jax.ShapeDtypeStruct`) serve as well.
      key: a PRNG key for what the method draws.
      tokens: for methods with virtual tokens, the options of `peftjax.wrap_tokens`; `{}` takes the usual names.

    Returns:
      `(apply, tuned)`: `apply(tuned, *args, **kwargs)` is the tuned model.

    Raises:
      ValueError: a target that matches nothing, or a leaf that the method cannot tune.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
      >>> apply, tuned = pj.attach(pj.lora(rank=2), fn, params, jnp.ones((1, 3)), key=jax.random.key(0))
      >>> apply(tuned, jnp.ones((1, 3))).shape
      (1, 2)
    """
    run = wrap(fn) if tokens is None else wrap_tokens(fn, **tokens)
    return run, method.init(key, params, roles(fn, params, *args, **kwargs))
