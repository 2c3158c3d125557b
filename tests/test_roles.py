"""What `roles` reads off a trace: letters, biases, the residual stream and its norms, order, heads."""

import json

import jax
import jax.numpy as jnp
import pytest
import zoo
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from peftjax.methods.lora import LoRA, lora
from peftjax.roles import Norm, Role, Roles, roles

WEIGHTS = {"w1": zoo.shape(8, 8), "b1": zoo.shape(8), "w2": zoo.shape(8, 8), "b2": zoo.shape(8), "g": zoo.shape(8)}
X = zoo.shape(2, 5, 8)


def read(fn, *args, **more):
    """The roles of a function of plain weights, and of more."""
    return roles(fn, {**WEIGHTS, **more}, *(args or (X,)))


def layer_norm(x, scale=1.0, bias=0.0):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * row(scale) + row(bias)


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * row(scale)


def row(vector):
    return vector if isinstance(vector, float) else vector[None, None]


def mlp(p, x):
    return jax.nn.relu(x @ p["w1"] + row(p["b1"])) @ p["w2"] + row(p["b2"])


# The table of models


@pytest.mark.parametrize("name", zoo.MODELS)
def test_letters(name):
    model = zoo.MODELS[name]
    example = model.make()
    found = roles(example.fn, example.params, *example.args)
    assert {path: found[path].axes for path in model.axes} == dict(model.axes)
    assert all(found[path].op in ("linear", "conv", "embedding") for path in model.axes)


@pytest.mark.parametrize("name", ["pre_norm_encoder", "post_norm_encoder"])
def test_transformers(name):
    example = zoo.MODELS[name].make()
    found = roles(example.fn, example.params, *example.args)
    kernels = {path.removesuffix("/kernel"): role for path, role in found.items() if path.endswith("kernel")}
    assert all(role.bias == f"{path}/bias" for path, role in kernels.items())
    assert all(found[role.bias].kernel == f"{path}/kernel" for path, role in kernels.items())
    residual = {f"layers_{i}/{name}" for i in (0, 1) for name in ("attention/out", "down")}
    assert {path for path, role in kernels.items() if role.residual} == residual
    assert [path for path, role in found.items() if role.head] == ["classifier/kernel"]
    assert found["words/embedding"] == Role("embedding", "io", 0, ("gather",))
    sublayers = {path.partition("/")[2]: role.sublayer for path, role in kernels.items()}
    assert sublayers["attention/out"] == "attention" and sublayers["down"] == "feed-forward"
    assert not any(role.sublayer for path, role in kernels.items() if path not in residual)
    norm = lambda path: Norm(f"{path}/scale", f"{path}/bias", 1e-6)
    after = {"attention/out": "norm_1", "down": "norm_2"} if name == "post_norm_encoder" else {}
    for path in residual:
        layer, _, rest = path.partition("/")
        assert kernels[path].norm == (norm(f"{layer}/{after[rest]}") if after else None)
    attention = ["query/kernel", "query/bias", "key/kernel", "key/bias", "value/kernel", "value/bias", "out/kernel"]
    order = sorted(found, key=lambda path: found[path].order)
    order = [path.removeprefix("layers_1/attention/") for path in order if path.startswith("layers_1/attention")]
    assert order[:7] == attention


def attend(q, k, v):
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)), v)


def gated_norm(p, x):
    return x * lax.rsqrt(jnp.einsum("btd,btd->bt", x, x)[..., None])


def in_chunks(q, k, v):
    """Attention, one key and value at a time, in a loop."""

    def step(carry, kv):
        weight = jnp.exp(jnp.einsum("btd,bd->bt", q, kv[0]))[..., None]
        return carry + weight * kv[1][:, None], None

    return lax.scan(step, jnp.zeros_like(q), (jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)))[0]


def dispatched(p, x):
    """Experts of a mixture, to which a one-hot code sends the tokens."""
    code = jax.nn.one_hot((x @ p["w1"]).argmax(-1), 8, dtype=jnp.float32)
    return jnp.einsum("bte,btd->bed", code, x) @ p["w2"]


@pytest.mark.parametrize(
    "block, sublayer",
    [
        (lambda p, x: attend(x @ p["w1"], x @ p["w3"], x) @ p["w2"], "attention"),
        (lambda p, x: attend(x @ p["w1"], x @ p["w1"], x @ p["w1"]) @ p["w2"], "attention"),
        (lambda p, x: jax.lax.map(lambda x: attend(x[None] @ p["w1"], x[None] @ p["w3"], x[None])[0], x) @ p["w2"], "attention"),
        (lambda p, x: attend(x, x, x) @ p["w2"], "unknown"),
        (lambda p, x: dispatched(p, x)[:, :5] @ p["w3"], "unknown"),
        (lambda p, x: mlp(p, gated_norm(p, x)), "feed-forward"),
        (lambda p, x: ((x @ p["w1"]) * jax.nn.silu(x @ p["w3"])) @ p["w2"], "feed-forward"),
        (lambda p, x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x @ p["w1"], 0) @ p["w2"], "feed-forward"),
    ],
)
def test_which_sublayer_a_residual_sum_ends(block, sublayer):
    found = read(lambda p, x: (x := jnp.sin(x), x + block(p, x))[1], w3=zoo.shape(8, 8))
    assert [role.sublayer for role in found.values() if role.residual] == [sublayer]


def test_decoder():
    example = zoo.MODELS["decoder"].make()
    found = roles(example.fn, example.params, *example.args)
    assert found["embed/embedding"].uses == ("gather", "dot_general") and found["embed/embedding"].head
    residual = {f"layers_{i}/{n}/kernel" for i in (0, 1) for n in ("out", "down")}
    assert {path for path, role in found.items() if role.residual} == residual
    assert not any(role.norm for role in found.values())
    assert {role.op for path, role in found.items() if "norm" in path} == {"scale"}


@pytest.mark.parametrize("name", ["linen_scan", "linen_remat", "linen_scan_remat", "nnx_scan", "linen_scan_conv"])
def test_residuals_inside_regions(name):
    example = zoo.MODELS[name].make()
    found = roles(example.fn, example.params, *example.args)
    residual = {path for path, role in found.items() if role.residual}
    assert residual == {path for path in found if path.endswith(("down/kernel", "out/kernel", "mix/kernel"))}
    stacked = {role.axes[0] for path, role in found.items()} == {"s"}
    assert stacked == ("scan" in name)


def test_batched_biases_and_groups():
    found = roles(*_example("linen_vmap_attention"))
    assert found["query/bias"].axes == "boo" and found["out/bias"].axes == "bo"
    assert roles(*_example("linen_conv_grouped"))["kernel"].groups == 2
    assert roles(*_example("linen_vmap_conv"))["kernel"].groups == 1


def _example(name):
    example = zoo.MODELS[name].make()
    return example.fn, example.params, *example.args


HEADS = {"w": zoo.shape(8, 2, 4), "b": zoo.shape(2, 4), "flat": zoo.shape(8), "turned": zoo.shape(4, 2)}


@pytest.mark.parametrize(
    "bias, follows",
    [
        (lambda p, y: y + p["b"][None], {"b": ((1,), (2,))}),
        (lambda p, y: y.reshape(-1, 8) + p["flat"][None], {"flat": ((1, 2),)}),
        (lambda p, y: y.reshape(-1, 8) + p["b"].reshape(1, 8), {"b": ((1,), (2,))}),
        (lambda p, y: y.swapaxes(1, 2) + p["turned"][None], {"turned": ((2,), (1,))}),
        (lambda p, y: y.reshape(-1, 2, 2, 2) + p["flat"].reshape(1, 2, 2, 2), {"flat": None}),
    ],
)
def test_the_axes_of_a_bias_and_those_of_its_kernel(bias, follows):
    fn = lambda p, x: bias(p, jnp.einsum("bd,dhk->bhk", x, p["w"]))
    found = roles(fn, HEADS, zoo.shape(3, 8))
    assert {path: found[path].follows for path in follows} == follows
    assert all(found[path].kernel == "w" for path in follows)


@pytest.mark.parametrize("name, window", [("linen_conv", (0, 1)), ("conv_nchw", (2, 3)), ("linen_scan_conv", (1,))])
def test_the_window_of_a_convolution(name, window):
    found = roles(*_example(name))
    assert [role.window for role in found.values() if role.op == "conv"] == [window]


def test_a_stacked_bias_follows_within_its_layer():
    found = roles(*_example("linen_scan"))
    assert found["layers/block/attention/query/bias"].follows == ((), (2,), (3,))


def test_fused_kernels_and_biases():
    found = roles(*_example("linen_lstm_fused"))
    assert found["cell/hi/kernel"].bias == "cell/hi/bias" and found["cell/ho/bias"].kernel == "cell/ho/kernel"
    assert not any(role.head or role.residual for role in found.values())


def test_statistics_are_neither_biases_nor_scales():
    found = roles(*_example("nnx_batch_norm_dropout"))
    assert {p: r.op for p, r in found.items() if p.startswith("norm/")} == {
        "norm/bias": "bias", "norm/scale": "scale", "norm/mean": "other", "norm/var": "other"
    }  # fmt: skip
    assert found["dropout/rngs/count"].op == "other" and found["layers/1/kernel"].head


# One thing at a time


def test_post_norm_takes_the_place_of_the_stream():
    found = read(lambda p, x: layer_norm(x + mlp(p, x), p["g"], p["b"]), b=zoo.shape(8))
    assert found["w2"].residual and found["w2"].norm == Norm("g", "b", 1e-5)
    found = read(lambda p, x: rms_norm(mlp(p, x) + x, p["g"]))
    assert found["w2"].norm == Norm("g", None, 1e-6, centred=False)


def test_a_norm_that_does_not_take_the_place_of_the_stream():
    final = read(lambda p, x: layer_norm(x + mlp(p, layer_norm(x)), p["g"], p["b1"]))
    assert final["w2"].residual and final["w2"].norm is None
    next_block = read(lambda p, x: (lambda s: s + rms_norm(s, p["g"]))(x + mlp(p, x)))
    assert next_block["w2"].residual and next_block["w2"].norm is None
    offset = read(lambda p, x: rms_norm(x + mlp(p, x), 1 + p["g"]))
    assert offset["w2"].norm == Norm("g", None, 1e-6, centred=False, offset=1.0) and offset["g"].op == "scale"


def test_what_may_stand_between_a_kernel_and_its_residual():
    key = jax.random.key(0)
    drop = lambda h, key: jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h / 0.5, 0.0)
    assert read(lambda p, x, key: x + drop(mlp(p, x), key), X, key)["w2"].residual
    scaled = read(lambda p, x: x + (x @ p["w1"] + row(p["b1"])) * row(p["g"]))
    assert scaled["w1"].residual and scaled["g"].kernel == "w1" and scaled["b1"].kernel == "w1"
    half = lambda x: x.astype(jnp.bfloat16)
    folded = lambda p, x: x + (half(x.reshape(-1, 8)) @ half(p["w1"])).reshape(x.shape).astype(x.dtype)
    assert read(folded)["w1"].residual


def test_what_is_no_residual():
    nonlinear = read(lambda p, x: x + jnp.tanh(x @ p["w1"]))
    gated = read(lambda p, x: x + (lambda h: h * jax.nn.sigmoid(h))(x @ p["w1"]))
    two = read(lambda p, x: x @ p["w1"] + x @ p["w2"])
    normed = read(lambda p, x: x + rms_norm(x @ p["w1"], p["g"]))
    broadcast = read(lambda p, x: jnp.tanh(x @ p["w1"]).mean(1, keepdims=True) + x @ p["w2"])
    for found in (nonlinear, gated, two, normed, broadcast):
        assert not found["w1"].residual and not found["w2"].residual
    positions = lambda p, x: x @ p["w1"] + p["pos"][None]
    assert not read(positions, pos=zoo.shape(5, 8))["w1"].residual


def test_positions_are_no_bias_of_a_kernel():
    found = read(lambda p, x: x @ p["w1"] + jnp.broadcast_to(p["pos"], x.shape), pos=zoo.shape(1, 5, 8))
    assert found["pos"].op == "bias" and found["pos"].kernel is None and found["w1"].bias is None
    square = read(lambda p, x: x @ p["w1"] + jnp.broadcast_to(p["pos"], x.shape), zoo.shape(8, 8), pos=zoo.shape(8, 8))
    assert square["pos"].kernel is None


def test_a_learned_stream():
    def fn(p, x):
        q = jnp.broadcast_to(p["q"], (2, 4, 8))
        weights = jax.nn.softmax((q @ p["w1"]) @ jnp.swapaxes(x, 1, 2))
        return jnp.tanh(q + (weights @ x) @ p["w2"])

    found = read(fn, q=zoo.shape(4, 8))
    assert found["w2"].residual and found["w1"].axes == "io"
    assert (found["q"].op, found["q"].axes) == ("other", "oo")


def test_learned_queries_on_the_right():
    found = read(lambda p, x: jnp.einsum("df,nd->fn", p["w1"], p["q"]) @ x, zoo.shape(4, 8), q=zoo.shape(4, 8))
    assert (found["w1"].op, found["w1"].axes, found["q"].op) == ("linear", "io", "other")


def test_heads():
    loss = lambda p, x, y: -jnp.take_along_axis(jax.nn.log_softmax(mlp(p, x)), y[..., None], -1).mean()
    assert read(loss, X, jax.ShapeDtypeStruct((2, 5), jnp.int32))["w2"].head
    assert read(lambda p, x: lax.map(lambda x: jnp.tanh(x @ p["w1"]) @ p["w2"], x))["w2"].head
    assert not any(role.head for role in read(lambda p, x: x @ p["w1"]).values()), "all there is"
    assert not any(role.head for role in read(lambda p, x: x + mlp(p, x)).values()), "a block without a head"
    cache = read(lambda p, x: ((x @ p["w2"]), jnp.tanh(x @ p["w2"]) @ p["w1"]))
    assert [path for path, role in cache.items() if role.head] == ["w1"]


def test_layers_by_index():
    w = {"w": zoo.shape(3, 8, 8), "b": zoo.shape(3, 8)}

    def unrolled(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i] + row(p["b"][i]))
        return x

    looped = lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i] + row(p["b"][i])), x)
    for fn in (unrolled, looped):
        found = roles(fn, w, X)
        assert (found["w"].axes, found["b"].axes, found["b"].kernel) == ("sio", "so", "w")


def test_an_axis_of_several_kinds():
    layers = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"].reshape(3, 8, 8))[0]
    assert roles(layers, {"w": zoo.shape(24, 8)}, X)["w"].axes == "?o"
    heads = lambda p, x: jnp.einsum("btd,dsnh->sbtnh", x, p["w"].reshape(8, 3, 2, 4))
    assert roles(heads, {"w": zoo.shape(8, 24)}, X)["w"].axes == "io"


def test_weights_made_of_parameters():
    power = lambda p, x: x @ (p["w1"] / ((p["u"] @ p["w1"].T) @ p["w1"] @ p["u"].T)[0, 0])
    found = read(power, u=zoo.shape(1, 8))
    assert (found["w1"].axes, found["u"].op) == ("io", "other")
    rounded = lambda p, x: x @ (jnp.clip(jnp.round(p["w1"] / p["g"][:, None]), -127, 127) * p["g"][:, None])
    assert (read(rounded)["w1"].axes, read(rounded)["g"].op) == ("io", "scale")
    masked = read(lambda p, x: x @ (p["w1"] * jnp.tril(jnp.ones((8, 8)))))
    assert masked["w1"] == Role("linear", "io", 0, ("mul", "dot_general"))
    torch = read(lambda p, x: x @ p["w1"].T + row(p["b1"] + p["b2"]))
    assert torch["w1"].axes == "oi" and torch["b1"].kernel == torch["b2"].kernel == "w1"


def test_gathered_shards():
    mesh, split = Mesh(jax.devices()[:2], ("x",)), PartitionSpec("x")
    local = lambda w, x: x @ lax.all_gather(w, "x", axis=0, tiled=True)
    fn = lambda p, x: jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=split)(p["w1"], x)
    assert read(fn)["w1"].axes == "io"


def test_nnx_norms():
    rngs = nnx.Rngs(0)
    graphdef, state = nnx.split([nnx.Linear(8, 8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)])

    def fn(state, x):
        linear, rms, norm = nnx.merge(graphdef, state)
        x = rms(x + linear(x))
        return norm(x + linear(x))

    assert roles(fn, state, X)["0/kernel"].norm == Norm("1/scale", None, 1e-6, centred=False)


# The value itself


def test_roles_are_a_readable_immutable_mapping():
    found = read(lambda p, x: layer_norm(x + mlp(p, x), p["g"], p["b"]), b=zoo.shape(8))
    assert Roles.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert hash(found) == hash(Roles(found)) and list(found) == sorted(found)
    assert str(found).splitlines()[0].split() == ["path", "op", "axes", "uses"]
    assert "norm(scale='g', bias='b', eps=1e-05, centred=true" in str(found).lower()
    with pytest.raises(TypeError):
        found["w1"] = found["w2"]


def test_unused_static_and_abstract_leaves():
    params = {"w": zoo.shape(8, 8), "none": None, "unused": zoo.shape(3, 3), "name": "relu", "n": 3}
    fn = lambda p, x, scale, act: getattr(jax.nn, p["name"])(x @ p["w"]) * scale if act else x
    found = roles(fn, params, X, 2.0, act=True)
    assert set(found) == {"w", "unused"} and found["unused"] == Role("unused", "oo", 1)


def test_a_tuned_tree_is_read_as_the_arrays_that_it_stands_for():
    fn, params, *args = _example("post_norm_encoder")
    plain = roles(fn, params, *args)
    tuned = lora(rank=2).init(jax.random.key(0), params, plain)
    assert isinstance(tuned["layers_0"]["up"]["kernel"], LoRA) and roles(fn, tuned, *args) == plain


def test_errors_of_the_model_come_through():
    with pytest.raises(TypeError, match="dot_general"):
        read(lambda p, x: x @ p["w1"][:3])
