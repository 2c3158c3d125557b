"""P-tuning: embeddings of virtual tokens that a small network makes."""

from typing import Any

import jax
import jax.numpy as jnp

from peftjax.method import Leaf, Method, method
from peftjax.overlay import overlay, trained
from peftjax.targets import Targets
from peftjax.token_table import Prompt, VirtualRows, at_table, check_length


@overlay
class PTuning(VirtualRows):
    """`scale relu(relu(E W1 + b1) W2 + b2) W3 + b3` below the table's rows."""

    embedding: Any = trained()
    w1: Any = trained()
    b1: Any = trained()
    w2: Any = trained()
    b2: Any = trained()
    w3: Any = trained()
    b3: Any = trained()

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """What the network puts out has the features of the table's rows; the rest is its own."""
        inner = {"w1": ("width", "hidden"), "b1": ("hidden",), "w2": ("hidden", "hidden_2"), "b2": ("hidden_2",)}
        return {"embedding": ("rows", "width"), **inner, "w3": ("hidden_2", (1,)), "b3": ((1,),), "scale": ()}

    def rows(self) -> Any:
        """The rows, (n, D)."""
        h = jax.nn.relu(self.embedding @ self.w1 + self.b1[None])
        h = jax.nn.relu(h @ self.w2 + self.b2[None])
        return self.scale * (h @ self.w3 + self.b3[None])

    def folded(self) -> Prompt:
        """The rows themselves, without the network."""
        return Prompt(base=self.base, prompt=self.replace(scale=1.0).rows(), scale=self.scale, length=self.length)


@method
def p_tuning(length: int = 20, hidden: int = 128, *, encoder: str = "mlp", targets: Targets | None = None) -> Method:
    """Trains a network that makes the embeddings of virtual tokens: `P = relu(relu(E W1 + b1) W2 + b2) W3 + b3`.

    The model runs through `peftjax.wrap_tokens`. Once trained, `peftjax.fold` keeps P alone, as `prompt` holds it.

    Args:
      length: how many virtual tokens n; E is (n, D), all float32. 20 as for `peftjax.prompt`, to compare.
      hidden: the width h of the network's two hidden layers, which costs D h + h h + h D weights while it trains: 128
        keeps that small beside a table.
      encoder: "mlp", the network above, and the only one there is.
      targets: the table of embeddings; None finds it by the roles, where the model looks up one table only.

    Returns:
      The method. E starts N(0, 1), the weights uniform in +-1/sqrt(inputs), the biases 0.

    Raises:
      ValueError: a length or a width below 1, an unknown encoder, no table, or more than one, neither roles nor targets,
        a table that has virtual tokens already.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.p_tuning(3, 4, targets="words").init(jax.random.key(0), {"words": jnp.ones((5, 2))})
      >>> tuned["words"], pj.fold(tuned)["words"]
      (PTuning(float32[5,2], length=3), Prompt(float32[5,2], length=3))

    Reference: Liu et al. 2021, arXiv 2103.10385, whose network is an LSTM and two layers; HF peft offers both, and only
    P is kept in its files.
    """
    check_length("p_tuning", length)
    if hidden < 1:
        raise ValueError(f"p_tuning: expected a hidden width of at least 1, found {hidden}")
    if encoder != "mlp":
        raise ValueError(f"p_tuning: unknown encoder {encoder!r}; expected 'mlp'")

    def make(leaf: Leaf) -> PTuning:
        width = leaf.type.shape[1]
        keys = jax.random.split(leaf.key, 4)
        uniform = lambda key, n, m: jax.random.uniform(key, (n, m), jnp.float32, -(n**-0.5), n**-0.5)
        return PTuning(
            base=leaf.value,
            embedding=jax.random.normal(keys[0], (length, width), jnp.float32),
            w1=uniform(keys[1], width, hidden),
            b1=jnp.zeros(hidden, jnp.float32),
            w2=uniform(keys[2], hidden, hidden),
            b2=jnp.zeros(hidden, jnp.float32),
            w3=uniform(keys[3], hidden, width),
            b3=jnp.zeros(width, jnp.float32),
            scale=jnp.ones((), jnp.float32),
            length=length,
        )

    return at_table("p_tuning", make, targets)
