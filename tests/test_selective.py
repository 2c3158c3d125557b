"""Biases, norms, the head, the last layers, everything: which leaves each trains, and what it says where there are none."""

import importlib
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax as pj
from peftjax.overlay import is_overlay

KEY = jax.random.key(0)


def found(method, fn, params, *args):
    """The leaves that a method trains."""
    roles = pj.roles(fn, params, *args)
    tuned = jax.eval_shape(lambda key, params: method.init(key, params, roles), KEY, params)
    return {name.removesuffix("/value") for name in pj.extract(tuned)}


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(1, 4, (3,), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.unused = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.dropout(self.norm(self.conv(x)))))


@pytest.fixture(scope="module")
def nnx_network():
    """A network with its statistics and random keys among its parameters."""
    graph, params = nnx.split(Network(nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), params, np.ones((2, 5, 1), np.float32)


NORM, CONV, HEAD = ({f"{name}/{leaf}" for leaf in leaves} for name, leaves in (
    ("norm", ("scale", "bias")), ("conv", ("kernel", "bias")), ("head", ("kernel", "bias"))
))  # fmt: skip


@pytest.mark.parametrize(
    "method, want",
    [
        (pj.layer_norm(), NORM),
        (pj.head(), HEAD),
        (pj.last_layers(1), HEAD),
        (pj.last_layers(2), CONV | NORM | HEAD),
        (pj.bitfit(), {"norm/bias", "conv/bias", "head/bias"}),
        (pj.full(), CONV | NORM | HEAD),
        (pj.full(exclude=("norm",)), CONV | HEAD),
    ],
)
def test_statistics_keys_and_what_is_unused_stay(method, want, nnx_network):
    assert found(method, *nnx_network) == want


def test_statistics_in_a_collection_of_their_own():
    module = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.Dense(2)])
    x = np.ones((2, 4), np.float32)
    params = jax.eval_shape(module.init, KEY, x)
    assert found(pj.full(), module.apply, params, x) == {
        f"params/layers_{k}/{leaf}" for k, leaf in ((0, "kernel"), (0, "bias"), (1, "scale"), (1, "bias"), (2, "kernel"), (2, "bias"))
    }  # fmt: skip
    assert found(pj.layer_norm(), module.apply, params, x) == {"params/layers_1/scale", "params/layers_1/bias"}


def flat(p, x):
    """A post-LN layer whose leaves share no module, and a head."""
    s = x + (jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None])
    s = s - s.mean(-1, keepdims=True)
    s = s / jnp.sqrt((s**2).mean(-1, keepdims=True) + 1e-5) * p["gain"][None] + p["shift"][None]
    return s @ p["out"] + p["b_out"][None]


FLAT = {name: np.ones((4, 4), np.float32) for name in ("w1", "w2", "out")}
FLAT |= {name: np.ones(4, np.float32) for name in ("b1", "b2", "b_out", "gain", "shift")}


def test_a_tree_without_modules(capsys):
    x = np.ones((2, 4), np.float32)
    assert found(pj.layer_norm(), flat, FLAT, x) == {"gain", "shift"}
    assert found(pj.head(), flat, FLAT, x) == {"out", "b_out"}
    assert found(pj.last_layers(1), flat, FLAT, x) == {"out", "b_out"}
    assert found(pj.last_layers(2), flat, FLAT, x) == {"w2", "b2", "gain", "shift", "out", "b_out"}
    said = capsys.readouterr().out
    assert said == "last_layers(1): out\nlast_layers(2): w2, gain, shift, out\n"


def test_a_scale_of_a_weight_or_of_a_kernels_output_is_no_norm():
    fn = lambda p, x: x @ p["w"] * p["layer_scale"]["gamma"][None] @ (p["v"]["kernel"] * p["v"]["g"][None])
    w, g = np.ones((4, 4), np.float32), np.ones(4, np.float32)
    params = {"w": w, "layer_scale": {"gamma": g}, "v": {"kernel": w, "g": g}}
    with pytest.raises(ValueError, match="layer_norm: the model has no norm that roles can tell"):
        found(pj.layer_norm(), fn, params, np.ones((2, 4), np.float32))


def test_what_is_not_there_is_said():
    fn, params, x = (
        lambda p, x: x @ p["w"] + p["b"][None],
        {"w": np.ones((2, 2), np.float32)},
        np.ones((1, 2), np.float32),
    )
    params["b"] = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="head: the model has no output head"):
        found(pj.head(), fn, params, x)
    with pytest.raises(
        ValueError, match="bitfit: the model has no leaf whose name ends in 'bias'; by their roles, b are"
    ):
        found(pj.bitfit(), fn, params, x)
    with pytest.raises(ValueError, match="full: of the leaves that it names"):
        pj.full().init(KEY, {"steps": np.zeros((), np.int32)})
    for method in (pj.layer_norm(), pj.head(), pj.last_layers(1)):
        with pytest.raises(ValueError, match=f"{method.name} counts on .*pass `roles="):
            method.init(KEY, params)


def test_a_module_called_bias_holds_no_bias():
    """T5's relative positions are such a table."""
    table = {"relative_attention_bias": {"embedding": np.ones((3, 2), np.float32)}}
    with pytest.raises(ValueError, match="bitfit: the model has no leaf whose name ends in 'bias'"):
        pj.bitfit().init(KEY, table)
    tuned = pj.bitfit().init(KEY, table | {"bias": np.ones(2, np.float32)})
    assert set(pj.extract(tuned)) == {"bias/value"}


def test_a_copy_starts_from_what_is_locked_below():
    """And keeps an overlay of outputs that is on the leaf."""
    params, x = {"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)}, np.ones((1, 3), np.float32)
    fn = lambda p, x: x @ p["w"] + p["b"][None]
    lora = pj.lora(rank=1, targets="w").init(KEY, params)
    lora = pj.insert(lora, {name: y + 0.5 for name, y in pj.extract(lora).items()})
    tuned = pj.unfreeze("w").init(KEY, pj.lock(lora))
    np.testing.assert_allclose(tuned["w"].value, pj.merge(lora)["w"], rtol=1e-6)
    moved = pj.insert(tuned, {"w/value": tuned["w"].value + 1})
    np.testing.assert_allclose(
        pj.wrap(fn)(pj.scale(moved, 0.5), x), fn({**params, "w": _half(lora) + 0.5}, x), rtol=1e-5
    )
    assert pj.strip(moved)["w"] is params["w"]
    roles = pj.roles(fn, params, x)
    both = pj.chain(pj.adapter("houlsby", bottleneck=1, targets="w"), pj.unfreeze("b")).init(KEY, params, roles)
    assert is_overlay(both["b"].base) and {"b/value", "b/base/down"} <= set(pj.extract(both))
    kept = pj.insert(both, pj.extract(both) | {"b/value": np.float32([3, 4])})
    apart = pj.wrap(fn)(pj.adapter("houlsby", bottleneck=1, targets="w").init(KEY, params, roles), x) - fn(params, x)
    np.testing.assert_allclose(pj.wrap(fn)(kept, x), fn(params | {"b": np.float32([3, 4])}, x) + apart, rtol=1e-2)


def _half(lora):
    """What the copy and the locked LoRA make at half the scale of both."""
    return (pj.merge(lora)["w"] + pj.merge(pj.scale(lora, 0.5))["w"]) / 2


def test_a_file_of_a_method_is_short():
    folder = pathlib.Path(importlib.import_module("peftjax.methods").__file__).parent
    long = {path.name: n for path in folder.glob("*.py") if (n := len(path.read_text().splitlines())) > 200}
    assert not long and len(list(folder.glob("*.py"))) > 10
