"""Overlays of outputs and tables: where they fire, and what they refuse."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import USUAL
from covers import some
from jax.ad_checkpoint import checkpoint_name
from zoo import MODELS

import peftjax as pj
from peftjax.overlay import Output, Table, frozen, overlay, static, trained
from peftjax.paths import path_of


@overlay
class Gain(Output):
    """Multiplies a layer's output by 1 + w: the same as a kernel (and bias) multiplied so, which is the oracle."""

    base: Any = frozen()
    w: Any = trained()
    axes: str = static()
    kernel: str | None = static(default=None)
    where: str = static(default="output")
    locked: tuple[str, ...] = static(default=())

    def labels(self):
        return {"w": (*((k,) for k, x in enumerate(self.axes) if x in "sb"), "features")}

    def on_output(self, y, site):
        gain = (1 + self.w).astype(y.dtype)
        return y * jnp.expand_dims(gain, tuple(range(y.ndim - 1)))

    def on_residual(self, h, r, site):
        return self.on_output(h, site)


@overlay
class Further(Table):
    """Two more rows."""

    base: Any = frozen()
    more: Any = trained()
    locked: tuple[str, ...] = static(default=())

    def labels(self):
        return {"more": ("rows", (1,))}

    def rows(self):
        return self.more


def gained(params, roles, where, on_bias):
    """The tree with gains on every layer that can have one, the oracle's tree, and how many there are."""
    placed, factors = {}, {}

    def put(keys, x):
        path = path_of(keys)
        role = roles[path]
        kernel = role.kernel if on_bias else path
        if kernel is None or roles[kernel].op not in ("linear", "conv", "embedding") or (on_bias and role.op != "bias"):
            return x
        layer = roles[kernel]
        if len(set(layer.uses) & {"gather", "dot_general"}) > 1:
            return x
        if (where == "residual" and not layer.residual) or (not on_bias and layer.bias and where == "residual"):
            return x
        sizes = [n for n, letter in zip(x.shape, layer.axes if not on_bias else "o" * x.ndim) if letter == "o"]
        axes = layer.axes if not on_bias else role.axes
        if on_bias:
            sizes = [n for n, letter in zip(x.shape, axes) if letter == "o"]
        lead = [n for n, letter in zip(x.shape, axes) if letter in "sb"]
        w = jnp.asarray(np.random.default_rng(len(placed)).normal(0, 0.3, (*lead, math.prod(sizes))), jnp.float32)
        placed[path] = Gain(base=x, w=w, axes=axes, kernel=kernel if on_bias else None, where=where)
        for p in {path, kernel}:
            factors[p] = (np.asarray(w).reshape(*lead, *sizes), axes)
        return placed[path]

    tuned = jax.tree_util.tree_map_with_path(put, params)

    def scaled(keys, x):
        path = path_of(keys)
        if path not in factors:
            return x
        w, _ = factors[path]
        axes = roles[path].axes
        order = [k for k, letter in enumerate(axes) if letter in "sb"] + [k for k, letter in enumerate(axes) if letter == "o"]
        w = np.transpose(w, np.argsort(order)) if w.ndim == len(order) else w
        w = np.expand_dims(w, [k for k, letter in enumerate(axes) if letter == "i"])
        return jax.device_put(np.asarray(x) * (1 + w).astype(x.dtype))

    return tuned, jax.tree_util.tree_map_with_path(scaled, params), len(placed)


REFUSED = {"merges", "inner_grad", "opaque"}
RAISES = {"fused_qkv_slices": "cut before the layer acts", "ragged_experts": "mixes experts"}
ACTS = [n for n, m in MODELS.items() if not m.tags & REFUSED and n not in RAISES and n != "used_both_ways"]


@pytest.mark.parametrize("name", [*RAISES, *some(ACTS, 8)])
def test_gain_at_every_layer_equals_scaled_kernels(name):
    """On every kernel, and on every bias that follows one; at the output, and at the residual add where there is one."""
    fn, params, args = MODELS[name].make()
    roles = pj.roles(fn, params, *args)
    total, plain = 0, jax.jit(lambda params: fn(params, *args), compiler_options=USUAL)
    for where, on_bias in itertools.product(("output", "residual"), (False, True)):
        tuned, oracle, count = gained(params, roles, where, on_bias)
        total += count
        if count and name in RAISES:
            with pytest.raises(ValueError, match=RAISES[name]):
                pj.wrap(fn)(tuned, *args)
        elif count:
            got = np.asarray(jax.tree.leaves(pj.wrap(fn)(tuned, *args))[0], np.float64)
            want = np.asarray(jax.tree.leaves(plain(oracle))[0], np.float64)
            error = np.abs(got - want).max() / np.abs(want).max()
            assert error < (3e-2 if "bf16" in MODELS[name].tags else 1e-5), (where, on_bias)
    assert total


def residual_block(params, x):
    h = jnp.tanh(x @ params["up"]) @ params["down"]
    h = h + params["bias"][None]
    return x + 0.5 * h


def block_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (4, 8), "down": (8, 4), "bias": (4,)}
    return {n: jax.random.normal(k, s, jnp.float32) for k, (n, s) in zip(keys, shapes.items())}


def gain(x, **kwargs):
    width = x.shape[-1]
    return Gain(base=x, w=jnp.full(width, 0.5, jnp.float32), axes="io"[-x.ndim :], **kwargs)


X = jnp.arange(8, dtype=jnp.float32).reshape(2, 4) / 8


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {**p, "bias": gain(p["bias"])}, "expected the contraction of this kernel"),
        (lambda p: {**p, "bias": gain(p["bias"], kernel="up")}, "expected the addition of this bias to the output of up"),
        (lambda p: {**p, "up": gain(p["up"], where="residual")}, "up, used by tanh.*waits for its residual add"),
        (lambda p: {**p, "down": gain(p["down"], where="residual"), "bias": gain(p["bias"], kernel="down")}, "meet in one"),
        (lambda p: {**p, "unused": gain(p["up"])}, "never reached by the model.*unused"),
    ],
)
def test_a_layer_that_cannot_honour_an_output_overlay_raises(change, message):
    with pytest.raises(ValueError, match=message):
        pj.wrap(residual_block)(change(block_params()), X)


def test_pending_output_at_the_end_of_the_function_raises():
    fn = lambda p, x: x @ p["down"]
    params = {"down": gain(block_params()["down"].T, where="residual")}
    with pytest.raises(ValueError, match="down reached the function's output before it could act"):
        pj.wrap(fn)(params, X)


def test_pending_output_may_not_leave_a_scan_body():
    def fn(p, x):
        _, hs = jax.lax.scan(lambda c, _: (c, c @ p["w"]), x, None, length=2)
        return x + hs[0]

    with pytest.raises(ValueError, match="w reached scan before it could act"):
        pj.wrap(fn)({"w": gain(jnp.eye(4, dtype=jnp.float32), where="residual")}, X)


def test_two_pending_outputs_may_not_meet():
    fn = lambda p, x: x + (x @ p["a"] + x @ p["b"])
    w = jnp.eye(4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="two overlays of outputs meet"):
        pj.wrap(fn)({"a": gain(w, where="residual"), "b": gain(w, where="residual")}, X)


def test_a_pending_output_meets_one_residual_add():
    def fn(p, x):
        h = x @ p["w"]
        return 2.0 * x + h, x + h

    with pytest.raises(ValueError, match="w reached the function's output.*waits for the one addition"):
        pj.wrap(fn)({"w": gain(jnp.eye(4, dtype=jnp.float32), where="residual")}, X)


def test_a_pending_output_passes_a_running_mean_but_not_its_own():
    """Batch normalisation with statistics of the tree is a shift and a scale; with those of the batch it is neither."""
    w, mean = jnp.eye(4, dtype=jnp.float32) + 0.1, jnp.arange(4, dtype=jnp.float32)
    fn = lambda p, x: x + (x @ p["w"] - p["mean"][None]) * 2.0
    got = pj.wrap(fn)({"w": gain(w, where="residual"), "mean": mean}, X)
    np.testing.assert_allclose(got, X + ((X @ w) - mean[None]) * 2.0 * 1.5, rtol=1e-6)
    own = lambda p, x: x + (x @ p["w"] - (x @ p["w"]).mean(0, keepdims=True))
    with pytest.raises(ValueError, match="two overlays of outputs meet"):
        pj.wrap(own)({"w": gain(w, where="residual")}, X)
    with pytest.raises(ValueError, match="w, used by sub.*waits for its residual add"):
        pj.wrap(lambda p, x: x + (p["mean"][None] - x @ p["w"]))({"w": gain(w, where="residual"), "mean": mean}, X)


@pytest.mark.parametrize("lift", [lambda f: f, jax.jit, jax.checkpoint])
def test_pending_output_leaves_jit_and_remat_regions(lift):
    layer = lift(lambda w, x: 2.0 * (x @ w))
    fn = lambda p, x: x + layer(p["w"], x)
    w = jnp.eye(4, dtype=jnp.float32) + 0.1
    got = pj.wrap(fn)({"w": gain(w, where="residual")}, X)
    np.testing.assert_allclose(got, fn({"w": w * 1.5}, X), rtol=1e-6)


def test_pending_output_passes_dropout_gates_and_sums_over_other_axes():
    def fn(p, x):
        h = jnp.einsum("bd,edf->ebf", x, p["w"])
        h = jnp.where(mask[:, None, None], h / 0.5, 0.0)
        gates = jnp.array([0.3, 0.7], jnp.float32)
        return x + jnp.einsum("ebf,e->bf", h, gates)

    mask = jnp.array([True, False])
    w = jax.random.normal(jax.random.key(1), (2, 4, 4), jnp.float32)
    tuned = {"w": Gain(base=w, w=jnp.full(4, 0.5, jnp.float32), axes="oio", where="residual")}
    with pytest.raises(ValueError, match="used by dot_general"):  # the experts' axis is an output axis here, and is summed
        pj.wrap(fn)(tuned, X)

    def batched(p, x):
        h = jax.vmap(lambda w, x: x @ w)(p["w"], jnp.stack([x, 2 * x]))
        return x + jnp.where(mask[:, None, None], h / 0.5, 0.0).sum(0)

    fields = jnp.array([[0.5] * 4, [0.1] * 4], jnp.float32)
    for where in ("output", "residual"):
        tuned = {"w": Gain(base=w, w=fields, axes="bio", where=where)}
        if where == "residual":  # the sum over experts takes the experts' own axis away
            with pytest.raises(ValueError, match="used by reduce_sum"):
                pj.wrap(batched)(tuned, X)
            continue
        want = batched({"w": w * (1 + fields)[:, None]}, X)
        np.testing.assert_allclose(pj.wrap(batched)(tuned, X), want, rtol=1e-5)


def test_inner_gradients_refuse_output_overlays():
    energy = lambda p, x: (jnp.tanh(x @ p["w"]) ** 2).sum()
    fn = lambda p, x: jax.grad(energy, 1)(p, x)
    with pytest.raises(ValueError, match="w lies inside a derivative"):
        pj.wrap(fn)({"w": gain(block_params()["up"])}, X)


def test_custom_vjp_and_shard_map_refuse_output_overlays():
    @jax.custom_vjp
    def f(w, x):
        return x @ w

    f.defvjp(lambda w, x: (f(w, x), (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))
    with pytest.raises(ValueError, match="w, used by custom_vjp_call"):
        pj.wrap(lambda p, x: f(p["w"], x))({"w": gain(block_params()["up"])}, X)


def table(p, ids):
    return p["table"][ids] @ p["w"]


def table_params(dtype=jnp.float32):
    rows = jnp.arange(10, dtype=jnp.float32).reshape(5, 2).astype(dtype)
    more = jnp.array([[100.0, 200.0], [300.0, 400.0]], jnp.float32)
    return {"table": Further(base=rows, more=more), "w": jnp.eye(2, dtype=dtype)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ids_beyond_the_vocabulary_read_the_further_rows(dtype):
    ids = jnp.array([[0, 5, 4], [6, 1, 5]])
    got = pj.wrap(table)(table_params(dtype), ids)
    longer = jnp.concatenate([table_params(dtype)["table"].base, table_params(dtype)["table"].more.astype(dtype)])
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(longer[ids], np.float32))


def test_table_passes_casts_names_and_jit_and_trains():
    def fn(p, ids):
        cast = checkpoint_name(p["table"].astype(jnp.bfloat16), "table")
        return jax.jit(lambda t, i: jnp.take(t, i, axis=0))(cast, ids).astype(jnp.float32).sum()

    trainable, frozen = pj.partition(table_params())
    grads = jax.grad(lambda t: pj.wrap(fn)(pj.combine(t, frozen), jnp.array([5, 5, 1])))(trainable)
    np.testing.assert_array_equal(grads["table"].more, [[2, 2], [0, 0]])


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda p, ids: (p["table"] * 2)[ids], "table, used by mul"),
        (lambda p, ids: p["w"] + 1, "never reached by the model.*table"),
        (lambda p, ids: p["table"][1:][ids], "cut or reversed before its lookup"),
    ],
)
def test_a_table_that_cannot_be_looked_up_raises(fn, message):
    with pytest.raises(ValueError, match=message):
        pj.wrap(fn)(table_params(), jnp.array([0, 5]))


def test_a_tied_head_gives_logits_of_the_vocabulary_alone():
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T
    ids = jnp.array([[0, 5, 4], [6, 1, 5]])
    params = table_params()
    longer = jnp.concatenate([params["table"].base, params["table"].more])
    got = pj.wrap(fn)(params, ids)
    np.testing.assert_allclose(got, jnp.tanh(longer[ids]) @ params["table"].base.T, rtol=1e-6)
    assert [e.how for e in pj.explain(fn, params, ids)] == ["acted", "left alone"]
    with pytest.raises(ValueError, match="never reached by the model.*table"):
        pj.wrap(lambda p, x: x @ p["table"].T)(params, jnp.ones((1, 2), jnp.float32))


def test_narrow_ids_raise():
    def lookup(p, ids):
        numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))
        return jax.lax.gather(p["table"], ids[:, None], numbers, (1, 2))

    params = {"table": Further(base=jnp.zeros((255, 2), jnp.float32), more=table_params()["table"].more)}
    with pytest.raises(ValueError, match="ids of uint8 cannot name 255 \\+ 2 rows"):
        pj.wrap(lookup)(params, jnp.array([0, 1], jnp.uint8))


def test_explain_lists_output_overlays():
    tuned = block_params()
    tuned["bias"] = gain(tuned["bias"], kernel="down", where="residual")
    events = pj.explain(residual_block, tuned, X)
    assert [(e.path, e.how, e.primitive) for e in events] == [("bias", "acted", "add"), ("bias", "met the residual", "add")]


@pytest.mark.parametrize("left", [False, True])
def test_a_one_hot_code_reads_the_further_rows(left):
    def fn(p, ids):
        if left:
            return jnp.einsum("vd,btv->btd", p["table"], (ids[..., None] == jnp.arange(5)[None, None]).astype(jnp.float32))
        return jax.nn.one_hot(ids, 5, dtype=jnp.float32) @ p["table"]

    ids = jnp.array([[0, 5, 4], [6, 1, 5]])
    params = table_params()
    longer = jnp.concatenate([params["table"].base, params["table"].more])
    np.testing.assert_array_equal(pj.wrap(fn)(params, ids), longer[ids])


@pytest.mark.parametrize("clip", [lambda x: jnp.clip(x, 0, 4), lambda x: jnp.minimum(x, 4), lambda x: x % 5])
def test_clipped_ids_raise(clip):
    with pytest.raises(ValueError, match="table, used by gather.*clipped or wrapped before"):
        pj.wrap(lambda p, ids: jnp.take(p["table"], clip(ids), axis=0))(table_params(), jnp.array([0, 5]))
