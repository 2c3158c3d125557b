"""A decoder of the Llama family (Touvron et al. 2023, arXiv 2302.13971) in Flax Linen, its layers stacked by `nn.scan`.

Leaves are called as in Hugging Face's checkpoints, with the layers of one stack in one leaf:
`model/layers/self_attn/q_proj/kernel` is (layers, D, H * K). Shapes: B examples, T tokens, D features, H heads of K
features, G heads of keys and values.
"""

import math
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.models.decoder_config import Config, read_config
from peftjax.plan import Planned
from peftjax.sharding_rules import by_rules, within

# Where a leaf lies on a mesh: heads and the width of feed-forward over "model", the other side over "fsdp".
RULES = (
    (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel", PartitionSpec(None, "fsdp", "model")),
    (r".*/(o_proj|down_proj)/kernel", PartitionSpec(None, "model", "fsdp")),
    (r"model/embed_tokens/embedding", PartitionSpec("model", "fsdp")),
    (r"lm_head/kernel", PartitionSpec("fsdp", "model")),
)
# What a layer keeps for its backward pass, by the name of its part, where it does not compute everything again.
PARTS = ("q_proj", "k_proj", "v_proj", "attention", "o_proj", "gate_proj", "up_proj", "down_proj")
REMAT = {
    "layers": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.save_only_these_names(*PARTS),
    "none": None,
}


def frequencies(c: Config) -> jax.Array:
    """The angle by which each pair of features turns from one position to the next, (K / 2,)."""
    found = c.rope_theta ** (-jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
    if c.rope_scaling is None:
        return found
    s = dict(c.rope_scaling)
    old, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    turns = old * found / (2 * math.pi)
    smooth = jnp.clip((turns - low) / (high - low), 0, 1)
    return found * (smooth + (1 - smooth) / s["factor"])


def rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """x (B, T, H, K) with each pair of features, half a head apart, turned by its angle (T, K / 2)."""
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class RMSNorm(nn.Module):
    """`x / sqrt(mean x^2 + eps) * weight`, in float32."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (B, T, D)
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:], self.config.dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return weight[None, None] * wide.astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, block: int) -> jax.Array:
    """Causal attention, (B, T, H, K) from q and k, v (B, T, G, K): what a block of queries may not see is left out.

    That is close to half of the products, and no (T, T) array is formed.
    """
    t = q.shape[1]
    if t <= block:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    ends = [(start, min(start + block, t)) for start in range(0, t, block)]
    sees = lambda start, end: (jnp.arange(end)[None] <= jnp.arange(start, end)[:, None])[None, None]
    some = lambda start, end: jax.nn.dot_product_attention(
        q[:, start:end], k[:, :end], v[:, :end], mask=sees(start, end)
    )
    return jnp.concatenate([some(*at) for at in ends], 1)


def _dense(c: Config, features: int, name: str) -> Callable[[jax.Array], jax.Array]:
    made = nn.Dense(features, use_bias=False, dtype=c.dtype, param_dtype=c.dtype, name=name)
    return lambda x: checkpoint_name(made(x), name)


class Attention(nn.Module):
    """Causal attention, rotary, with fewer heads of keys and values."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (B, T, D)
        c, (b, t, d) = self.config, x.shape
        heads = lambda name, n: _dense(c, n * c.head_dim, name)(x).reshape(b, t, n, c.head_dim)
        angles = jnp.arange(t, dtype=jnp.float32)[:, None] * frequencies(c)[None]
        q = rotated(heads("q_proj", c.num_attention_heads), angles)
        k = rotated(heads("k_proj", c.num_key_value_heads), angles)
        y = attention(q, k, heads("v_proj", c.num_key_value_heads), c.block)
        return _dense(c, d, "o_proj")(checkpoint_name(y, "attention").reshape(b, t, -1))


class FeedForward(nn.Module):
    """`down(silu(gate x) * up x)`."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (B, T, D)
        c = self.config
        gate, up = (_dense(c, c.intermediate_size, name)(x) for name in ("gate_proj", "up_proj"))
        return _dense(c, c.hidden_size, "down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    """Attention, then feed-forward, each added to the stream."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:  # (B, T, D)
        c = self.config
        x = x if c.stream is None else jax.lax.with_sharding_constraint(x, c.stream)
        x = x + Attention(c, name="self_attn")(RMSNorm(c, name="input_layernorm")(x))
        return x + FeedForward(c, name="mlp")(RMSNorm(c, name="post_attention_layernorm")(x)), None


class Model(nn.Module):
    """The decoder without its head."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.dtype)
        layer = Layer if REMAT[c.remat] is None else nn.remat(Layer, prevent_cse=False, policy=REMAT[c.remat])
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_hidden_layers)
        self.layers, self.norm = stack(c), RMSNorm(c)

    def __call__(self, ids: jax.Array) -> jax.Array:  # (B, T) -> (B, T, D)
        return self.norm(self.layers(self.embed_tokens(ids), None)[0])


class Decoder(nn.Module):
    """Logits (B, T, vocabulary) of the token after each."""

    config: Config

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:  # (B, T)
        model = Model(self.config, name="model")
        x = model(ids)
        if self.config.tie_word_embeddings:
            return model.embed_tokens.attend(x)
        return _dense(self.config, self.config.vocab_size, "lm_head")(x)


def next_token_loss(logits: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed cross-entropy of every token but the first, and how many these are."""
    wide = logits[:, :-1].astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(wide, batch["ids"][:, 1:])
    return each.sum(), {"weight": jnp.float32(each.size)}


def planned(path: str, mesh: Mesh, examples: int, length: int, remat: str) -> Planned:
    """The model of a `config.json`, without weights, for `python -m peftjax.plan`.

    Raises:
      ValueError: a page that is none, or a `remat` that is none of `REMAT`.
    """
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}; expected one of {', '.join(REMAT)}")
    axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
    config = read_config(path, remat=remat, stream=NamedSharding(mesh, PartitionSpec(axes)))
    model, ids = Decoder(config), jax.ShapeDtypeStruct((examples, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    rules = [(pattern, spec) for pattern, spec in RULES if "lm_head" in params or not pattern.startswith("lm_head")]
    return Planned(
        fn=lambda params, batch: model.apply({"params": params}, batch["ids"]),
        params=params,
        batch={"ids": ids},
        specs=by_rules(within(rules, mesh), params, mesh),
        loss=next_token_loss,
    )
