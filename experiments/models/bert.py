"""BERT (Devlin et al. 2018, arXiv 1810.04805) in Flax Linen, with the parameter names of Hugging Face.

A leaf is called as in their Flax models: `bert/encoder/layer/0/attention/self/query/kernel`. Shapes: B examples,
T tokens, D features, H heads of K features.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "relu": nn.relu,
}
POOLS = ("mean", "first", "each")
Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.02))
Embed = functools.partial(nn.Embed, embedding_init=nn.initializers.normal(0.02))

# Where a kernel lies on a mesh: attention's heads and the width of feed-forward over "model".
RULES = (
    (r".*/(query|key|value|intermediate/dense)/kernel", PartitionSpec("fsdp", "model")),
    (r".*/(query|key|value|intermediate/dense)/bias", PartitionSpec("model")),
    (r".*/output/dense/kernel", PartitionSpec("model", "fsdp")),
    (r".*/word_embeddings/embedding", PartitionSpec("model", "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a checkpoint's `config.json` says of the model, in its words."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.type is int and not (type(size) is int and size > 0):
                raise ValueError(f"{field.name} {size!r}; expected a whole number, 1 at least")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r}; expected one of {', '.join(ACTIVATIONS)}")


def read_config(path: str | Path) -> Config:
    """The configuration in a `config.json`.

    Raises:
      ValueError: a damaged file, another architecture, or a size that is missing.
    """
    try:
        page = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(page, dict):
        raise ValueError(f"{path} is damaged: expected an object, found {str(page)[:40]}")
    found = page.get("model_type"), page.get("position_embedding_type", "absolute")
    if found != ("bert", "absolute"):
        raise ValueError(f"{path} describes {found[0]!r} with {found[1]} positions; expected 'bert' with absolute ones")
    needed = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(Config)}
    if missing := [name for name in needed if needed[name] and name not in page]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        return Config(**{name: page[name] for name in needed if name in page})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class Embeddings(nn.Module):
    """Words, positions and segments, summed and normalised."""

    config: Config

    @nn.compact
    def __call__(self, ids: jax.Array, segments: jax.Array, positions: jax.Array, train: bool) -> jax.Array:
        c = self.config
        words = Embed(c.vocab_size, c.hidden_size, name="word_embeddings")(ids)  # (B, T, D)
        places = Embed(c.max_position_embeddings, c.hidden_size, name="position_embeddings")(positions)
        kinds = Embed(c.type_vocab_size, c.hidden_size, name="token_type_embeddings")(segments)
        x = nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(words + places + kinds)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic=not train)


class SelfAttention(nn.Module):
    """`softmax(Q K' / sqrt(K) + mask) V`, per head."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        c = self.config
        heads = lambda y: y.reshape(*y.shape[:2], c.num_attention_heads, -1)  # (B, T, H, K)
        q, k, v = (heads(Dense(c.hidden_size, name=name)(x)) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhk,bthk->bhqt", q, k) / q.shape[-1] ** 0.5
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(scores.dtype).min)
        weights = nn.Dropout(c.attention_probs_dropout_prob)(nn.softmax(scores), deterministic=not train)
        return jnp.einsum("bhqt,bthk->bqhk", weights, v).reshape(x.shape)


class Output(nn.Module):
    """A linear layer back to the stream, added to it, and the norm that follows."""

    config: Config

    @nn.compact
    def __call__(self, y: jax.Array, stream: jax.Array, train: bool) -> jax.Array:
        c = self.config
        y = nn.Dropout(c.hidden_dropout_prob)(Dense(c.hidden_size, name="dense")(y), deterministic=not train)
        return nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(stream + y)


class Attention(nn.Module):
    """Self-attention and its output."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        y = SelfAttention(self.config, name="self")(x, mask, train)
        return Output(self.config, name="output")(y, x, train)


class Intermediate(nn.Module):
    """The wide layer between."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.hidden_act](Dense(self.config.intermediate_size, name="dense")(x))


class Layer(nn.Module):
    """One transformer layer, normalised after each residual."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        x = Attention(self.config, name="attention")(x, mask, train)
        return Output(self.config, name="output")(Intermediate(self.config, name="intermediate")(x), x, train)


class Layers(nn.Module):
    """The layers, called "0", "1", ..."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=str(i))(x, mask, train)
        return x


class Encoder(nn.Module):
    """The scope that holds the layers."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        return Layers(self.config, name="layer")(x, mask, train)


class Pooler(nn.Module):
    """The first token, through a layer of its own."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(Dense(self.config.hidden_size, name="dense")(x[:, 0]))


class Bert(nn.Module):
    """Token ids to features: `(hidden (B, T, D), pooled (B, D))`, or twice the hidden ones.

    Attributes:
      config: its sizes.
      pool: "mean" averages over the tokens, as sentence encoders do; "first" is BERT's pooler, with a layer of its own;
        "each" leaves every token as it is.
    """

    config: Config
    pool: str = "mean"

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array,
        segments: jax.Array | None = None,
        train: bool = False,
        positions: jax.Array | None = None,
        pool_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The features of `ids` (B, T) where `mask` (B, T) is 1; with `train`, dropout draws from the rng "dropout".

        `segments` (B, T) are 0, `positions` (B, T) are 0, 1, ..., and the mean is over the tokens of `mask`, where
        others are not given.
        """
        c = self.config
        if ids.ndim != 2 or ids.shape != mask.shape or ids.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"ids {ids.shape}, mask {mask.shape}: expected (B, T) of both, T <= {c.max_position_embeddings}"
            )
        segments = jnp.zeros_like(ids) if segments is None else segments
        positions = jnp.arange(ids.shape[1])[None] if positions is None else positions
        x = Embeddings(c, name="embeddings")(ids, segments, positions, train)
        x = Encoder(c, name="encoder")(x, mask, train)
        if self.pool == "each":
            return x, x
        return x, Pooler(c, name="pooler")(x) if self.pool == "first" else mean(
            x, mask if pool_mask is None else pool_mask
        )


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The average of `x` (B, T, D) over the tokens where `mask` (B, T) is 1."""
    w = mask.astype(x.dtype)[:, :, None]
    return (x * w).sum(1) / jnp.maximum(w.sum(1), 1)


class Classifier(nn.Module):
    """BERT and a linear head, which begins at zero: the untrained model is then the same whatever the seed."""

    config: Config
    outputs: int
    pool: str = "mean"

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array,
        segments: jax.Array | None = None,
        train: bool = False,
        positions: jax.Array | None = None,
        pool_mask: jax.Array | None = None,
    ) -> jax.Array:
        """The head's outputs, (B, outputs); (B, T, outputs) for the pool "each"."""
        body = Bert(self.config, self.pool, name="bert")
        pooled = nn.Dropout(self.config.hidden_dropout_prob)(
            body(ids, mask, segments, train, positions, pool_mask)[1], deterministic=not train
        )
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="classifier")(pooled)
