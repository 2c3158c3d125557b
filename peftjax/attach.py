"""One line from a model to a tuned model."""

from typing import Any, Callable, Mapping

import jax

from peftjax.evaluate import wrap
from peftjax.method import Method
from peftjax.overlay import short
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
    `*args`; one that is keyword-only, under another name: `lambda params, x, rng: model(params, x, key=rng)`. `apply` has
    no arguments of its own: there, `key=` and `tokens=` are the model's.

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
      TypeError: `tokens` is no mapping of options, such as an array meant for the model, or holds an unknown one.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
      >>> apply, tuned = pj.attach(pj.lora(rank=2), fn, params, jnp.ones((1, 3)), key=jax.random.key(0))
      >>> apply(tuned, jnp.ones((1, 3))).shape
      (1, 2)

    Virtual tokens, of which the caller sees nothing:
      >>> def fn(p, input_ids, attention_mask):
      ...     x = p["words"][input_ids]
      ...     scores = jnp.where(attention_mask[:, None] > 0, x @ (x @ p["key"]).mT, -1e9)
      ...     return jax.nn.softmax(scores) @ (x @ p["value"])
      >>> params = {"words": jnp.ones((5, 2)), "key": jnp.ones((2, 2)), "value": jnp.ones((2, 3))}
      >>> ids, mask = jnp.array([[1, 2, 3]]), jnp.ones((1, 3))
      >>> apply, tuned = pj.attach(pj.prefix(4), fn, params, ids, mask, key=jax.random.key(0), tokens={"side": "last"})
      >>> tuned["value"], apply(tuned, ids, mask).shape
      (Prefix(float32[2,3], length=4), (1, 3, 3))
    """
    if tokens is not None and not isinstance(tokens, Mapping):
        raise TypeError(
            f"attach: tokens={short(tokens) if hasattr(tokens, 'shape') else repr(tokens)}; expected the options of "
            "`peftjax.wrap_tokens`, such as {}. Is it an argument of the model? That is given by its place, not by name"
        )
    run = wrap(fn) if tokens is None else wrap_tokens(fn, **tokens)
    return run, method.init(key, params, roles(fn, params, *args, **kwargs))
