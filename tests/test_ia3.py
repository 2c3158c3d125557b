"""IA3: worked numbers of its two placements, biases that scale with their kernels, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from jax import lax
from laws import moved
from peftjax.overlay import Ref, is_overlay
from peftjax.paths import flatten
from peftjax.tree import map_layers
from zoo import MODELS

KEY = jax.random.key(0)
W = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
B = np.array([1, -1, 2], np.float32)
X = np.array([[1, 2, 0, -1], [0, 1, 1, 3]], np.float32)
L = np.array([2, 1, -0.5], np.float32)
M = np.array([1, 0, 3, 0.5], np.float32)


def linear(p, x):
    return x @ p["key"]["kernel"] + p["key"]["bias"][None]


PARAMS = {"key": {"kernel": W, "bias": B}}


def start(method, fn=linear, params=PARAMS, x=X):
    return method.init(KEY, params, pj.roles(fn, params, x))


def test_outputs_are_scaled_with_their_bias():
    """y = l * (x W + b)."""
    tuned = pj.insert(start(pj.ia3(("key",))), {"key/kernel/vector": L})
    want = np.array([[(X[n] @ W[:, k] + B[k]) * L[k] for k in range(3)] for n in range(2)])
    np.testing.assert_allclose(pj.wrap(linear)(tuned, X), want, rtol=1e-6)
    merged = pj.merge(tuned)
    np.testing.assert_allclose(merged["key"]["kernel"], W * L[None], rtol=1e-6)
    np.testing.assert_allclose(merged["key"]["bias"], B * L, rtol=1e-6)


def test_inputs_are_scaled_and_the_bias_is_not():
    """y = (m * x) W + b, also where both sets of targets name the kernel."""
    for method in (pj.ia3((), ("key",)), pj.ia3(("key",), ("key",))):
        tuned = pj.insert(start(method), {"key/kernel/vector": M})
        np.testing.assert_allclose(pj.wrap(linear)(tuned, X), (X * M[None]) @ W + B[None], rtol=1e-6)
        assert tuned["key"]["bias"] is B
        np.testing.assert_allclose(pj.merge(tuned)["key"]["kernel"], M[:, None] * W, rtol=1e-6)


def test_it_starts_at_one_and_changes_nothing():
    tuned = start(pj.ia3(("key",)))
    np.testing.assert_array_equal(tuned["key"]["kernel"].vector, np.ones(3))
    merged = pj.merge(tuned)["key"]
    np.testing.assert_array_equal(merged["kernel"], W)
    np.testing.assert_array_equal(merged["bias"], B)


def test_a_kernel_and_its_bias_share_one_vector_and_one_gradient():
    tuned = pj.insert(start(pj.ia3(("key",))), {"key/kernel/vector": L})
    assert tuned["key"]["bias"].vector == Ref("key/kernel", "vector", 0)
    assert list(pj.extract(tuned)) == ["key/kernel/vector"] and pj.count(tuned).trainable == 3
    _, grads = pj.value_and_grad(lambda t: pj.wrap(linear)(t, X).sum())(tuned)
    np.testing.assert_allclose(grads["key"]["kernel"].vector, (X @ W + B[None]).sum(0), rtol=1e-6)


def test_the_scale_moves_the_vector_towards_one():
    tuned = pj.insert(start(pj.ia3(("key",))), {"key/kernel/vector": L})
    half = pj.wrap(linear)(pj.scale(tuned, 0.5), X)
    np.testing.assert_allclose(half, (X @ W + B[None]) * (0.5 + 0.5 * L)[None], rtol=1e-6)
    np.testing.assert_array_equal(pj.wrap(linear)(pj.disable(tuned), X), jax.jit(linear)(PARAMS, X))


@pytest.mark.parametrize("model", ["linen_scan", "linen_vmap_dense"])
def test_stacked_layers_and_experts_have_a_scale_each(model):
    """Half, none and all of the change: as if each layer's own vector had been moved towards one by its own scale."""
    fn, params, args = MODELS[model].make()
    roles = pj.roles(fn, params, *args)
    tuned = moved(pj.ia3(MODELS[model].targets).init(KEY, params, roles), 0)
    held = {path: x for path, x in flatten(tuned) if is_overlay(x)}
    letter, count = next((x, n) for p, y in held.items() for x, n in zip(roles[p].axes, y.type.shape) if x in "sb")
    by = np.linspace(0, 1, count, dtype=np.float32)

    def scales(path, x):
        assert x.scale.shape == tuple(n for n, axis in zip(x.type.shape, roles[path].axes) if axis in "sb")
        return x.replace(scale=by)

    own = {}
    for key, vector in pj.extract(tuned).items():
        axes = held[key.rpartition("/")[0]].labels()["vector"]
        where = [roles[key.rpartition("/")[0]].axes[k] for (k,) in axes].index(letter)
        shape = [-1 if k == where else 1 for k in range(vector.ndim)]
        own[key] = 1 + by.reshape(shape) * (vector - 1)
    found = pj.wrap(fn)(map_layers(scales, tuned), *args)
    np.testing.assert_allclose(found, pj.wrap(fn)(pj.insert(tuned, own), *args), atol=2e-6 * np.abs(found).max())
    assert np.abs(np.asarray(found) - pj.wrap(fn)(tuned, *args)).max() > 1e-3


def test_the_bias_stays_with_its_kernel_in_a_folder(tmp_path):
    method, roles = pj.ia3(("key",)), pj.roles(linear, PARAMS, X)
    tuned = pj.insert(method.init(KEY, PARAMS, roles), {"key/kernel/vector": L})
    pj.save(tmp_path / "adapter", tuned, method, roles)
    again = pj.load(tmp_path / "adapter", PARAMS)
    np.testing.assert_array_equal(pj.wrap(linear)(again, X), pj.wrap(linear)(tuned, X))


HEADS = {"w": W.reshape(4, 3, 1).repeat(2, 2), "bias": np.arange(6, dtype=np.float32)}


def test_a_bias_that_lies_along_two_axes():
    """Heads of which the bias is one flat vector."""

    def fn(p, x):
        return jnp.einsum("bd,dhk->bhk", x, p["w"]).reshape(-1, 6) + p["bias"][None]

    tuned = start(pj.ia3(("w",)), fn, HEADS)
    assert tuned["w"].vector.shape == (3, 2)
    vector = np.arange(6, dtype=np.float32).reshape(3, 2)
    got = pj.wrap(fn)(pj.insert(tuned, {"w/vector": vector}), X)
    np.testing.assert_allclose(got, fn(HEADS, X) * vector.reshape(1, 6), rtol=1e-6)


def test_layers_of_a_stack_have_their_own_vectors():
    params = {"w": np.stack([W[:3], W[1:]]), "bias": np.stack([B, -B])}

    def fn(p, x):
        return lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["bias"][None]), None), x, p)[0]

    x = X[:, :3]
    tuned = start(pj.ia3(("w",)), fn, params, x)
    assert tuned["w"].vector.shape == (2, 3)
    vectors = np.stack([L, L[::-1]])
    want = x
    for w, b, v in zip(params["w"], params["bias"], vectors):
        want = np.tanh((want @ w + b[None]) * v[None])
    np.testing.assert_allclose(pj.wrap(fn)(pj.insert(tuned, {"w/vector": vectors}), x), want, rtol=1e-5)


@pytest.mark.parametrize("inputs", [False, True])
def test_a_convolution_scales_channels(inputs):
    example = MODELS["linen_conv"].make()
    method = pj.ia3((), ("kernel",)) if inputs else pj.ia3(("kernel",))
    tuned = moved(
        method.init(KEY, example.params, pj.roles(example.fn, example.params, *example.args)),
        0,
    )
    vector = np.asarray(tuned["kernel"].vector)
    assert vector.shape == (4 if inputs else 6,)
    (x,) = example.args
    row = vector[None, None, None]
    want = example.fn(example.params, x * row) if inputs else example.fn(example.params, x) * row
    np.testing.assert_allclose(pj.wrap(example.fn)(tuned, x), want, rtol=1e-4, atol=1e-5)
    assert {event.path for event in pj.explain(example.fn, tuned, x).merged} <= {"bias"}


def test_two_biases_of_one_kernel():
    fn = lambda p, x: x @ p["w"] + (p["b1"] + p["b2"])[None]
    params = {"w": W, "b1": B, "b2": 2 * B}
    tuned = pj.insert(start(pj.ia3(("w",)), fn, params), {"w/vector": L})
    np.testing.assert_allclose(pj.wrap(fn)(tuned, X), fn(params, X) * L[None], rtol=1e-6)


def test_an_output_of_one_feature():
    params = {"key": {"kernel": W[:, :1], "bias": B[:1]}}
    tuned = pj.insert(start(pj.ia3(("key",)), params=params), {"key/kernel/vector": L[:1]})
    np.testing.assert_allclose(pj.wrap(linear)(tuned, X), linear(params, X) * L[0], rtol=1e-6)


def test_over_and_under_other_overlays():
    """A LoRA over IA3 is not scaled; one under it is."""
    rows = {"a": np.ones((4, 1), np.float32), "b": np.ones((1, 3), np.float32)}
    lora = pj.lora(rank=1, targets="key/kernel")
    outer = start(pj.chain(pj.ia3(("key",)), lora))["key"]
    inner = start(pj.chain(lora, pj.ia3("key/kernel")))["key"]
    kernels = (
        outer["kernel"].replace(**rows, base=outer["kernel"].base.replace(vector=L)),
        inner["kernel"].replace(vector=L, base=inner["kernel"].base.replace(**rows)),
    )
    sums = X.sum(1, keepdims=True)
    for kernel, want in zip(
        kernels,
        ((X @ W + B[None]) * L[None] + sums, (X @ W + sums + B[None]) * L[None]),
    ):
        tuned = {"key": {"kernel": kernel, "bias": outer["bias"]}}
        np.testing.assert_allclose(pj.wrap(linear)(tuned, X), want, rtol=1e-6)
        np.testing.assert_allclose(linear(pj.merge(tuned), X), want, rtol=1e-6)


def refuses(method, fn, params, *words):
    with pytest.raises(ValueError) as caught:
        start(method, fn, params)
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_what_it_refuses():
    with pytest.raises(ValueError, match="biases with their kernels: pass `roles="):
        pj.ia3(("key",)).init(KEY, PARAMS)
    refuses(
        pj.chain(pj.ia3(("key",)), pj.ia3("key/kernel")),
        linear,
        PARAMS,
        "key/kernel already holds IA3",
        "trains; `peftjax.lock`",
    )
    twice = lambda p, x: (x @ p["w"] + p["b"][None]) @ p["v"] + p["b"][None]
    shared = {"w": W, "b": B, "v": np.eye(3, dtype=np.float32)}
    refuses(
        pj.ia3(("w",)),
        twice,
        shared,
        "b [3] cannot scale with its kernel w [4, 3]",
        "added to something else too",
        "exclude",
    )
    wide = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]) + p["b"][None, None]
    refuses(
        pj.ia3(("w",)),
        wide,
        {"w": HEADS["w"], "b": B[:2]},
        "b [2] cannot scale",
        "w [4, 3, 2]",
        "does not lie along",
    )
    refuses(
        pj.ia3((), ("w",)),
        lambda p, x: p["w"][jnp.array([0, 1])],
        {"w": W},
        "w is looked up",
    )
    example = MODELS["linen_conv_grouped"].make()
    with pytest.raises(ValueError, match="kernel is a convolution of 2 groups"):
        pj.ia3((), ("kernel",)).init(KEY, example.params, pj.roles(example.fn, example.params, *example.args))
    with pytest.raises(TypeError, match="targets"):
        pj.ia3()


def test_a_layer_that_runs_twice_keeps_its_bias():
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["w"] + p["b"][None]
    params = {"w": W[:3], "b": B}
    tuned = pj.insert(start(pj.ia3(("w",)), fn, params, X[:, :3]), {"w/vector": L})
    once = lambda x: (x @ W[:3] + B[None]) * L[None]
    np.testing.assert_allclose(pj.wrap(fn)(tuned, X[:, :3]), once(np.tanh(once(X[:, :3]))), rtol=1e-5)


def test_on_a_bias_that_something_sits_on():
    """The bias may hold a copy, an adapter or a locked IA3: vectors multiply, each bias by those of its own kernel."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4) / 7
    roles = pj.roles(linear, PARAMS, x)
    first = pj.ia3(("key",)).init(KEY, PARAMS, roles)
    first = pj.insert(first, {"key/kernel/vector": np.float32([1, 2, 3])})
    tuned = pj.ia3(("key",)).init(KEY, pj.lock(first), roles)
    assert set(pj.extract(tuned)) == {"key/kernel/vector"}
    tuned = pj.insert(tuned, {"key/kernel/vector": np.float32([2, 1, -1])})
    for got in (pj.wrap(linear)(tuned, x), linear(pj.merge(tuned), x)):
        np.testing.assert_allclose(got, linear(PARAMS, x) * np.float32([2, 2, -3]), rtol=1e-6)
    for below in (pj.bitfit(), pj.adapter("houlsby", bottleneck=2, targets="key"), pj.lora(rank=2, bias=True)):
        tuned = pj.chain(below, pj.ia3(("key",))).init(KEY, PARAMS, roles)
        tuned = pj.insert(tuned, pj.extract(tuned) | {"key/kernel/vector": np.float32([2, 1, -1])})
        want = linear(PARAMS, x) * np.float32([2, 1, -1])
        np.testing.assert_allclose(
            pj.wrap(linear)(tuned, x), want, rtol=1e-5, atol=1e-4 if below.name == "adapter" else 0
        )
