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

    `key` and `tokens` are attach's own, and never reach `fn`. A model's argument of either name is given by its place in
    `*args`, or bound in `fn`: `lambda params, x: model(params, x, key=model_key)`. `apply` has no arguments of its own:
    there, `key=` and `tokens=` are the model's.

    Args:
      method: what to apply, such as `peftjax.lora()`.
      fn: the model, `fn(params, *args, **kwargs)`: any function that `jax.jit` could trace.
      params: its pretrained parameters; they stay as they are.
      *args, **kwargs: an example batch; abstract arrays (`jax.ShapeDtypeStruct`) serve as well. Its keywords are none of
        `method`, `fn`, `params`, `key` and `tokens`.
      key: a PRNG key for what the method draws at the start. Dropout takes another one at every call, by
        `peftjax.with_key(tuned, key)`.
      tokens: the options of `peftjax.wrap_tokens`, for what acts on tokens: `prompt`, `p_tuning`, `prefix`, and `reft`
        at some positions. `{}` takes the usual names; with None, the default, `peftjax.wrap` runs the model, and refuses
        those at the first call.

    Returns:
      `(apply, tuned)`: `apply(tuned, *args, **kwargs)` is the tuned model.

    Raises:
      ValueError: a target that matches nothing, a leaf that the method cannot tune, or a `side` in `tokens` that is none.
      TypeError: `tokens` is no mapping of options, such as an array meant for the model.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
      >>> apply, tuned = pj.attach(pj.lora(rank=2), fn, params, jnp.ones((1, 3)), key=jax.random.key(0))
      >>> apply(tuned, jnp.ones((1, 3))).shape
      (1, 2)

    Virtual tokens, of which the caller sees nothing:
      >>> fn = lambda params, input_ids, attention_mask: params["words"][input_ids] * attention_mask[..., None]
      >>> ids, mask = jnp.array([[1, 2, 3]]), jnp.ones((1, 3))
      >>> apply, tuned = pj.attach(
      ...     pj.prompt(2), fn, {"words": jnp.ones((5, 2))}, ids, mask, key=jax.random.key(0), tokens={"side": "first"}
      ... )
      >>> tuned["words"], apply(tuned, ids, mask).shape
      (Prompt(float32[5,2], length=2), (1, 3, 2))
    """
    run = wrap(fn) if tokens is None else wrap_tokens(fn, **tokens)
    return run, method.init(key, params, roles(fn, params, *args, **kwargs))
