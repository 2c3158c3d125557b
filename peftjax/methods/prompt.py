"""Prompt tuning: trained embeddings of virtual tokens."""

from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.method import Leaf, Method, method
from peftjax.targets import Targets
from peftjax.token_table import Prompt, at_table, check_length


@method
def prompt(
    length: int = 20,
    *,
    init: str = "vocabulary",
    ids: Sequence[int] | None = None,
    targets: Targets | None = None,
) -> Method:
    """Trains the embeddings of virtual tokens: the model reads `[P; E(x)]`, and everything else is frozen.

    The model runs through `peftjax.wrap_tokens`, which inserts the virtual tokens and takes their rows out again.

    Args:
      length: how many virtual tokens n; P is (n, D), float32. 20 serves most tasks; the paper goes up to 100.
      init: "vocabulary" (the embeddings of n random ids, all different where the vocabulary allows it: the start that
        trains best of those without a text) or "random" (normal, with the deviation of the table's own entries; rows
        far longer than the model has ever read train badly).
      ids: starts from the embeddings of a text instead: its ids, repeated or cut to n. A text that says the task helps.
      targets: the table of embeddings; None finds it by the roles, where the model looks up one table only.

    Returns:
      The method.

    Raises:
      ValueError: a length below 1, an unknown init, ids outside the vocabulary, no table, or more than one, neither
        roles nor targets, a table that has virtual tokens already.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, input_ids, attention_mask: params["words"][input_ids] * attention_mask[..., None]
      >>> params = {"words": jnp.ones((5, 2))}
      >>> ids, mask = jnp.array([[1, 2, 3]]), jnp.ones((1, 3))
      >>> tokens = {"side": "first"}
      >>> apply, tuned = pj.attach(pj.prompt(2), fn, params, ids, mask, key=jax.random.key(0), tokens=tokens)
      >>> tuned["words"], apply(tuned, ids, mask).shape
      (Prompt(float32[5,2], length=2), (1, 3, 2))

    Reference: Lester et al. 2021, arXiv 2104.08691. HF peft's random start is N(0, 1), whatever the table holds.
    """
    check_length("prompt", length)
    if init not in ("vocabulary", "random"):
        raise ValueError(f"prompt: unknown init {init!r}; expected 'vocabulary' or 'random', or ids=...")
    text = None if ids is None else np.asarray(ids)
    if text is not None and (text.ndim != 1 or not text.size or not np.issubdtype(text.dtype, np.integer)):
        raise ValueError(f"prompt: ids={ids!r}; expected a sequence of integers, the ids of a text")

    def make(leaf: Leaf) -> Prompt:
        table = leaf.dense.astype(jnp.float32)
        if text is not None and not ((0 <= text) & (text < len(table))).all():
            raise ValueError(
                f"prompt: ids from {text.min()} to {text.max()} at {leaf.path}, which has {len(table)} rows"
            )
        if text is not None:
            rows = table[jnp.asarray(np.resize(text, length))]
        elif init == "vocabulary":
            rows = table[jax.random.choice(leaf.key, len(table), (length,), replace=length > len(table))]
        else:
            rows = jnp.std(table) * jax.random.normal(leaf.key, (length, table.shape[1]), jnp.float32)
        return Prompt(base=leaf.value, prompt=rows, scale=jnp.ones((), jnp.float32), length=length)

    return at_table("prompt", make, targets)
