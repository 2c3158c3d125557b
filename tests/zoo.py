"""MODELS: small models, each with one thing about it that a fine-tuning library gets wrong.

    example = MODELS["linen_dense"].make()
    y = example.fn(example.params, *example.args)

A builder returns an `Example` whose parameters are shapes only; `make` fills them with numbers drawn by path, so that
kernels keep their inputs' size, biases are not zero and scales are not one.

Tags:
  linen, nnx, plain    the framework
  conv, embed          has a convolution, a lookup
  scan, remat, vmap, jit, shard_map    the transformation around the parameters
  stacked              a leaf has a scanned (`s`) or an expert (`b`) axis
  bf16                 bfloat16 parameters or activations
  tied                 one leaf is used more than once
  merges               a weight is used where only the merged array will do
  opaque               the use of a listed leaf cannot be seen in the trace; its axes are what a person would say
  forward_only         has no reverse derivative (a while loop); use `jax.jvp`
  reverse_only         has no forward derivative (a custom_vjp)
  inner_grad           differentiates inside `fn`
  effects              prints in order, so cannot be vmapped
  state                `fn` returns (output, new state)
  batch_last, time_major, folded, channels_first    where features and examples are unusual
  tokens               args start with ids, mask and positions
  residual             has residual blocks
  square               several axes have one size, so that no shape rule can know the roles
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec


class Example(NamedTuple):
    """A function of a parameter pytree, and something to call it on."""

    fn: Callable[..., Any]  # fn(params, *args): pure and jit-able
    params: Any
    args: tuple[Any, ...]  # small arrays; what is not an array is static


@dataclasses.dataclass(frozen=True)
class Model:
    """One row of the table; `axes` has a letter per axis: i in, o out, b batch (expert), s stacked (scan).

    Convolutions: spatial and in-channel axes are `i`. Embeddings: the vocabulary is `i`, the features `o`; a tied leaf
    is named by its lookup. Matrices that `axes` leaves out have no role that a test may rely on.
    """

    name: str
    make: Callable[[], Example]
    axes: Mapping[str, str]
    tags: frozenset[str]
    targets: Any = "all-linear"


MODELS: dict[str, Model] = {}

KERNELS = ".*kernel"


def model(axes: Mapping[str, str], *tags: str, targets: Any = KERNELS):
    """Registers a builder under its own name."""

    def register(build: Callable[[], Example]) -> Callable[[], Example]:
        name = build.__name__
        MODELS[name] = Model(name, lambda: _filled(build(), axes), dict(axes), frozenset(tags), targets)
        return build

    return register


# Trees and numbers


def paths(tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs: keys joined by '/', without the attributes of boxes and Variables."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield path_of(keys), leaf


def path_of(keys: tuple[Any, ...]) -> str:
    named = (getattr(k, "key", getattr(k, "idx", None)) for k in keys if not isinstance(k, jax.tree_util.GetAttrKey))
    return "/".join(str(k) for k in named)


def data(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype))


def ids(*shape: int, vocab: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng((seed, *shape)).integers(0, vocab, shape).astype(np.int32))


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def arrays_only(example: Example) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
    """`fn` of the parameters and of the arguments that are arrays, and those arguments: something to jit."""
    dynamic = [isinstance(arg, jax.Array) for arg in example.args]

    def fn(params, *arrays):
        given = iter(arrays)
        return example.fn(params, *(next(given) if d else arg for d, arg in zip(dynamic, example.args)))

    return fn, tuple(arg for d, arg in zip(dynamic, example.args) if d)


def _filled(example: Example, axes: Mapping[str, str]) -> Example:
    found = dict(paths(example.params))
    assert set(axes) <= set(found), f"no such leaf: {set(axes) - set(found)}; there are {sorted(found)}"
    fill = lambda keys, leaf: _numbers(path_of(keys), leaf, axes.get(path_of(keys)))
    return example._replace(params=jax.tree_util.tree_map_with_path(fill, example.params))


def _numbers(path: str, leaf: jax.ShapeDtypeStruct, axes: str | None) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(zlib.crc32(path.encode()))
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype))
    assert axes is None or len(axes) == len(leaf.shape), (path, axes, leaf.shape)
    noise = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(leaf.shape)
    name = path.split("/")[-1]
    if name in ("scale", "var", "g"):
        noise = 1 + 0.2 * np.abs(noise)
    elif name in ("bias", "mean"):
        noise = 0.2 * noise
    elif axes and name not in ("embedding", "table"):
        noise = noise / np.sqrt(np.prod([n for n, axis in zip(leaf.shape, axes) if axis == "i"]))
    return jax.device_put(noise.astype(leaf.dtype))


def linen(module: nn.Module, *args: Any, **kwargs: Any) -> Example:
    """A Linen module whose variables are `params` alone."""
    shapes = jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))
    assert set(shapes) == {"params"}, set(shapes)
    return Example(lambda params, *args: module.apply({"params": params}, *args, **kwargs), shapes["params"], args)


def graph(build: Callable[[], nnx.Module], *args: Any) -> Example:
    """An NNX module as a function of its whole state."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    return Example(lambda state, *args: nnx.merge(graphdef, state, copy=True)(*args), state, args)


X = data(2, 5, 8)  # (B, T, D)


# Linen layers


@model({"kernel": "io"}, "linen")
def linen_dense():
    return linen(nn.Dense(6), X)


@model({"layers_0/kernel": "io", "layers_2/kernel": "io"}, "linen")
def linen_mlp():
    return linen(nn.Sequential([nn.Dense(12), jnp.tanh, nn.Dense(6)]), X)


@model({"kernel": "iio"}, "linen", "square")
def linen_dense_general():
    return linen(nn.DenseGeneral(4, axis=(-2, -1)), data(2, 5, 4, 4))


@model({"kernel": "ioo"}, "linen", "square")
def linen_dense_general_heads():
    return linen(nn.DenseGeneral((4, 4)), data(2, 5, 4))


@model({"kernel": "bio"}, "linen", "stacked", "square")
def linen_dense_general_batch():
    return linen(nn.DenseGeneral(4, axis=-1, batch_dims=(0,)), data(4, 5, 4))


@model({"kernel": "bio"}, "linen", "stacked")
def linen_einsum():
    return linen(nn.Einsum((3, 8, 6), "btnd,ndh->btnh"), data(2, 5, 3, 8))


@model({"q": "ooio", "gate": "ooi", "down": "io", "out": "iio"}, "linen", "square", targets="all-linear")
def linen_raw_einsums():
    """Parameters that no layer owns: keys, queries and values in one leaf, two gates in another."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.normal()
            q, k, v = jnp.einsum("btd,sndh->sbtnh", x, self.param("q", init, (3, 4, 8, 4)))
            logits = jnp.einsum("btnh,bsnh->bnts", q, k)
            mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)
            x = jnp.einsum("btnh,nhd->btd", mixed, self.param("out", init, (4, 4, 8)))
            gate, up = jnp.einsum("btd,gfd->gbtf", x, self.param("gate", init, (2, 8, 8)))
            return jax.nn.silu(gate) * up @ self.param("down", init, (8, 8))

    return linen(Block(), X)


# Convolutions


@model({"kernel": "iiio"}, "linen", "conv")
def linen_conv():
    return linen(nn.Conv(6, (3, 3)), data(2, 5, 5, 4))


@model({"kernel": "iiio"}, "linen", "conv")
def linen_conv_grouped():
    return linen(nn.Conv(6, (3, 3), feature_group_count=2), data(2, 5, 5, 4))


@model({"kernel": "iiio"}, "linen", "conv")
def linen_conv_dilated():
    return linen(nn.Conv(6, (3, 3), kernel_dilation=2, padding="VALID"), data(2, 7, 7, 4))


@model({"kernel": "iiio"}, "linen", "conv")
def linen_conv_strided():
    return linen(nn.Conv(6, (3, 2), strides=(2, 1)), data(2, 6, 5, 4))


@model({"kernel": "iio"}, "linen", "conv")
def linen_conv_1d():
    return linen(nn.Conv(6, (3,), padding="CAUSAL"), data(2, 5, 4))


@model({"kernel": "iiiio"}, "linen", "conv")
def linen_conv_3d():
    return linen(nn.Conv(6, (2, 2, 2)), data(2, 3, 4, 3, 4))


@model({"kernel": "iiio"}, "linen", "conv")
def linen_conv_transpose():
    return linen(nn.ConvTranspose(6, (3, 3), strides=(2, 2)), data(2, 4, 3, 4))


@model({"kernel": "iioi"}, "linen", "conv", "square")
def linen_conv_transpose_kernel():
    return linen(nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=True), data(2, 4, 3, 4))


@model({"kernel": "oiii", "head": "io"}, "plain", "conv", "channels_first", targets="kernel")
def conv_nchw():
    def fn(p, x):
        x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return jnp.tanh(x + p["bias"][None, :, None, None]).mean((2, 3)) @ p["head"]

    return Example(fn, {"kernel": shape(6, 4, 3, 3), "bias": shape(6), "head": shape(6, 3)}, (data(2, 4, 5, 5),))


@model({"patch/kernel": "iiio", "head/kernel": "io"}, "linen", "conv")
def linen_patches():
    """A convolution as a patch embedding, and a class token that is no kernel."""

    class Patches(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (2, 2), strides=(2, 2), padding="VALID", name="patch")(x)
            token = self.param("cls_token", nn.initializers.normal(), (1, 1, 8))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 8)), x.reshape(len(x), -1, 8)], axis=1)
            return nn.Dense(3, name="head")(jnp.tanh(x).mean(1))

    return linen(Patches(), data(2, 4, 4, 3))


# Embeddings, attention, recurrence


@model({"embed/embedding": "io", "dense/kernel": "io"}, "linen", "embed", "tied", targets="dense")
def linen_embed_attend():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 8, name="embed")
            return embed.attend(jnp.tanh(nn.Dense(8, name="dense")(embed(tokens))))

    return linen(Tied(), ids(2, 5, vocab=11))


ATTENTION = {"query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo", "out/kernel": "iio"}


def under(prefix: str, axes: Mapping[str, str], stacked: Callable[[str], str] = lambda axes: axes) -> dict[str, str]:
    return {f"{prefix}/{path}": stacked(letters) for path, letters in axes.items()}


@model(ATTENTION, "linen", "square")
def linen_attention():
    return linen(nn.MultiHeadDotProductAttention(num_heads=4), data(2, 5, 16))


LSTM_INPUTS = {f"cell/{gate}/kernel": "io" for gate in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")}


@model(LSTM_INPUTS, "linen", "scan", "square")
def linen_lstm():
    return linen(nn.RNN(nn.LSTMCell(8), name="rnn"), X)


@model(LSTM_INPUTS, "linen", "scan", "square", "merges")
def linen_lstm_fused():
    """The cell concatenates its kernels before it uses them."""
    return linen(nn.RNN(nn.OptimizedLSTMCell(8)), X)


# Linen transformations

BLOCK = {**under("attention", ATTENTION), "up/kernel": "io", "down/kernel": "io"}


class Block(nn.Module):
    """A pre-LN block, with every size that can be equal equal."""

    features: int = 16

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm(name="norm_1")(x))
        h = nn.Dense(self.features, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(self.features, name="down")(nn.gelu(h))


class Step(nn.Module):
    """What `nn.scan` wants: a block that carries its stream."""

    block: Any = Block

    @nn.compact
    def __call__(self, x, _):
        return self.block(name="block")(x), None


def stack(block: Any, axis: int = 0, layers: int = 3) -> nn.Module:
    scanned = nn.scan(Step, variable_axes={"params": axis}, split_rngs={"params": True}, length=layers)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scanned(block, name="layers")(x, None)[0]

    return Stack()


def first(letter: str) -> Callable[[str], str]:
    return lambda axes: letter + axes


def second(letter: str) -> Callable[[str], str]:
    return lambda axes: axes[0] + letter + axes[1:]


STREAM = data(2, 4, 16)
dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@model(under("layers/block", BLOCK, first("s")), "linen", "scan", "stacked", "residual", "square", targets="all-linear")
def linen_scan():
    return linen(stack(Block), STREAM)


@model(under("layers/block", BLOCK, second("s")), "linen", "scan", "stacked", "residual", "square", targets="all-linear")
def linen_scan_axis_1():
    class Narrow(Block):  # without the norms, whose only axis would not have a second one
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False, name="attention")
            x = x + attention(x)
            dense = functools.partial(nn.Dense, self.features, use_bias=False)
            return x + dense(name="down")(nn.gelu(dense(name="up")(x)))

    return linen(stack(Narrow, axis=1), STREAM / 4)  # without norms, larger numbers would drown in rounding


@model(under("block", BLOCK), "linen", "remat", "residual", "square", targets="all-linear")
def linen_remat():
    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Block, policy=dots)(name="block")(x)

    return linen(Remat(), STREAM)


@model(under("layers/block", BLOCK, first("s")), "linen", "scan", "remat", "stacked", "residual", "square",
       targets="all-linear")
def linen_scan_remat():
    return linen(stack(nn.remat(Block, policy=dots, prevent_cse=False)), STREAM)


@model({"layers/block/conv/kernel": "siio", "layers/block/mix/kernel": "sio"}, "linen", "scan", "conv", "stacked", "residual")
def linen_scan_conv():
    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.Dense(8, name="mix")(jnp.tanh(nn.Conv(6, (3,), name="conv")(x)))

    return linen(stack(nn.remat(Mixer)), X)


def experts(module: Any, *args: Any, **kwargs: Any) -> nn.Module:
    return nn.vmap(module, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)(*args, **kwargs)


@model({"kernel": "bio"}, "linen", "vmap", "stacked")
def linen_vmap_dense():
    return linen(experts(nn.Dense, 6), data(3, 5, 8))


@model({path: "b" + axes for path, axes in ATTENTION.items()}, "linen", "vmap", "stacked", "square")
def linen_vmap_attention():
    return linen(experts(nn.MultiHeadDotProductAttention, num_heads=4), data(4, 2, 5, 16))


@model({"kernel": "biio"}, "linen", "vmap", "conv", "stacked", "merges")
def linen_vmap_conv():
    """The batching rule makes one grouped convolution of it, on a reshaped kernel."""
    return linen(experts(nn.Conv, 6, (3,)), data(3, 2, 5, 4))


@model({"up/kernel": "io", "down/kernel": "io"}, "linen", "jit", "square")
def linen_jit_class():
    """Two layers of one jitted class, so that the second one may meet the first one's cached trace."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.jit(nn.Dense)
            return dense(8, name="down")(jnp.tanh(dense(8, name="up")(x)))

    return linen(Two(), X)


@model({"up/kernel": "io", "down/kernel": "io"}, "linen", "jit", "square")
def linen_jit_method():
    class Two(nn.Module):
        def setup(self):
            self.up, self.down = nn.Dense(8), nn.Dense(8)

        @nn.jit
        def hidden(self, x):
            return jnp.tanh(self.up(x))

        @nn.jit
        def __call__(self, x):
            return self.down(self.hidden(x))

    return linen(Two(), X)


# Linen: what stands in the tree, and what comes with it


@model({"up/kernel": "io", "down/kernel": "io"}, "linen")
def linen_partitioned():
    """Leaves in `nn.Partitioned` boxes."""

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = lambda *names: nn.with_partitioning(nn.initializers.lecun_normal(), names)
            x = jnp.tanh(nn.Dense(12, kernel_init=boxed(None, "model"), name="up")(x))
            return nn.Dense(6, kernel_init=boxed("model", None), name="down")(x)

    return linen(Boxed(), X)


@model({"up/kernel": "io", "down/kernel": "io"}, "linen")
def linen_frozen_dict():
    example = linen(Mlp(), X)
    return example._replace(params=flax.core.freeze(example.params))


class Mlp(nn.Module):
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        return dense(6, name="down")(jnp.tanh(dense(12, name="up")(x)))


@model({"up/kernel": "io", "down/kernel": "io"}, "linen", "bf16")
def linen_bf16_params():
    return linen(Mlp(param_dtype=jnp.bfloat16), X.astype(jnp.bfloat16))


class Mixed(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, dtype=self.dtype, name="embed")(tokens)
        x = jnp.tanh(nn.Dense(12, dtype=self.dtype, name="up")(x))
        return nn.Dense(6, dtype=self.dtype, name="down")(x)


@model({"up/kernel": "io", "down/kernel": "io", "embed/embedding": "io"}, "linen", "bf16", "embed")
def linen_bf16_compute():
    """float32 parameters, cast before they are used; the table too."""

    return linen(Mixed(jnp.bfloat16), ids(2, 5, vocab=11))


# Models that cast to a narrower type than that of their parameters, as they are in float32.
WIDE = {"linen_bf16_compute": lambda: linen(Mixed(jnp.float32), ids(2, 5, vocab=11))}


@model({"up/kernel": "io", "down/kernel": "io"}, "linen")
def linen_dropout():
    """A typed key and a static flag among the arguments."""

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(nn.Dense(12, name="up")(x)))
            return nn.Dense(6, name="down")(x)

    module = Dropped()
    params = linen(module, X, False).params
    fn = lambda params, x, key, train: module.apply({"params": params}, x, train, rngs={"dropout": key})
    return Example(fn, params, (X, jax.random.key(3), True))


@model({"params/conv/kernel": "iio", "params/head/kernel": "io"}, "linen", "conv", "state")
def linen_batch_stats():
    """`params` and `batch_stats` side by side in the first argument; the new statistics are returned."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Conv(6, (3,), name="conv")(x))
            return nn.Dense(3, name="head")(jnp.tanh(x))

    module = Normed()
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)
    return Example(lambda variables, x: module.apply(variables, x, mutable=["batch_stats"]), shapes, (X,))


# NNX


@model({"kernel": "io"}, "nnx")
def nnx_linear():
    return graph(lambda: nnx.Linear(8, 6, rngs=nnx.Rngs(0)), X)


@model({"kernel": "iioo"}, "nnx", "square")
def nnx_linear_general():
    return graph(lambda: nnx.LinearGeneral((4, 4), (4, 4), axis=(-2, -1), rngs=nnx.Rngs(0)), data(2, 5, 4, 4))


@model({"kernel": "iiio"}, "nnx", "conv")
def nnx_conv():
    return graph(lambda: nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0)), data(2, 5, 5, 4))


@model({"layers/0/kernel": "io", "layers/1/kernel": "io"}, "nnx", "state")
def nnx_batch_norm_dropout():
    """Statistics and random counts live in the state, which is returned."""

    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)])
            self.norm, self.dropout = nnx.BatchNorm(12, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.layers[1](self.dropout(jnp.tanh(self.norm(self.layers[0](x)))))

    graphdef, state = nnx.split(nnx.eval_shape(lambda: Normed(nnx.Rngs(0))))

    def fn(state, x):
        module = nnx.merge(graphdef, state, copy=True)  # else it writes into the caller's state
        return module(x), nnx.state(module)

    return Example(fn, state, (X,))


@model(ATTENTION, "nnx", "square")
def nnx_attention():
    build = lambda: nnx.MultiHeadAttention(num_heads=4, in_features=16, decode=False, rngs=nnx.Rngs(0))
    return graph(build, data(2, 5, 16))


@model({"layers/up/kernel": "sio", "layers/down/kernel": "sio"}, "nnx", "scan", "stacked", "residual", "square",
       targets="all-linear")
def nnx_scan():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return x + self.down(jnp.tanh(self.up(x)))

    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(splits=3)(nnx.vmap(Layer, in_axes=(0,), out_axes=0))
            self.layers = make(rngs)

        def __call__(self, x):
            step = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            return step(self.layers, x)

    return graph(lambda: Stack(nnx.Rngs(0)), X)


# Plain JAX: where the weight stands

W1, W2 = {"w1": shape(8, 12), "w2": shape(12, 6)}, {"w1": "io", "w2": "io"}


@model({"0/0": "io", "1/0": "io"}, "plain", targets=".*/0")
def plain_list():
    """A list of (weight, bias) pairs."""

    def fn(layers, x):
        for w, b in layers:
            x = jnp.tanh(x @ w + b[None, None])
        return x

    return Example(fn, [(shape(8, 12), shape(12)), (shape(12, 6), shape(6))], (X,))


@model({"w1": "oi", "w2": "oi"}, "plain", "batch_last", "square", targets="w.")
def weight_on_the_left():
    return Example(lambda p, x: p["w2"] @ jnp.tanh(p["w1"] @ x + p["bias"][:, None]),
                   {"w1": shape(8, 8), "w2": shape(6, 8), "bias": shape(8)}, (data(8, 5),))


@model({"w1": "oi", "w2": "oi"}, "plain", "square", targets="w.")
def transposed_kernel():
    return Example(lambda p, x: jnp.tanh(x @ p["w1"].T) @ p["w2"].T, {"w1": shape(8, 8), "w2": shape(6, 8)}, (X,))


@model({"w": "io"}, "plain", "merges", targets="w")
def weight_norm():
    """w is normalised by itself, then scaled by g."""

    def fn(p, x):
        return x @ (p["w"] * (p["g"] * lax.rsqrt(jnp.sum(p["w"] ** 2, 0)))[None])

    return Example(fn, {"w": shape(8, 6), "g": shape(6)}, (X,))


@model({"w": "io"}, "plain", "merges", targets="w")
def scaled_weight():
    return Example(lambda p, x: x @ (p["w"] * p["g"][None]), {"w": shape(8, 6), "g": shape(6)}, (X,))


@model({"w": "io"}, "plain", "tied", "square", targets="w")
def used_twice():
    return Example(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": shape(8, 8)}, (X,))


@model({"w": "io"}, "plain", "tied", "square", targets="w")
def used_both_ways():
    return Example(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": shape(8, 8)}, (X,))


@model({"w": "sio", "v": "io"}, "plain", "scan", "stacked", "tied", "square", targets="[wv]")
def used_in_two_scans():
    """w is scanned over twice, once backwards; v is a constant of both loops."""

    def fn(p, x):
        step = lambda x, w: (x + jnp.tanh(x @ w) @ p["v"], None)
        return lax.scan(step, lax.scan(step, x, p["w"])[0], p["w"], reverse=True)[0]

    return Example(fn, {"w": shape(3, 8, 8), "v": shape(8, 8)}, (X,))


@model({"w1": "io", "w2": "io"}, "plain", "square", targets="w.")
def plain_recurrence():
    """Constants of a loop over time, which is unrolled by two."""

    def fn(p, x):
        step = lambda h, x: (jnp.tanh(x @ p["w1"] + h @ p["w2"]),) * 2
        return lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1), unroll=2)[1]

    return Example(fn, {"w1": shape(8, 8), "w2": shape(8, 8)}, (X,))


# Plain JAX: inside control flow and custom rules


@model({"w1": "io", "w2": "io"}, "plain", "square", targets="w.")
def inside_cond():
    """Each branch uses one of the weights, and both use the second."""

    def fn(p, x):
        left = lambda x: jnp.tanh(x @ p["w1"]) @ p["w2"]
        right = lambda x: jnp.cos(x @ p["w2"])
        return lax.cond(x[0, 0, 0] < 100, left, right, x)

    return Example(fn, {"w1": shape(8, 8), "w2": shape(8, 8)}, (X,))


@model({"w": "io"}, "plain", "forward_only", "square", targets="w")
def inside_while():
    """w is a constant of the loop."""

    def fn(p, x):
        body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]) + x)
        return lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]

    return Example(fn, {"w": shape(8, 8)}, (X,))


@model({"w": "io"}, "plain", "forward_only", "merges", "opaque", "square", targets="w")
def carried_by_while():
    """w changes as the loop goes on."""

    def fn(p, x):
        body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]) + x, 0.5 * c[2])
        return lax.while_loop(lambda c: c[0] < 3, body, (0, x, p["w"]))[1]

    return Example(fn, {"w": shape(8, 8)}, (X,))


@jax.custom_vjp
def _clipped_product(x, w):
    return x @ w


def _clipped_forward(x, w):
    return x @ w, (x, w)


def _clipped_backward(saved, dy):
    x, w = saved
    dy = jnp.clip(dy, -0.5, 0.5)
    return dy @ w.T, jnp.tensordot(x, dy, ((0, 1), (0, 1)))


_clipped_product.defvjp(_clipped_forward, _clipped_backward)


@model({"w": "io", "w2": "io"}, "plain", "merges", "reverse_only", targets="w2?")
def inside_custom_vjp():
    """A backward pass that autodiff would not find, so it must be kept."""
    return Example(lambda p, x: jnp.tanh(_clipped_product(x, p["w"])) @ p["w2"],
                   {"w": shape(8, 12), "w2": shape(12, 6)}, (X,))


@jax.custom_jvp
def _half_product(x, w):
    return x @ w


@_half_product.defjvp
def _half_tangent(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 0.5 * (dx @ w + x @ dw)


@model({"w": "io", "w2": "io"}, "plain", "merges", targets="w2?")
def inside_custom_jvp():
    return Example(lambda p, x: jnp.tanh(_half_product(x, p["w"])) @ p["w2"],
                   {"w": shape(8, 12), "w2": shape(12, 6)}, (X,))


def _two_devices() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), ("mesh",))


@model(W2, "plain", "shard_map", "merges", targets="w.")
def inside_shard_map():
    """Examples are split over two devices; the weights are whole on both."""
    local = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]
    split = PartitionSpec("mesh")

    def fn(p, x):
        return jax.shard_map(local, mesh=_two_devices(), in_specs=(PartitionSpec(), split), out_specs=split)(p, x)

    return Example(fn, W1, (X,))


@model(W2, "plain", "shard_map", "merges", targets="w.")
def inside_shard_map_split():
    """The weights are split over two devices: the first by columns, the second by rows."""

    def local(w1, w2, x):
        return lax.psum(jnp.tanh(x @ w1) @ w2, "mesh")

    def fn(p, x):
        specs = (PartitionSpec(None, "mesh"), PartitionSpec("mesh"), PartitionSpec())
        mapped = jax.shard_map(local, mesh=_two_devices(), in_specs=specs, out_specs=PartitionSpec())
        return mapped(p["w1"], p["w2"], x)

    return Example(fn, W1, (X,))


# Plain JAX: what is data, and where its axes are


@model({"wq": "io", "wk": "io", "wv": "io"}, "plain", "square", targets="w.")
def learned_queries():
    """The queries are a parameter: what wq multiplies depends on no data, and is an activation all the same."""

    def fn(p, x):
        q, k, v = p["queries"] @ p["wq"], x @ p["wk"], x @ p["wv"]
        return jnp.einsum("qt,td->qd", jax.nn.softmax(q @ k.T), v)

    weights = {name: shape(8, 8) for name in ("wq", "wk", "wv")}
    return Example(fn, {"queries": shape(4, 8), **weights}, (data(5, 8),))


def _attend(q, k, v):
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v


@model({"qkv": "io", "out": "io"}, "plain", targets="all-linear")
def fused_qkv():
    """One kernel for queries, keys and values; its output is split."""
    return Example(lambda p, x: _attend(*jnp.split(x @ p["qkv"] + p["bias"][None, None], 3, axis=-1)) @ p["out"],
                   {"qkv": shape(8, 24), "bias": shape(24), "out": shape(8, 8)}, (X,))


@model({"qkv": "io", "out": "io"}, "plain", "tied", targets=("qkv", "out"))
def fused_qkv_slices():
    """One kernel for queries, keys and values; the kernel is split."""

    def fn(p, x):
        q, k, v = (x @ p["qkv"][:, 8 * i : 8 * (i + 1)] for i in range(3))
        return _attend(q, k, v) @ p["out"]

    return Example(fn, {"qkv": shape(8, 24), "out": shape(8, 8)}, (X,))


@model({"wk": "io", "wv": "io", "wo": "io"}, "plain", "time_major", "square", targets="w.")
def time_major():
    """x is (T, B, D), with as many steps as examples."""

    def fn(p, x):
        k, v = x @ p["wk"], x @ p["wv"]
        weights = jax.nn.softmax(jnp.einsum("tbd,sbd->tbs", x, k))
        return jnp.einsum("tbs,sbd->tbd", weights, v) @ p["wo"]

    return Example(fn, {name: shape(8, 8) for name in ("wk", "wv", "wo")}, (data(4, 4, 8),))


@model({"wk": "io", "wv": "io", "wo": "io"}, "plain", "folded", "square", targets="w.")
def folded_batch():
    """Examples and steps are one axis at the kernels, and two at the attention."""

    def fn(p, x):
        flat = x.reshape(-1, 8)
        k, v = ((flat @ p[name]).reshape(x.shape) for name in ("wk", "wv"))
        return (_attend(x, k, v).reshape(-1, 8) @ p["wo"]).reshape(x.shape)

    return Example(fn, {name: shape(8, 8) for name in ("wk", "wv", "wo")}, (data(3, 5, 8),))


@model(W2, "plain", "inner_grad", targets="w.")
def forces():
    """Returns the derivative of an energy by its input."""
    energy = lambda x, p: jnp.sum(jnp.tanh(x @ p["w1"]) @ p["w2"])
    return Example(lambda p, x: jax.grad(energy)(x, p), W1, (X,))


@model(W2, "plain", "effects", targets="w.")
def ordered_prints():
    def fn(p, x):
        h = jnp.tanh(x @ p["w1"])
        jax.debug.print("first {}", h[0, 0, 0], ordered=True)
        y = h @ p["w2"]
        jax.debug.print("second {}", y[0, 0, 0], ordered=True)
        return y

    return Example(fn, W1, (X,))


@model(W2, "plain", targets="w.")
def typed_key():
    """Dropout by hand, from a typed key."""

    def fn(p, x, key):
        h = jnp.tanh(x @ p["w1"])
        return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), 2 * h, 0) @ p["w2"]

    return Example(fn, W1, (X, jax.random.key(3)))


@model(W2, "plain", "bf16", targets="w.")
def bf16_times_float():
    """A Python number must not widen what it scales."""

    def fn(p, x):
        return (0.5 * jnp.tanh(x @ p["w1"])) @ (p["w2"] * 2.0)

    return Example(fn, jax.tree.map(lambda w: shape(*w.shape, dtype=jnp.bfloat16), W1), (X.astype(jnp.bfloat16),))


@model(W2, "plain", "bf16", targets="w.")
def float32_accumulator():
    """bfloat16 products summed in float32, by `preferred_element_type`."""

    def fn(p, x):
        product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        return product(jnp.tanh(product(x, p["w1"])).astype(x.dtype), p["w2"])

    return Example(fn, jax.tree.map(lambda w: shape(*w.shape, dtype=jnp.bfloat16), W1), (X.astype(jnp.bfloat16),))


@model({"up": "bio", "down": "bio"}, "plain", "stacked", "square", targets="up|down")
def ragged_experts():
    """Rows sorted by their expert, and how many each expert has."""

    def fn(p, x, sizes):
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

    return Example(fn, {"up": shape(3, 8, 8), "down": shape(3, 8, 8)}, (data(7, 8), jnp.array([3, 0, 4], jnp.int32)))


# Transformers

VOCAB, WIDTH, HEADS, LAYERS, LENGTH = 13, 16, 4, 2, 6


def tokens() -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids, mask (True where a token is real) and positions; the second example is padded."""
    mask = jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [LENGTH - 2]])
    return ids(2, LENGTH, vocab=VOCAB), mask, jnp.tile(jnp.arange(LENGTH)[None], (2, 1))


DENSE = {path: "io" for path in
         ("query/kernel", "key/kernel", "value/kernel", "out/kernel", "up/kernel", "down/kernel")}


class Attention(nn.Module):
    """Dense projections, split into heads by a reshape; as many heads as features of a head."""

    @nn.compact
    def __call__(self, x, mask):
        heads = lambda name: nn.Dense(WIDTH, name=name)(x).reshape(*x.shape[:-1], HEADS, -1)
        mixed = nn.dot_product_attention(heads("query"), heads("key"), heads("value"), mask=mask[:, None, None])
        return nn.Dense(WIDTH, name="out")(mixed.reshape(x.shape))


class Encoder(nn.Module):
    """Embeddings, blocks with their norms before or after, a pooler and a classifier."""

    pre: bool
    train: bool = False
    lift: Callable[[Any], Any] = lambda layer: layer

    @nn.compact
    def __call__(self, tokens, mask, positions):
        drop = nn.Dropout(0.1, deterministic=not self.train)
        if self.pre:
            x = nn.Embed(VOCAB, WIDTH, name="words")(tokens) + nn.Embed(LENGTH + 8, WIDTH, name="places")(positions)
        else:
            x = nn.Embed(VOCAB, WIDTH, name="words")(tokens) + nn.Embed(2, WIDTH, name="types")(jnp.zeros_like(tokens))
            x = nn.LayerNorm(name="norm")(x + nn.Embed(LENGTH + 8, WIDTH, name="places")(positions))
        for i in range(LAYERS):
            x = self.lift(EncoderLayer)(self.pre, drop, name=f"layers_{i}")(drop(x), mask)
        pooled = jnp.tanh(nn.Dense(WIDTH, name="pooler")(nn.LayerNorm(name="final")(x)[:, 0] if self.pre else x[:, 0]))
        return nn.Dense(3, name="classifier")(drop(pooled))


class EncoderLayer(nn.Module):
    pre: bool
    drop: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x, mask):
        before, after = nn.LayerNorm(name="norm_1"), nn.LayerNorm(name="norm_2")
        attention = lambda x: self.drop(Attention(name="attention")(x, mask))
        feed = lambda x: self.drop(nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(x))))
        if self.pre:
            x = x + attention(before(x))
            return x + feed(after(x))
        x = before(attention(x) + x)
        return after(feed(x) + x)


def _layers(names: str) -> dict[str, str]:
    where = lambda path: path if path.split("/")[0] in ("up", "down") else f"attention/{path}"
    return {f"{names.format(i)}/{where(path)}": axes for i in range(LAYERS) for path, axes in DENSE.items()}


HEAD = {"words/embedding": "io", "places/embedding": "io", "pooler/kernel": "io", "classifier/kernel": "io"}


@model({**HEAD, **_layers("layers_{}")}, "linen", "embed", "tokens", "residual", "square",
       targets=".*(query|value|up|down)")
def pre_norm_encoder():
    return linen(Encoder(pre=True), *tokens())


@model({**HEAD, "types/embedding": "io", **_layers("layers_{}")}, "linen", "embed", "tokens", "residual", "square",
       targets=".*(query|value|up|down)")
def post_norm_encoder():
    return linen(Encoder(pre=False), *tokens())


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale[None, None]


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary positions on (B, T, N, H)."""
    half = x.shape[-1] // 2
    frequencies = 100.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    sin, cos, (a, b) = jnp.sin(angles), jnp.cos(angles), jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class DecoderLayer(nn.Module):
    kv_heads: int = 2

    @nn.compact
    def __call__(self, x, mask, positions):
        dense = functools.partial(nn.Dense, use_bias=False)
        h, size = RMSNorm(name="norm_1")(x), WIDTH // HEADS
        heads = lambda name, n: dense(n * size, name=name)(h).reshape(*x.shape[:-1], n, size)
        q, k = (rotate(heads(name, n), positions) for name, n in (("query", HEADS), ("key", self.kv_heads)))
        k, v = (jnp.repeat(y, HEADS // self.kv_heads, axis=2) for y in (k, heads("value", self.kv_heads)))
        seen = mask[:, None, None] & nn.make_causal_mask(positions, dtype=bool)
        x = x + dense(WIDTH, name="out")(nn.dot_product_attention(q, k, v, mask=seen).reshape(x.shape))
        h = RMSNorm(name="norm_2")(x)
        return x + dense(WIDTH, name="down")(nn.silu(dense(2 * WIDTH, name="gate")(h)) * dense(2 * WIDTH, name="up")(h))


class Decoder(nn.Module):
    """RMSNorm, rotary positions, grouped heads, a gated MLP, and logits by the embedding."""

    @nn.compact
    def __call__(self, tokens, mask, positions):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        x = embed(tokens)
        for i in range(LAYERS):
            x = DecoderLayer(name=f"layers_{i}")(x, mask, positions)
        return embed.attend(RMSNorm(name="norm")(x))


@model({"embed/embedding": "io", **{f"layers_{i}/{name}/kernel": "io" for i in range(LAYERS)
                                    for name in ("query", "key", "value", "out", "gate", "up", "down")}},
       "linen", "embed", "tokens", "residual", "tied", "square", targets="all-linear")
def decoder():
    return linen(Decoder(), *tokens())


# The same, written and lifted otherwise


@model({**HEAD, **_layers("layers_{}")}, "linen", "jit", "embed", "tokens", "residual", "square",
       targets=".*(query|value|up|down)")
def linen_jit_encoder():
    """Layers of one jitted class, of which the second may meet the first one's cached trace."""
    return linen(Encoder(pre=True, lift=nn.jit), *tokens())


@model({"embed/embedding": "io",
        **{f"layers/{name}/kernel": "sio" for name in ("query", "key", "value", "out", "gate", "up", "down")}},
       "linen", "scan", "remat", "embed", "tokens", "stacked", "residual", "tied", "square", targets="all-linear")
def linen_scan_decoder():
    """Rematerialised layers in a scan."""

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, tokens, mask, positions):
            embed = nn.Embed(VOCAB, WIDTH, name="embed")
            step = lambda layer, x, _: (layer(x, mask, positions), None)
            run = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            layer = nn.remat(DecoderLayer, policy=dots, prevent_cse=False)(name="layers")
            return embed.attend(RMSNorm(name="norm")(run(layer, embed(tokens), None)[0]))

    return linen(Scanned(), *tokens())


class NNXLayer(nnx.Module):
    """A pre-LN block whose projections have heads as an axis, and biases."""

    def __init__(self, rngs):
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, seen):
        x = x + self.attention(self.norm_1(x), mask=seen)
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class NNXDecoder(nnx.Module):
    """Learned positions, and logits by the embedding."""

    def __init__(self, rngs):
        self.embed, self.places = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Embed(LENGTH + 8, WIDTH, rngs=rngs)
        self.layers = nnx.List([NNXLayer(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens, mask, positions):
        x = self.embed(tokens) + self.places(positions)
        for layer in self.layers:
            x = layer(x, mask[:, None, None] & nnx.make_causal_mask(tokens, dtype=bool))
        return self.embed.attend(self.norm(x))


@model({"embed/embedding": "io", "places/embedding": "io",
        **{path: axes for i in range(LAYERS) for path, axes in under(f"layers/{i}", BLOCK).items()}},
       "nnx", "embed", "tokens", "residual", "tied", "square", targets=".*(query|value|up|down)")
def nnx_decoder():
    return graph(lambda: NNXDecoder(nnx.Rngs(0)), *tokens())


def _linear(p, x):
    return x @ p["kernel"] + p["bias"][None, None]


def _normed(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"][None, None] + p["bias"][None, None]


@model({"words/embedding": "io", "places/embedding": "io", "classifier/kernel": "io",
        **{path: axes for i in range(LAYERS) for path, axes in under(f"layers/{i}", DENSE).items()}},
       "plain", "embed", "tokens", "residual", "square", targets=".*(query|value|up|down)")
def plain_encoder():
    """Post-LN blocks in a list, scores that a mask is added to, and a class for each token."""

    def block(p, x, mask):
        heads = lambda name: _linear(p[name], x).reshape(*x.shape[:2], HEADS, -1)
        scores = jnp.einsum("bqnh,bknh->bnqk", heads("query"), heads("key")) / (WIDTH // HEADS) ** 0.5
        scores = scores + jnp.where(mask, 0.0, -1e9)[:, None, None]
        mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), heads("value")).reshape(x.shape)
        x = _normed(p["norm_1"], x + _linear(p["out"], mixed))
        return _normed(p["norm_2"], x + _linear(p["down"], jax.nn.gelu(_linear(p["up"], x))))

    def fn(p, tokens, mask, positions):
        x = _normed(p["norm"], p["words"]["embedding"][tokens] + p["places"]["embedding"][positions])
        for layer in p["layers"]:
            x = block(layer, x, mask)
        return _linear(p["classifier"], x)

    dense = lambda n, out: {"kernel": shape(n, out), "bias": shape(out)}
    norm = {"scale": shape(WIDTH), "bias": shape(WIDTH)}
    feed = {"up": dense(WIDTH, 2 * WIDTH), "down": dense(2 * WIDTH, WIDTH), "norm_1": norm, "norm_2": norm}
    layers = [{name: dense(WIDTH, WIDTH) for name in ("query", "key", "value", "out")} | feed for _ in range(LAYERS)]
    tables = {name: {"embedding": shape(n, WIDTH)} for name, n in (("words", VOCAB), ("places", LENGTH + 8))}
    return Example(fn, {**tables, "norm": norm, "layers": layers, "classifier": dense(WIDTH, 3)}, tokens())
