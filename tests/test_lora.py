"""LoRA and `unfreeze`: worked numbers of their formulas, their options, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import USUAL

import peftjax as pj
from peftjax.roles import Role, Roles

KEY = jax.random.key(0)
W = np.arange(12, dtype=np.float32).reshape(4, 3) / 10


def one(method, w=W, **options):
    role = Role("linear", options.pop("axes", "io"), 0, options.pop("uses", ("dot_general",)))
    return method.init(KEY, {"w": w}, Roles({"w": role}))["w"]


def times(p, x):
    return x @ p["w"]


def test_the_formula():
    """y = x W + (alpha / rank) (x A) B, by hand."""
    tuned = one(pj.lora(rank=2, alpha=6, targets="w"))
    a = np.array([[1, 0], [0, 1], [1, 1], [2, 0]], np.float32)
    b = np.array([[1, 2, 3], [0, -1, 1]], np.float32)
    x = np.array([[1, 2, 0, -1]], np.float32)
    # x A = [1 - 2, 2] = [-1, 2]; (x A) B = [-1, -4, -1]; times 6 / 2.
    want = x @ W + 3 * np.array([[-1, -4, -1]], np.float32)
    np.testing.assert_allclose(pj.wrap(times)({"w": tuned.replace(a=a, b=b)}, x), want, rtol=1e-6)
    np.testing.assert_allclose(pj.merge({"w": tuned.replace(a=a, b=b)})["w"], W + 3 * a @ b, rtol=1e-6)


def test_scales():
    assert float(one(pj.lora(rank=2, targets="w")).scale) == 1
    assert float(one(pj.lora(rank=2, alpha=6, targets="w")).scale) == 3
    np.testing.assert_allclose(one(pj.lora(rank=2, alpha=6, rslora=True, targets="w")).scale, 6 / np.sqrt(2), rtol=1e-6)


def test_kaiming_counts_real_inputs_only():
    """A is uniform in +-1/sqrt(in): of each layer's own inputs, drawn for each layer by itself."""
    tuned = one(pj.lora(rank=8, targets="w"), np.zeros((32, 256, 64), np.float32), axes="sio")
    assert tuned.a.shape == (32, 256, 8) and tuned.b.shape == (32, 8, 64) and tuned.scale.shape == (32,)
    bound = 1 / np.sqrt(256)
    assert np.abs(tuned.a).max() <= bound
    np.testing.assert_allclose(tuned.a.std(), bound / np.sqrt(3), rtol=0.02)
    assert len({float(layer[0, 0]) for layer in tuned.a}) == 32
    assert not tuned.b.any()


def test_gaussian_and_zero_a():
    wide = np.zeros((400, 300), np.float32)
    gaussian = one(pj.lora(rank=4, init="gaussian", targets="w"), wide)
    np.testing.assert_allclose(gaussian.a.std(), 1 / 4, rtol=0.05)
    zero_a = one(pj.lora(rank=4, init="zero_a", targets="w"), wide)
    assert not zero_a.a.any() and 0 < np.abs(zero_a.b).max() <= 1 / 2


@pytest.mark.parametrize("alpha", [2, 6, -6])
def test_pissa_takes_the_largest_directions(alpha):
    tuned = one(pj.lora(rank=2, alpha=alpha, init="pissa", targets="w"))
    u, s, v = np.linalg.svd(W)
    np.testing.assert_allclose(tuned.scale * (tuned.a @ tuned.b), u[:, :2] * s[None, :2] @ v[:2], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(tuned.a, axis=0), np.sqrt(s[:2] / abs(alpha / 2)), rtol=1e-4)
    assert tuned.base is W


def test_olora_takes_the_qr_factors():
    tuned = one(pj.lora(rank=2, init="olora", targets="w"))
    q, r = np.linalg.qr(W.T)
    np.testing.assert_allclose(tuned.a @ tuned.b, (q[:, :2] @ r[:2]).T, atol=1e-5)


def test_orthogonal_starts_at_nothing_with_neither_factor_zero():
    tuned = one(pj.lora(rank=2, init="orthogonal", targets="w"))
    assert tuned.a.any() and tuned.b.any()
    assert np.abs(tuned.a @ tuned.b).max() < 1e-6
    for method in (pj.lora, pj.dora):
        with pytest.raises(ValueError, match=f"^{method.__name__}: init 'orthogonal' needs an even rank, found 3 at w"):
            one(method(rank=3, init="orthogonal", targets="w"))


def test_fields_take_the_place_of_axes():
    heads = np.zeros((6, 2, 5), np.float32)
    shapes = {axes: one(pj.lora(rank=2, targets="w"), heads, axes=axes) for axes in ("ioo", "iio", "soi")}
    assert (shapes["ioo"].a.shape, shapes["ioo"].b.shape) == ((6, 2), (2, 2, 5))
    assert (shapes["iio"].a.shape, shapes["iio"].b.shape) == ((6, 2, 2), (2, 5))
    assert (shapes["soi"].a.shape, shapes["soi"].b.shape) == ((6, 2, 5), (6, 2, 2))


def test_patterns_choose_rank_and_alpha():
    params = {"q": {"kernel": W}, "v": {"kernel": W}}
    method = pj.lora(rank=1, alpha=2, targets=("q", "v"), rank_pattern={"q": 3, ".*": 2}, alpha_pattern={"v": 8})
    tuned = method.init(KEY, params)
    assert tuned["q"]["kernel"].a.shape == (4, 3) and tuned["v"]["kernel"].a.shape == (4, 2)
    np.testing.assert_allclose([tuned["q"]["kernel"].scale, tuned["v"]["kernel"].scale], [2 / 3, 4], rtol=1e-6)
    with pytest.raises(ValueError, match="qq"):
        pj.lora(targets=("q", "v"), rank_pattern={"qq": 3}).init(KEY, params)


def test_layers_of_a_stack():
    stack = np.ones((3, 4, 3), np.float32)
    tuned = one(pj.lora(rank=2, alpha=4, targets="w", layers=(0, 2)), stack, axes="sio")
    np.testing.assert_array_equal(tuned.scale, [2, 0, 2])
    with pytest.raises(ValueError, match=r"layers \[3\] at w; it stacks 3 layers, 0 to 2"):
        one(pj.lora(rank=2, targets="w", layers=(3,)), stack, axes="sio")
    with pytest.raises(ValueError, match=r"layers=\(\) at w: no layer would train"):
        one(pj.lora(rank=2, targets="w", layers=()), stack, axes="sio")
    with pytest.raises(ValueError, match="at w, which is not stacked"):
        one(pj.lora(rank=2, targets="w", layers=(0,)))


def test_lora_fa_trains_b_alone():
    tuned = {"w": one(pj.lora(rank=2, targets="w", train_a=False))}
    assert list(pj.extract(tuned)) == ["w/b"]


def test_a_bias_of_b_is_added_to_the_layers_own():
    """y = x W + b + s (x A B + c), with s = alpha / rank = 3."""
    params, x = {"w": W, "b": np.ones(3, np.float32)}, np.ones((2, 4), np.float32)
    fn = lambda p, x: x @ p["w"] + p["b"][None]
    tuned = pj.lora(rank=2, alpha=6, targets="w", bias=True).init(KEY, params, pj.roles(fn, params, x))
    assert set(pj.extract(tuned)) == {"w/a", "w/b", "b/shift"} and tuned["b"].shift.shape == (3,)
    np.testing.assert_array_equal(pj.wrap(fn)(tuned, x), fn(params, x))
    a, b, c = np.ones((4, 2), np.float32), np.full((2, 3), 0.5, np.float32), np.array([1, -2, 3], np.float32)
    tuned = pj.insert(tuned, {"w/a": a, "w/b": b, "b/shift": c})
    for factor in (1, 0.5, 0):
        want = fn(params, x) + factor * 3 * (x @ a @ b + c)
        np.testing.assert_allclose(pj.wrap(fn)(pj.scale(tuned, factor), x), want, rtol=1e-6)
    np.testing.assert_allclose(pj.merge(tuned)["b"], 1 + 3 * c)


def test_a_bias_of_b_needs_one_of_the_layer():
    params, x = {"w": W, "b": np.ones(3, np.float32)}, np.ones((2, 4), np.float32)
    method, start = (
        pj.lora(rank=2, targets="w", bias=True),
        lambda fn: method.init(KEY, params, pj.roles(fn, params, x)),
    )
    with pytest.raises(ValueError, match="bias=True at w, to whose output no bias is added"):
        start(lambda p, x: jnp.tanh(x @ p["w"]) + p["b"][None])
    with pytest.raises(ValueError, match="bias=True at w, whose bias b is added to something else too"):
        start(lambda p, x: x @ p["w"] + p["b"][None] + jnp.sin(x[:, :3] + p["b"][None]))
    with pytest.raises(ValueError, match="pass `roles="):
        method.init(KEY, params)


def tied(p, ids):
    return p["w"][ids] @ p["w"].T


def test_some_uses_only():
    """A LoRA on the lookup of a tied table leaves the head as it is, and does not merge while the table is tied."""
    table = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    ids = jnp.array([1, 6])
    roles = pj.roles(tied, {"w": table}, ids)
    tuned = pj.lora(rank=2, targets="w", uses=("gather",)).init(KEY, {"w": table}, roles)
    tuned["w"] = tuned["w"].replace(b=jnp.ones((2, 4), jnp.float32))
    longer = table + np.asarray(tuned["w"].a @ tuned["w"].b)
    np.testing.assert_allclose(pj.wrap(tied)(tuned, ids), longer[np.asarray(ids)] @ table.T, rtol=1e-5)
    with pytest.raises(ValueError, match="w.*"):
        pj.merge(tuned)


def test_uses_that_a_leaf_does_not_have():
    """An update that never acts would be merged all the same; which uses there are, only roles know."""
    table = {"w": np.ones((7, 4), np.float32)}
    roles = pj.roles(tied, table, jnp.array([1, 6]))
    for uses, message in {
        ("gahter",): r"uses=\('gahter',\) at w, which the model uses in gather, .*dot_general \(nearest: gather\)",
        ("gather", "conv"): r"uses=\('gather', 'conv'\) at w, .*nearest: none",
        "gather": r"lora: uses='gather'; expected a sequence of strings",
        (): r"uses=\(\) at w; expected one at least",
    }.items():
        with pytest.raises(ValueError, match=message):
            pj.lora(rank=2, targets="w", uses=uses).init(KEY, table, roles)
    with pytest.raises(ValueError, match=r"uses=\('gather',\) at w, and only roles know its uses: pass `roles="):
        pj.lora(rank=2, targets="w", uses=("gather",)).init(KEY, table)


def test_explain_says_which_uses_are_left_alone():
    table, ids = {"w": np.ones((7, 4), np.float32)}, jnp.array([1, 6])
    tuned = pj.lora(rank=2, targets="w", uses=("gather",)).init(KEY, table, pj.roles(tied, table, ids))
    said = [(e.how, e.primitive) for e in pj.explain(tied, tuned, ids)]
    assert said == [("acted", "gather"), ("left alone", "dot_general")]


def test_dropout_acts_with_a_key_and_keeps_the_mean():
    x = np.ones((4000, 4), np.float32)
    tuned = {"w": one(pj.lora(rank=2, targets="w", dropout=0.5)).replace(b=jnp.ones((2, 3), jnp.float32))}
    quiet = pj.wrap(times)(tuned, x)
    noisy = pj.wrap(times)(pj.with_key(tuned, KEY), x)
    assert np.abs(noisy - quiet).max() > 0.1
    np.testing.assert_allclose(noisy.mean(0), quiet.mean(0), atol=0.05)
    np.testing.assert_array_equal(noisy, pj.wrap(times)(pj.with_key(tuned, KEY), x))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "rank 0 at w.*expected 1 to 3"),
        (dict(rank=4), "rank 4 at w.*expected 1 to 3"),
        (dict(init="svd"), "unknown init 'svd'; expected one of kaiming"),
        (dict(rank=2.5), "lora: rank=2.5; expected an integer"),
        (dict(rank="8"), "lora: rank='8'; expected an integer"),
        (dict(rank=True), "lora: rank=True; expected an integer"),
        (dict(alpha="16"), "lora: alpha='16'; expected a finite number, or None"),
        (dict(alpha=0), "lora: alpha=0; expected no 0"),
        (dict(alpha=float("inf")), "lora: alpha=inf; expected a finite number"),
        (dict(alpha=float("nan")), "lora: alpha=nan; expected a finite number"),
        (dict(rank_pattern={"w": 3.5}), "rank_pattern={'w': 3.5}; expected a mapping of strings to integers"),
        (dict(alpha_pattern={"w": 0.0}), "alpha_pattern={'w': 0.0}; expected no 0"),
        (dict(layers=(0, 1.0)), r"layers=\(0, 1.0\); expected a sequence of integers"),
        (dict(layers="01"), "layers='01'; expected a sequence"),
        (dict(layers=(True,)), r"layers=\(True,\); expected a sequence"),
        (dict(init="zero_a", train_a=False), "init='zero_a' A is 0, and with train_a=False it stays so"),
        (dict(dropout=1.0), "a rate in \\[0, 1\\), found 1.0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        one(pj.lora(targets="w", **options))


def test_options_are_checked_by_what_a_method_says_of_them():
    for method in (pj.dora, pj.loha, pj.lokr, pj.vera, pj.reft, pj.oft):
        with pytest.raises(ValueError, match=f"{method.__name__}: rank=2.5; expected an integer"):
            method(rank=2.5)
    for method in (pj.dora, pj.loha, pj.lokr):
        with pytest.raises(ValueError, match=f"{method.__name__}: alpha=0; expected no 0"):
            method(alpha=0)
    numpy = pj.lora(rank=np.int32(2), alpha=np.float32(6), targets=np.array(["w"]), layers=range(2))
    assert numpy == pj.lora(rank=2, alpha=6.0, targets=("w",), layers=(0, 1))
    assert pj.method.from_dict(numpy.to_dict()) == numpy


def test_methods_are_values():
    method = pj.chain(pj.lora(rank=2, targets=["q", "v"], rank_pattern={"q": 3}), pj.unfreeze("head"))
    again = pj.method.from_dict(method.to_dict())
    assert again == method and hash(again) == hash(method)
    with pytest.raises(ValueError, match="cannot be saved; use patterns"):
        pj.lora(targets=lambda path, role: True).to_dict()
    with pytest.raises(ValueError, match="unknown method 'lorra'"):
        pj.method.from_dict({"name": "lorra", "options": {}})
    with pytest.raises(ValueError, match="method 'lora'.*rnk"):
        pj.method.from_dict({"name": "lora", "options": {"rnk": 2}})


def network(p, x):
    h = jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"][None])
    h = (h - h.mean(-1, keepdims=True)) * p["norm"]["scale"][None]
    h = jnp.tanh(h @ p["second"]["kernel"] + p["second"]["bias"][None])
    return h @ p["last"]["kernel"] + p["last"]["bias"][None]


def layer(n_in, n_out):
    return {"kernel": np.ones((n_in, n_out), np.float32), "bias": np.zeros(n_out, np.float32)}


NETWORK = {"first": layer(4, 5), "norm": {"scale": np.ones(5, np.float32)}, "second": layer(5, 5), "last": layer(5, 2)}


@pytest.mark.parametrize(
    "method, trained",
    [
        (pj.bitfit(), {"first/bias", "second/bias", "last/bias"}),
        (pj.layer_norm(), {"norm/scale"}),
        (pj.head(), {"last/kernel", "last/bias"}),
        (pj.last_layers(2), {"second/kernel", "second/bias", "last/kernel", "last/bias"}),
        (pj.full(), {f"{m}/{n}" for m in NETWORK for n in NETWORK[m]}),
    ],
)
def test_the_sentences_over_unfreeze(method, trained):
    x = np.ones((2, 4), np.float32)
    tuned = method.init(KEY, NETWORK, pj.roles(network, NETWORK, x))
    assert {name.removesuffix("/value") for name in pj.extract(tuned)} == trained
    run = lambda fn, params: jax.jit(fn, compiler_options=USUAL)(params, x)
    np.testing.assert_array_equal(run(pj.wrap(network), tuned), run(network, NETWORK))


def test_what_the_sentences_refuse():
    with pytest.raises(ValueError, match="head counts on what the model does"):
        pj.head().init(KEY, NETWORK)
    with pytest.raises(ValueError, match="n=9, and the model has 3 layers"):
        pj.last_layers(9).init(KEY, NETWORK, pj.roles(network, NETWORK, np.ones((2, 4), np.float32)))
    with pytest.raises(ValueError, match="w already holds LoRA"):
        pj.chain(pj.lora(rank=1, targets="w"), pj.unfreeze("w")).init(KEY, {"w": W})
    with pytest.raises(ValueError, match="^full: w already holds LoRA"):
        pj.chain(pj.lora(rank=1, targets="w"), pj.full()).init(KEY, {"w": W})


def test_a_bfloat16_leaf_trains_in_float32():
    tuned = pj.unfreeze("w").init(KEY, {"w": jnp.ones((2, 2), jnp.bfloat16)})["w"]
    assert tuned.value.dtype == jnp.float32 and pj.merge({"w": tuned})["w"].dtype == jnp.bfloat16
