"""Adapters: AdapterHub's saved files on unmodified models, the equations at tiny sizes, and what is refused."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from covers import covered, some
from golden_models import GOLDEN as FILES
from golden_models import flax_tree
from safetensors.numpy import load_file
from test_flax_models import CASES, built, clip_of_old, stepping, transformers  # noqa: F401

import peftjax as pj
from trees import away
from peftjax.bottleneck import ACTIVATIONS
from peftjax.paths import flatten
from peftjax.roles import Norm

GOLDEN = FILES / "adapterhub"
KINDS = {
    "double_seq_bn": "houlsby",
    "seq_bn": "pfeiffer",
    "par_bn": "parallel",
    "scaled_par_bn": "scaled_parallel",
}
MODELS = {
    "bert": ("BertConfig", "FlaxBertModel", "last_hidden_state"),
    "llama": ("LlamaConfig", "FlaxLlamaForCausalLM", "logits"),
}


def loaded(name):
    """A model of transformers as a function of its saved parameters, and the arguments of the saved results."""
    config, model, output = MODELS[name]
    config = getattr(transformers, config).from_json_file(GOLDEN / name / "base" / "config.json")
    model = getattr(transformers, model)(config, _do_init=False)
    params = flax_tree(load_file(GOLDEN / name / "base" / "model.safetensors"), model.params_shape_tree)
    base = np.load(GOLDEN / name / "base" / "ref.npz")
    fn = lambda params, ids, mask: model(ids, attention_mask=mask, params=params, train=False)[output]
    return fn, params, (jnp.asarray(base["input_ids"]), jnp.asarray(base["mask"]))


def filled(name, tuned, tensors):
    """The tree with the tensors of a file of AdapterHub's, each of which has to be used."""
    flat, used = {}, set()
    for key in pj.extract(tuned):
        path, _, field = key.rpartition("/")
        *module, _ = path.split("/")
        if name == "bert":
            module = [*module[:-1], "adapters", "t"]
        else:
            module = [
                *module[:-2],
                {"o_proj": "attention", "down_proj": "output"}[module[-1]] + "_adapters",
                "adapters",
                "t",
            ]
        end = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias", "up": "adapter_up.weight",
               "up_bias": "adapter_up.bias", "gate": "scaling"}[field]  # fmt: skip
        saved = ".".join((*module, end))
        used.add(saved)
        flat[key] = tensors[saved].reshape(()) if field == "gate" else tensors[saved].T
    assert used == set(tensors)
    return pj.insert(tuned, flat)


@pytest.mark.third_party
@pytest.mark.parametrize("name, kind", covered(list(MODELS), list(KINDS)))
def test_equals_adapterhub(name, kind):
    fn, params, args = loaded(name)
    folder = GOLDEN / name / kind
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    reduction, activation = config["reduction_factor"], config["non_linearity"]
    scale = config["scaling"] if config["scaling"] != "learned" else None
    method = pj.adapter(KINDS[kind], reduction=reduction, activation=activation, scale=scale)
    apply, fresh = pj.attach(method, fn, params, *args, key=jax.random.key(0))
    tuned = filled(name, fresh, load_file(folder / "adapter.safetensors"))
    want = np.load(folder / "ref.npz")["output"]
    error = np.abs(np.asarray(jax.jit(apply)(tuned, *args)) - want).max() / np.abs(want).max()
    assert error < 1e-5
    base = fn(params, *args)
    assert np.abs(want - base).max() > 1e-2 * np.abs(want).max()
    np.testing.assert_allclose(jax.jit(apply)(pj.disable(tuned), *args), base, atol=1e-6 * np.abs(base).max())


# The equations, written by hand


def hand(z, f):
    """A(z)."""
    a = jnp.maximum(z @ f["down"] + f["down_bias"], 0) @ f["up"] + f["up_bias"]
    return 1.5 * f.get("gate", 1.0) * a


def norm(x, scale, bias, centred):
    x = x - x.mean(-1, keepdims=True) if centred else x
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def join(kind, h, r, f, after=lambda s: s):
    """The residual sum with an adapter in it."""
    if kind == "houlsby":
        return h + hand(h, f) + r
    return h + r + hand(r if "parallel" in kind else after(h + r), f)


def fields(tuned, path):
    """What trains at a path, by the name of the field."""
    return {k.rpartition("/")[2]: v for k, v in pj.extract(tuned).items() if k.rpartition("/")[0] == path}


def agree(kind, fn, params, args, twin, tolerance=1e-5, **options):
    """`twin(params, by_path, *args)` is the tuned model in value, and in the gradient of every trained field."""
    method = pj.adapter(kind, bottleneck=3, scale=1.5, **options)
    apply, fresh = pj.attach(method, fn, params, *args, key=jax.random.key(0))
    tuned = away(fresh)
    trainable, frozen = pj.partition(tuned)
    paths = [path for path, x in flatten(tuned) if pj.Overlay in type(x).__mro__]
    ours = jax.jit(lambda t, *args: apply(pj.combine(t, frozen), *args))
    by_path = {path: fields(tuned, path) for path in paths}
    loss = lambda f: lambda t, *args: (jnp.sin(y := f(t, *args).astype(jnp.float32)).sum(), y)
    (_, got), grads = jax.value_and_grad(loss(ours), has_aux=True)(trainable, *args)
    theirs = lambda by_path, *args: twin(params, by_path, *args)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        (_, want), want_grads = jax.value_and_grad(loss(theirs), has_aux=True)(by_path, *args)
    near = lambda x, y, top=0: np.testing.assert_allclose(
        x, y, atol=tolerance * max(np.abs(y).max(), top / 10) + 1e-7, rtol=0
    )
    near(got, want)
    assert np.abs(got - fn(params, *args).astype(jnp.float32)).max() > 10 * tolerance
    top = max(np.abs(x).max() for x in jax.tree.leaves(want_grads))  # sums that cancel are rounded as their terms are
    for path, found in by_path.items():
        for name in found:
            near(pj.extract(grads)[f"{path}/{name}"], want_grads[path][name], top)
    return tuned


ALL = ["houlsby", "pfeiffer", "parallel", "scaled_parallel"]


def drawn(shapes, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return {n: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), dtype) for n, s in shapes.items()}


SHAPES = {"up": (4, 6), "down": (6, 4), "bias": (4,), "g": (4,), "b": (4,)}
X = drawn({"x": (3, 5, 4)})["x"]


@pytest.mark.parametrize("kind, post", covered(ALL, [None, "layer", "rms"]))
def test_the_equations_before_and_after_a_norm(kind, post):
    """Two layers, the second one with a bias; with a norm after each sum, or before each branch."""
    centred = post == "layer"
    stack = lambda p, x: norm(x, p["g"][None, None], p["b"][None, None] if centred else 0.0, centred)

    def model(p, x, join):
        for end in ("first", "second"):
            r = x if post else stack(p, x)
            h = jnp.tanh(r @ p[end]["up"]) @ p[end]["down"]
            h = h + p[end]["bias"][None, None] if end == "second" else h
            s = join(end, 2.0 * h, x)
            x = stack(p, s) if post else s
        return x

    params = {
        "first": drawn(SHAPES),
        "second": drawn(SHAPES),
        **{n: drawn(SHAPES)[n] + 1 for n in "gb"},
    }
    ends = {"first": "first/down", "second": "second/bias"}
    after = (lambda s: stack(params, s)) if post else (lambda s: s)
    twin = lambda p, by, x: model(p, x, lambda end, h, r: join(kind, h, r, by[ends[end]], after))
    fn = lambda p, x: model(p, x, lambda end, h, r: r + h)
    tuned = agree(kind, fn, params, (X,), twin)
    assert tuned["second"]["bias"].kernel == "second/down" and tuned["first"]["down"].kernel is None
    assert (tuned["first"]["down"].norm_scale == pj.Ref("g")) == (kind == "pfeiffer" and post is not None)


@pytest.mark.parametrize("kind", covered(ALL, at=(0, 1)))
def test_channels_first(kind):
    """A convolution whose features are the second axis, with a bias."""

    def model(p, x, join):
        h = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return join(h + p["b"][None, :, None, None], x)

    params = drawn({"w": (4, 4, 3, 3), "b": (4,)})
    last = lambda y: jnp.moveaxis(y, 1, -1)
    twin = lambda p, by, x: model(p, x, lambda h, r: jnp.moveaxis(join(kind, last(h), last(r), by["b"]), -1, 1))
    fn = lambda p, x: model(p, jnp.sin(x), lambda h, r: h + r)
    agree(
        kind,
        fn,
        params,
        (drawn({"x": (2, 4, 3, 5)})["x"],),
        lambda p, by, x: twin(p, by, jnp.sin(x)),
    )


@pytest.mark.parametrize("kind", covered(ALL, at=(1, 2)))
def test_weights_on_the_left(kind):
    """Features first, examples last."""
    params = drawn({"w": (4, 4)})
    fn = lambda p, x: (x := jnp.sin(x), p["w"] @ x + x)[1]
    twin = lambda p, by, x: (
        x := jnp.sin(x),
        join(kind, (p["w"] @ x).T, x.T, by["w"]).T,
    )[1]
    agree(kind, fn, params, (X[0].T,), twin)


@pytest.mark.parametrize("kind", covered(ALL, at=(2, 3)))
def test_experts_have_an_adapter_each(kind):
    params = drawn({"w": (3, 4, 4)})
    fn = lambda p, x: (x := jnp.sin(x), x + jnp.einsum("ebi,eio->ebo", x, p["w"]))[1]
    one = lambda w, f, x: join(kind, x @ w, x, f)
    twin = lambda p, by, x: jax.vmap(one)(p["w"], by["w"], jnp.sin(x))
    tuned = agree(kind, fn, params, (X,), twin)
    assert tuned["w"].down.shape == (3, 4, 3) and tuned["w"].scale.shape == (3,)


@pytest.mark.parametrize("kind, post", covered(ALL, [False, True], at=(0, 1)))
def test_scanned_layers_have_an_adapter_each(kind, post):
    """The norm after the sum is stacked too."""
    params = drawn({"w": (3, 4, 4), "g": (3, 4)})

    def layer(join, x, p):
        s = join(jnp.tanh(x) @ p["w"], x, p)
        return norm(s, p["g"][None, None], 0.0, True) if post else s

    scanned = lambda p, x, layer: jax.lax.scan(lambda x, p: (layer(x, p), None), x, p)[0]
    fn = lambda p, x: scanned(p, x, jax.checkpoint(lambda x, p: layer(lambda h, r, p: h + r, x, p)))

    def twin(p, by, x):
        for k in range(3):
            own = {n: f[k] for n, f in by["w"].items()}
            after = (lambda s: norm(s, p["g"][k], 0.0, True)) if post else (lambda s: s)
            x = layer(
                lambda h, r, _: join(kind, h, r, own, after),
                x,
                {n: w[k] for n, w in p.items()},
            )
        return x

    tuned = agree(kind, fn, params, (X,), twin)
    assert not np.array_equal(tuned["w"].down[0], tuned["w"].down[1])


class TwinBlock(zoo.Block):
    """The zoo's block, with adapters that lie among its parameters."""

    kind: str = "houlsby"

    @nn.compact
    def __call__(self, x):
        at = lambda end: self.get_variable("params", end)
        h = nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm(name="norm_1")(x))
        x = join(self.kind, h, x, at("at_out")) if self.kind == "houlsby" else h + x
        h = nn.Dense(self.features, name="up")(nn.LayerNorm(name="norm_2")(x))
        return join(
            self.kind,
            nn.Dense(self.features, name="down")(nn.gelu(h)),
            x,
            at("at_down"),
        )


@pytest.mark.parametrize("kind, name", some([(k, n) for k in ALL for n in ("linen_scan", "linen_scan_remat")], 5))
def test_linen_blocks(kind, name):
    fn, params, args = zoo.MODELS[name].make()
    ends = {"at_down": "down", "at_out": "attention/out"} if kind == "houlsby" else {"at_down": "down"}

    def twin(params, by, x):
        block = {
            **params["layers"]["block"],
            **{at: by[f"layers/block/{end}/bias"] for at, end in ends.items()},
        }
        return zoo.stack(functools.partial(TwinBlock, kind=kind)).apply({"params": {"layers": {"block": block}}}, x)

    agree(kind, fn, params, args, twin)


@pytest.mark.parametrize("kind", covered(ALL, at=(0, 3)))
def test_nnx_stack(kind):
    fn, params, args = zoo.MODELS["nnx_scan"].make()

    def twin(params, by, x):
        leaves = {path: x for path, x in flatten(params)}
        for k in range(3):
            at = lambda name: leaves[f"layers/{name}"][k]
            h = jnp.tanh(x @ at("up/kernel") + at("up/bias")) @ at("down/kernel") + at("down/bias")
            x = join(kind, h, x, {n: f[k] for n, f in by["layers/down/bias"].items()})
        return x

    agree(kind, fn, params, args, twin)


def test_bfloat16_keeps_its_type():
    params = {n: w.astype(jnp.bfloat16) for n, w in drawn(SHAPES).items()}
    fn = lambda p, x: (
        s := x + jnp.tanh(x @ p["up"]) @ p["down"],
        norm(s, p["g"][None, None], p["b"][None, None], True),
    )[1]

    def twin(p, by, x):
        p, x = jax.tree.map(lambda y: y.astype(jnp.float32), (p, x))
        after = lambda s: norm(s, p["g"], p["b"], True)
        return after(join("pfeiffer", jnp.tanh(x @ p["up"]) @ p["down"], x, by["down"], after))

    tuned = agree("pfeiffer", fn, params, (X.astype(jnp.bfloat16),), twin, tolerance=3e-2)
    assert tuned["down"].down.dtype == jnp.float32
    assert pj.wrap(fn)(tuned, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_layer_without_a_residual_add_has_its_adapter_at_its_output():
    params = drawn({"w1": (4, 6), "b1": (6,), "w2": (6, 4)})
    fn = lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"][None, None]) @ p["w2"]
    end = lambda h, f: h + hand(h, f)
    twin = lambda p, by, x: end(jnp.tanh(end(x @ p["w1"] + p["b1"], by["b1"])) @ p["w2"], by["w2"])
    agree("houlsby", fn, params, (X,), twin, targets=("w1", "w2"))


def test_a_norm_that_trains_has_one_gradient():
    """Norms that train with the adapters: the norm after the sum is the same leaf in both of its uses."""
    params = drawn(SHAPES)

    def model(p, x, join):
        x = jnp.sin(x)
        s = join(jnp.tanh(x @ p["up"]) @ p["down"], x)
        return norm(s, p["g"][None, None], p["b"][None, None], True)

    fn = lambda p, x: model(p, x, lambda h, r: h + r)
    method = pj.chain(pj.adapter("pfeiffer", bottleneck=2, scale=1.5), pj.unfreeze(("g", "b")))
    apply, fresh = pj.attach(method, fn, params, X, key=jax.random.key(0))
    tuned = away(fresh)
    flat, f = pj.extract(tuned), fields(tuned, "down")
    assert set(flat) == {"g/value", "b/value", *(f"down/{n}" for n in f)}

    def twin(g, b):
        after = lambda s: norm(s, g, b, True)
        return model({**params, "g": g, "b": b}, X, lambda h, r: join("pfeiffer", h, r, f, after))

    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(apply(tuned, X), twin(flat["g/value"], flat["b/value"]), atol=1e-5)
        want = jax.grad(lambda g, b: jnp.sin(twin(g, b)).sum(), (0, 1))(flat["g/value"], flat["b/value"])
    grads = pj.extract(pj.value_and_grad(lambda t: jnp.sin(apply(t, X)).sum())(tuned)[1])
    np.testing.assert_allclose(grads["g/value"], want[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["b/value"], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    z = np.linspace(-3, 3, 7, dtype=np.float32)
    phi = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in z])
    sigmoid = 1 / (1 + np.exp(-z))
    cubic = 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    want = {"relu": np.maximum(z, 0), "gelu": z * phi, "gelu_tanh": z * cubic, "swish": z * sigmoid, "tanh": np.tanh(z),
            "leaky_relu": np.where(z > 0, z, 0.01 * z), "sigmoid": sigmoid, "identity": z}  # fmt: skip
    np.testing.assert_allclose(ACTIVATIONS[activation](jnp.asarray(z)), want[activation], atol=1e-6)


# How they start


def block(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"][None, None]


def begun(**options):
    params = drawn({**SHAPES, "up": (512, 512), "down": (512, 512), "bias": (512,)})
    x = drawn({"x": (1, 2, 512)})["x"]
    return pj.attach(
        pj.adapter(**options),
        lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"],
        params,
        x,
        key=jax.random.key(1),
    )[1]["down"]


def test_how_they_start():
    exact, near, bert = (begun(init=init, reduction=4) for init in ("exact", "near", "bert"))
    assert exact.down.shape == (512, 128) and exact.up.shape == (128, 512)
    assert not exact.up.any() and np.abs(exact.down).max() <= 1 / math.sqrt(512)
    np.testing.assert_allclose(exact.down.std(), 1 / math.sqrt(3 * 512), rtol=0.02)
    assert np.abs(near.down).max() <= 2e-2 and np.abs(near.up).max() <= 2e-2
    np.testing.assert_allclose(near.up.std(), 0.8796 * 1e-2, rtol=0.02)
    np.testing.assert_allclose(bert.down.std(), 2e-2, rtol=0.02)
    assert not any(x.down_bias.any() or x.up_bias.any() for x in (exact, near, bert))
    assert begun(reduction=1000).down.shape == (512, 1) and begun(reduction=0.5).down.shape == (512, 1024)
    assert [begun(kind=k, bottleneck=2).scale for k in ("pfeiffer", "parallel", "scaled_parallel")] == [1, 4, 1]
    assert begun(kind="scaled_parallel", bottleneck=2).gate == 1 and begun(kind="parallel", bottleneck=2).gate is None


# What is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": "seq_bn"}, ("kind 'seq_bn'", "houlsby, pfeiffer, parallel")),
        ({"activation": "relu6"}, ("activation 'relu6'", "gelu_tanh")),
        ({"init": "zeros"}, ("init 'zeros'", "exact, near, bert")),
        ({"bottleneck": 0}, ("bottleneck >= 1", "0")),
        ({"reduction": 0}, ("reduction > 0", "0")),
    ],
)
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError) as caught:
        pj.adapter(**options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"targets": "up"},
            "output of up is not added to a residual stream; expected one of down",
        ),
        (
            {"targets": "g"},
            "'g' matches g, which is no kernel; expected a kernel; closest kernels",
        ),
        ({"targets": "bias"}, "'bias' matches bias, which is no kernel"),
        ({"targets": "dwon"}, "'dwon' matches no leaf.*closest: down"),
        ({"exclude": "down"}, "exclude='down' leaves out down"),
    ],
)
def test_leaves_that_end_no_sublayer(options, message):
    params = drawn(SHAPES)
    fn = lambda p, x: block({**p, "bias": p["bias"] * p["g"]}, x)
    with pytest.raises(ValueError, match=message):
        pj.attach(pj.adapter(**options), fn, params, X, key=jax.random.key(0))


def test_models_without_such_a_sublayer():
    params = drawn(SHAPES)
    plain = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    with pytest.raises(
        ValueError,
        match="no kernel that ends a sublayer of feed-forward.*there are none.*`targets`",
    ):
        pj.attach(pj.adapter(), plain, params, X, key=jax.random.key(0))
    with pytest.raises(
        ValueError,
        match="adapter sits where the model's layers end, which only roles can tell",
    ):
        pj.adapter().init(jax.random.key(0), params)

    def mixed(p, x):  # attention without projections: queries and keys are the stream itself
        x = jnp.sin(x)
        return x + jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x)) @ x @ p["w"]

    with pytest.raises(
        ValueError,
        match="cannot tell whether w end attention or feed-forward.*`targets`",
    ):
        pj.attach(pj.adapter(), mixed, drawn({"w": (4, 4)}), X, key=jax.random.key(0))
    apply, tuned = pj.attach(
        pj.adapter(bottleneck=1, targets="w"),
        mixed,
        drawn({"w": (4, 4)}),
        X,
        key=jax.random.key(0),
    )
    np.testing.assert_allclose(apply(tuned, X), mixed(drawn({"w": (4, 4)}), X), rtol=1e-6)


def test_a_norm_that_is_not_stacked_as_its_layer_is_refused():
    """One norm's arrays for each example, after a layer that all of them share."""
    role = lambda op, axes, **more: pj.Role(op, axes, 0, **more)
    norm = Norm("g", None, 1e-5)
    roles = pj.Roles(
        {
            "w": role("linear", "io", residual=True, sublayer="feed-forward", norm=norm),
            "g": role("scale", "bo", kernel="w"),
        }
    )
    with pytest.raises(
        ValueError,
        match="the norm after w .axes 'io'. has .'g': 'bo'.; expected one axis of features",
    ):
        pj.adapter(bottleneck=1).init(jax.random.key(0), drawn({"w": (4, 4), "g": (3, 4)}), roles)


def test_merging_says_what_to_do_instead():
    tuned = pj.attach(
        pj.adapter(bottleneck=1),
        lambda p, x: (x := jnp.sin(x), x + x @ p["w"])[1],
        drawn({"w": (4, 4)}),
        X,
        key=jax.random.key(0),
    )[1]
    with pytest.raises(ValueError, match=r"w \(Adapter\).*wrap\(fn\).*`disable\(tuned\)`"):
        pj.merge(tuned)
    with pytest.raises(TypeError, match="Adapter.*peftjax.wrap"):
        X @ tuned["w"]


# Models that are not ours


@pytest.mark.third_party
@pytest.mark.parametrize(
    "name, kind",
    covered([n for n in CASES if n[:4] not in ("Bert", "Llam")], ["pfeiffer", "scaled_parallel"], at=(3,)),
)
def test_on_models_of_transformers(name, kind, clip_of_old):
    fn, params, inputs = built(name)
    method = pj.adapter(kind, bottleneck=2, activation="tanh")
    apply, fresh = pj.attach(method, fn, params, key=jax.random.key(0), **inputs)
    step = stepping(apply, inputs)
    run = lambda tuned: step(*pj.partition(tuned))
    tuned, want = away(fresh), np.asarray(jax.jit(lambda p: fn(p, **inputs))(params))
    scale = np.abs(want).max()
    np.testing.assert_allclose(run(fresh)[1], want, atol=1e-5 * scale)
    np.testing.assert_allclose(run(pj.disable(tuned))[1], want, atol=1e-5 * scale)
    grads, found = run(tuned)
    assert np.abs(found - want).max() > 1e-3 * scale
    events = pj.explain(fn, tuned, **inputs)
    adapters = [path for path, x in flatten(tuned) if pj.Overlay in type(x).__mro__]
    assert sorted(e.path for e in events if e.how == "met the residual") == sorted(adapters) and not events.merged
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads))
