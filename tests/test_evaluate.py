"""What the evaluator keeps of a function: its types, names, regions and effects, and what passes through it."""

import functools
import gc
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from covers import some
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from laws import METHODS, case, moved, usual
from peftjax.overlay import is_overlay
from zoo import MODELS

KEY = jax.random.key(0)


def data(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


W = {"w": data(8, 6)}
X = data(5, 8, seed=1)


def lora(params, **options):
    """A LoRA that acts, on every kernel of a tree."""
    return moved(pj.lora(**{"rank": 2, "alpha": 6, **options}).init(KEY, params), 0)


def product(params, x):
    return x @ params["w"]


def close(got, want, tolerance=1e-5):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def eqns(jaxpr, name):
    """Every equation of this name in a jaxpr and in what it holds."""
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if eqn.primitive.name == name else []
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            found += eqns(inner, name) if hasattr(inner, "eqns") else []
    return found


def traced(fn, *args):
    return jax.make_jaxpr(fn)(*args).jaxpr


# Types


TYPES = {
    "float32": lambda p, x: x @ p["w"],
    "bfloat16 weight": lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
    "times a Python number": lambda p, x: (0.5 * x.astype(jnp.bfloat16)) @ (p["w"].astype(jnp.bfloat16) * 2.0),
    "preferred type": lambda p, x: jnp.matmul(
        x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16), preferred_element_type=jnp.float32
    ),
    "narrower preferred type": lambda p, x: jnp.matmul(x, p["w"], preferred_element_type=jnp.bfloat16),
    "float16": lambda p, x: x.astype(jnp.float16) @ p["w"].astype(jnp.float16),
    "a weak scalar": lambda p, x: jnp.asarray(2.0) * (x @ p["w"]).astype(jnp.bfloat16),
    "a weak output": lambda p, x: jnp.asarray(2.0),
}


@pytest.mark.parametrize("name", TYPES)
def test_outputs_have_the_types_of_the_base(name):
    fn, tuned = TYPES[name], lora(W)
    want, got = (jax.typeof(y) for y in (fn(W, X), pj.wrap(fn)(tuned, X)))
    assert (got.shape, got.dtype, got.weak_type) == (want.shape, want.dtype, want.weak_type)
    inside = jax.eval_shape(pj.wrap(fn), tuned, X)
    assert (inside.dtype, inside.weak_type) == (want.dtype, want.weak_type)


def test_weak_types_of_leaves_and_arguments_stay_weak():
    params = {**W, "gain": jnp.asarray(2.0)}
    fn = lambda p, x, bias: p["gain"] * (x @ p["w"]).astype(jnp.bfloat16) + bias
    tuned = lora(params, targets="w")
    assert pj.wrap(fn)(tuned, X, jnp.asarray(1.0)).dtype == fn(params, X, jnp.asarray(1.0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("precision", [lax.Precision.HIGHEST, lax.DotAlgorithmPreset.F32_F32_F32])
def test_every_product_keeps_the_precision(precision):
    fn = lambda p, x: jnp.matmul(x, p["w"], precision=precision)
    (want,) = eqns(traced(fn, W, X), "dot_general")
    found = eqns(traced(pj.wrap(fn), lora(W), X), "dot_general")
    assert len(found) == 3 and all(eqn.params["precision"] == want.params["precision"] for eqn in found)


@pytest.fixture
def explicit():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def test_explicit_sharding_is_kept(explicit):
    params, x = {"w": explicit(data(8, 4), None, "model")}, explicit(data(4, 8), "data")
    tuned = lora(params)
    got, want = jax.jit(pj.wrap(product))(tuned, x), product(params, x)
    assert got.sharding.spec == want.sharding.spec == PartitionSpec("data", "model")
    assert tuned["w"].b.sharding.spec == PartitionSpec(None, "model")
    text = jax.jit(pj.wrap(product)).lower(tuned, x).compile().as_text()
    assert "all-gather" not in text


def test_an_asked_sharding_of_an_output_is_kept(explicit):
    params, x = {"w": explicit(data(8, 4), "model", None)}, explicit(data(4, 8), "data", "model")
    fn = lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=PartitionSpec("data", None))
    got = jax.jit(pj.wrap(fn))(lora(params), x)
    assert got.sharding.spec == PartitionSpec("data", None)
    close(got, fn(pj.merge(lora(params)), x))


def test_asked_shardings_of_a_jitted_part_are_kept():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    lies = NamedSharding(mesh, PartitionSpec("data", "model"))
    inner = jax.jit(lambda w, x: (x @ w, x, w), out_shardings=(lies, lies, None))
    fn = lambda p, x: inner(p["w"], x)[:2]
    params, x = {"w": data(8, 4)}, data(4, 8)
    for run in (pj.wrap(fn), jax.jit(pj.wrap(fn))):
        assert [y.sharding for y in run(lora(params), x)] == [y.sharding for y in fn(params, x)] == [lies, lies]


def test_arrays_off_the_mesh_of_the_context(explicit):
    close(pj.wrap(product)(lora(W), X), X @ pj.merge(lora(W))["w"])


def test_inside_shard_map():
    """The wrapped function sees local arrays, which vary over the mesh."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    tuned, x = lora(W), data(4, 8)
    local = jax.shard_map(
        pj.wrap(product), mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec("data")
    )
    close(jax.jit(local)(tuned, x), x @ pj.merge(tuned)["w"])
    total = lambda run: jax.grad(lambda b: jnp.sum(run({"w": tuned["w"].replace(b=b)}) ** 2))(tuned["w"].b)
    close(total(lambda t: jax.jit(local)(t, x)), total(lambda t: pj.wrap(product)(t, x)))


# Stacked leaves


STACK = {"w": data(3, 8, 8), "bias": data(3, 8)}


def stacked(params, x, reverse=False, unroll=1):
    step = lambda x, p: (x + jnp.tanh(x @ p["w"] + p["bias"][None]), None)
    return lax.scan(step, x, params, reverse=reverse, unroll=unroll)[0]


def stacked_lora(**options):
    roles = pj.roles(stacked, STACK, X)
    return pj.lora(**{"rank": 2, "alpha": 6, "targets": "w", **options}).init(KEY, STACK, roles)


def test_every_layer_draws_its_own_numbers_from_its_own_inputs():
    w = stacked_lora()["w"]
    assert w.a.shape == (3, 8, 2) and w.b.shape == (3, 2, 8) and w.scale.shape == (3,)
    assert (w.a[0] != w.a[1]).all() and (w.a[1] != w.a[2]).all()
    assert 0.9 / np.sqrt(8) < jnp.abs(w.a).max() <= 1 / np.sqrt(8)


def test_a_scan_slices_the_fields_and_merges_nothing():
    tuned = stacked_lora()
    assert not pj.explain(stacked, tuned, X).merged
    (scan,) = eqns(traced(pj.wrap(stacked), tuned, X), "scan")
    assert {(3, 8, 2), (3, 2, 8), (3,)} <= {v.aval.shape for v in scan.invars}


def test_layers_that_are_not_tuned_are_the_base():
    tuned = moved(stacked_lora(layers=(1,)), 0)
    merged = pj.merge(tuned)
    assert (merged["w"][::2] == STACK["w"][::2]).all() and (merged["w"][1] != STACK["w"][1]).any()
    close(pj.wrap(stacked)(tuned, X), stacked(merged, X))


def test_a_vmapped_model_maps_the_fields():
    fn = lambda params, x: jax.vmap(lambda w, x: jnp.tanh(x @ w))(params["w"], x)
    x = data(3, 5, 8)
    tuned = pj.lora(rank=2, targets="w").init(KEY, STACK, pj.roles(fn, STACK, x))
    assert tuned["w"].axes == "bio" and not pj.explain(fn, tuned, x).merged
    close(pj.wrap(fn)(moved(tuned, 0), x), fn(pj.merge(moved(tuned, 0)), x))


# No aliasing


@pytest.mark.parametrize("method", some(list(METHODS), 8))
def test_donating_what_trains_leaves_the_pretrained_tree_alone(method):
    it = case(method, usual(method))
    before = jax.tree.map(np.array, it.params)
    tuned = it.method.init(KEY, it.params, it.roles)
    trainable, frozen = pj.partition(tuned)
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    moved_on = step(trainable)
    gc.collect()
    after = pj.combine(moved_on, frozen)
    assert all(not x.is_deleted() for x in jax.tree.leaves((it.params, after)))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(it.params), strict=True):
        np.testing.assert_array_equal(x, y)
    jax.block_until_ready(it.apply(after, *it.args))


def test_init_copies_nothing_but_the_trained_copy():
    for method in (pj.lora(rank=2), pj.lora(rank=2, init="pissa"), pj.unfreeze("w")):
        assert method.init(KEY, W)["w"].base is W["w"]
    value = pj.unfreeze("w").init(KEY, W)["w"].value
    assert value.unsafe_buffer_pointer() != W["w"].unsafe_buffer_pointer()


def test_donating_through_the_wrapped_function():
    tuned = lora(jax.tree.map(jnp.array, W))
    twice = lambda tuned: jax.tree.map(lambda x: x * 2, tuned)
    step = jax.jit(lambda tuned, x: (pj.wrap(product)(tuned, x), twice(tuned)), donate_argnums=0)
    want = pj.wrap(product)(tuned, X)
    got, tuned = step(tuned, X)
    close(got, want)
    jax.block_until_ready(pj.wrap(product)(tuned, X))


# What passes through


def test_an_overlay_that_passes_through_is_the_same_overlay():
    def fn(params, x):
        return {"y": x @ params["w"], "w": params["w"], "again": [params["w"], params["v"]]}

    params = {**W, "v": data(8, 6)}
    tuned = lora(params, targets="w")
    out = pj.wrap(fn)(tuned, X)
    assert out["w"] is tuned["w"] and out["again"][0] is tuned["w"]
    assert not is_overlay(out["again"][1])


def test_it_passes_through_jit_remat_scan_and_loops():
    def fn(params, x):
        same = jax.jit(lambda w: w)(jax.checkpoint(lambda w: w)(params["w"]))
        (same, x), ws = lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1])), None), (same, x), None, length=2)
        same, x = lax.while_loop(lambda c: c[1][0, 0] > 9, lambda c: (c[0], c[1] * 2), (same, x))
        return same, x

    tuned = lora(W)
    assert pj.wrap(fn)(tuned, X)[0] is tuned["w"]
    assert jax.tree.structure(jax.jit(pj.wrap(fn))(tuned, X)[0]) == jax.tree.structure(tuned["w"])


def test_an_nnx_loop_keeps_its_overlays_and_moves_its_statistics():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(8, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    graphdef, state = nnx.split(Normed(nnx.Rngs(0)))

    def fn(state, x):
        module = nnx.merge(graphdef, state, copy=True)
        return module(x), nnx.state(module)

    apply, tuned = pj.attach(pj.lora(rank=2, targets=("linear/kernel",)), fn, state, X, key=KEY)
    kernel = lambda state: jax.tree.leaves(state["linear"]["kernel"], is_leaf=is_overlay)[0]
    outs, now = [], tuned
    for _ in range(3):
        y, now = apply(now, X)
        outs.append(y)
        assert kernel(now) is kernel(tuned)
        assert jax.tree.structure(now) == jax.tree.structure(tuned)
    assert (outs[0] != outs[1]).any(), "the random counts stand still"
    means = [jax.tree.leaves(state["norm"]["mean"])[0] for state in (tuned, now)]
    assert (means[0] != means[1]).any()


def test_state_in_another_argument():
    def fn(params, x, state):
        h = x @ params["w"]
        return h - state["mean"][None], {"mean": 0.9 * state["mean"] + 0.1 * h.mean(0), "steps": state["steps"] + 1}

    state = {"mean": jnp.zeros(6), "steps": jnp.int32(0)}
    tuned = lora(W)
    (got, new), (want, wanted) = pj.wrap(fn)(tuned, X, state=state), fn(pj.merge(tuned), X, state)
    close(got, want)
    close(new["mean"], wanted["mean"])
    assert new["steps"] == 1


def test_overlays_in_another_argument():
    fn = lambda params, x, other: x @ params["w"] + x @ other["w"]
    one, two = lora(W), moved(lora(W), 1)
    close(pj.wrap(fn)(one, X, two), fn(pj.merge(one), X, pj.merge(two)))


# Names


def test_names_of_modules_and_of_jit_regions_survive():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="second")(jnp.tanh(nn.jit(nn.Dense)(8, name="first")(x)))

    @jax.jit
    def a_region_of_its_own(params, x):
        return Two().apply({"params": params}, x)

    params = Two().init(KEY, X)["params"]
    apply, tuned = pj.attach(pj.lora(rank=2), a_region_of_its_own, params, X, key=KEY)
    text = jax.jit(apply).lower(tuned, X).as_text(debug_info=True)
    assert "a_region_of_its_own" in text
    assert _scopes(jax.jit(a_region_of_its_own).lower(params, X).as_text(debug_info=True)) == _scopes(text)


def _scopes(text):
    """The name stacks of a lowered program's operations."""
    names = re.findall(r'loc\("([^"]*)"', text)
    return {name.rpartition("/")[0] for name in names if "/" in name and ".py" not in name}


def test_overlays_have_a_short_repr():
    tuned = lora({"w": jnp.ones((768, 768))})
    assert repr(tuned["w"]) == "LoRA(float32[768,768], rank=2)"
    nested = pj.lora(rank=1, targets="w").init(KEY, tuned)
    assert repr(nested["w"]) == "LoRA(LoRA(float32[768,768], rank=2), rank=1)"
    assert repr(jax.eval_shape(lambda tuned: tuned, tuned)["w"]) == "LoRA(float32[768,768], rank=2)"
    assert len(repr(jax.tree.map(lambda x: None, tuned))) < 80


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "adalora", "unfreeze"])
def test_a_stack_that_reaches_the_bare_model_says_so(method):
    """A scan cuts the overlay's fields as it cuts arrays: what is left still says what it is."""
    it = case(method, "linen_scan")
    with pytest.raises(TypeError, match="reached code that expects an array.*without `peftjax.wrap`"):
        it.fn(it.tuned, *it.args)


def test_the_bare_model_says_which_leaf_holds_the_overlay_under_jit_too():
    dense = {"kernel": data(8, 6), "bias": data(6, seed=2)}
    tuned = pj.chain(pj.unfreeze(".*bias"), pj.lora(rank=2)).init(KEY, {"layer": {"out": dense}})
    model = lambda params, x: x @ params["layer"]["out"]["kernel"] + params["layer"]["out"]["bias"]
    with pytest.raises(TypeError, match=r"LoRA\(float32\[8,6\], rank=2\) at layer/out/kernel, reached code"):
        jax.jit(model)(tuned, X)
    with pytest.raises(AttributeError, match=r"Full\(float32\[6\]\) at layer/out/bias, reached code"):
        jax.jit(lambda params, x: x + params["layer"]["out"]["bias"].mean())(tuned, X)


def test_overlays_laid_at_other_paths_are_of_one_structure():
    method = lambda name: pj.lora(rank=2).init(KEY, {name: data(8, 6)})[name]
    first, second = method("a"), method("b")
    assert (first.laid_at.path, second.laid_at.path) == ("a", "b")
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert hash(jax.tree.structure(first)) == hash(jax.tree.structure(second))
    both = jax.tree.map(lambda *x: jnp.stack(x), first, second)
    assert both.laid_at.path == "a" and both.a.shape == (2, 8, 2)
    program = jax.jit(pj.wrap(product))
    for x in (first, second):
        close(program({"w": x}, X), X @ x.base)
    assert program._cache_size() == 1


AUTO = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
    "view",
    [
        lax.optimization_barrier,
        jnp.copy,
        functools.partial(checkpoint_name, name="w"),
        lambda w: lax.with_sharding_constraint(w, NamedSharding(AUTO, PartitionSpec("x"))),
    ],
)
@pytest.mark.parametrize("method", [pj.lora(rank=2, alpha=6), pj.dora(rank=2, alpha=6)])
def test_what_leaves_a_weight_as_it_is_merges_nothing(method, view):
    fn = lambda params, x: jnp.tanh(x @ view(params["w"]))
    tuned = moved(method.init(KEY, W), 0)
    assert not pj.explain(fn, tuned, X).merged
    got, want = jax.jit(pj.wrap(fn))(tuned, X), fn(pj.merge(tuned), X)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=1e-5)


# Some uses only


def tied(params, ids):
    h = jnp.tanh(params["embed"][ids])
    return h @ params["embed"].T


TABLE, IDS = {"embed": data(11, 8)}, jnp.asarray([[0, 3, 10], [2, 2, 5]])


def test_an_overlay_for_the_lookup_alone():
    roles = pj.roles(tied, TABLE, IDS)
    tuned = moved(pj.lora(rank=2, alpha=6, targets="embed", uses=("gather",)).init(KEY, TABLE, roles), 0)
    everywhere = moved(pj.lora(rank=2, alpha=6, targets="embed").init(KEY, TABLE, roles), 0)
    changed = pj.merge(everywhere)["embed"]
    close(pj.wrap(tied)(everywhere, IDS), tied({"embed": changed}, IDS))
    close(pj.wrap(tied)(tuned, IDS), jnp.tanh(changed[IDS]) @ TABLE["embed"].T)
    with pytest.raises(ValueError, match="embed"):
        pj.merge(tuned)


def test_a_lookup_alone_merges_where_nothing_else_uses_the_leaf():
    fn = lambda params, ids: jnp.tanh(params["embed"][ids])
    method = pj.lora(rank=2, alpha=6, targets="embed", uses=("gather",))
    tuned = moved(method.init(KEY, TABLE, pj.roles(fn, TABLE, IDS)), 0)
    close(pj.wrap(fn)(tuned, IDS), fn(pj.merge(tuned), IDS))


@pytest.mark.parametrize("method", [pj.lora(rank=1, targets="w"), pj.reft(2, targets="w", where="output")])
def test_a_layer_taken_by_its_number_is_a_view(method):
    """`jnp.take` of one layer's matrix is no lookup: the layer's product acts, as with an index; and outside, NaN."""
    params, x = {"w": data(3, 8, 8)}, data(5, 8, seed=1)
    index = lambda p, x, k: jnp.tanh(x @ p["w"][k])
    tuned = moved(method.init(KEY, params, pj.roles(index, params, x, jnp.int32(1))), 0)
    want = [pj.wrap(index)(tuned, x, jnp.int32(k)) for k in (0, 2)]
    for mode in ("fill", "clip"):
        taken = lambda p, x, k: jnp.tanh(x @ jnp.take(p["w"], k, axis=0, mode=mode))
        assert {e.primitive for e in pj.explain(taken, tuned, x, jnp.int32(1))} == {"dot_general"}
        for k, y in zip((0, 2), want):
            close(pj.wrap(taken)(tuned, x, jnp.int32(k)), y)
        outside = pj.wrap(taken)(tuned, x, jnp.int32(3))
        assert jnp.isnan(outside).all() if mode == "fill" else jnp.array_equal(outside, want[1])


# What explain says


def test_explain_tells_what_acted_what_was_merged_and_what_was_not_used():
    def fn(params, x):
        with jax.named_scope("mlp"):
            h = jnp.tanh(x @ params["up"])
        return h @ (params["down"] * 2) + h @ params["mix"] @ params["mix"]

    params = {name: data(8, 8) for name in ("up", "down", "mix", "spare")}
    said = pj.explain(fn, lora(params), X)
    assert repr(said).splitlines() == [
        "path   overlay  what    at           under  times",
        "up     LoRA     acted   dot_general  mlp    1",
        "down   LoRA     merged  mul                 1",
        "mix    LoRA     acted   dot_general         2",
        "spare  LoRA     unused  -                   1",
    ]
    assert [event.path for event in said.merged] == ["down"]


def test_a_copy_that_trains_acts_where_it_is_added():
    fn = lambda p, x: x @ p["w"] + p["b"][None]
    tuned = pj.unfreeze(("w", "b")).init(KEY, {**W, "b": jnp.ones(6)})
    found = {(e.path, e.how) for e in pj.explain(fn, tuned, X)}
    assert found == {("w", "acted"), ("b", "acted")}


def test_says_that_an_overlay_does_nothing():
    params = {**W, "spare": W["w"]}
    tuned = lora(params, targets="w|spare")
    fn = lambda p, x: x @ p["w"]
    for run in (pj.wrap(fn), jax.jit(pj.wrap(fn))):
        with pytest.warns(UserWarning, match="the overlays at spare do nothing"):
            run(tuned, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pj.wrap(lambda p, x: (x @ p["w"], p["spare"]))(tuned, X)


def test_explain_names_every_overlay_of_a_stack():
    method = pj.chain(pj.lora(rank=1, targets="w"), pj.dora(rank=1, targets="w"))
    (event,) = pj.explain(product, method.init(KEY, W), X)
    assert (event.path, event.overlay, event.how) == ("w", "DoRA over LoRA", "acted")


def test_explain_computes_nothing_and_takes_shapes():
    shapes = jax.eval_shape(lambda: pj.lora(rank=2).init(KEY, W))
    (event,) = pj.explain(product, shapes, jax.ShapeDtypeStruct((5, 8), "float32"))
    assert (event.path, event.how) == ("w", "acted")


# Static arguments and Linen's own


def test_what_is_no_array_is_static():
    def fn(params, x, activation, flags, *, double, name=None):
        assert isinstance(double, bool) and flags == {"deep": True, "n": 2} and name in (None, "here")
        h = activation(x @ params["w"]) * flags["n"]
        return 2.0 * h if double else h

    tuned = lora(W)
    for double in (True, False):
        got = pj.wrap(fn)(tuned, X, jnp.tanh, {"deep": True, "n": 2}, double=double)
        close(got, fn(pj.merge(tuned), X, jnp.tanh, {"deep": True, "n": 2}, double=double))
    jax.block_until_ready(pj.wrap(fn)(tuned, X, jnp.tanh, {"deep": True, "n": 2}, double=True, name="here"))


def test_a_static_argument_that_cannot_be_hashed():
    class Config:
        __hash__ = None
        scale = 3.0

    fn = lambda params, x, config: config.scale * (x @ params["w"])
    tuned = lora(W)
    close(pj.wrap(fn)(tuned, X, Config()), fn(pj.merge(tuned), X, Config()))


def test_outputs_that_are_no_arrays():
    fn = lambda params, x: {"y": x @ params["w"], "none": None, "empty": ()}
    out = pj.wrap(fn)(lora(W), X)
    assert out["none"] is None and out["empty"] == ()


def test_linen_mutable_rngs_and_method():
    class Model(nn.Module):
        def setup(self):
            self.dense, self.norm = nn.Dense(6), nn.BatchNorm(momentum=0.9)
            self.drop = nn.Dropout(0.5)

        def __call__(self, x, train):
            return self.drop(self.norm(self.encode(x), use_running_average=not train), deterministic=not train)

        def encode(self, x):
            self.sow("intermediates", "before", x)
            return self.dense(x)

    variables = dict(Model().init(KEY, X, False))
    variables.pop("intermediates", None)
    tuned = lora(variables, targets=".*kernel")
    merged, rngs = pj.merge(tuned), {"dropout": jax.random.key(3)}
    apply = pj.wrap(Model().apply)
    got, new = apply(tuned, X, True, rngs=rngs, mutable=["batch_stats"])
    want, wanted = Model().apply(merged, X, True, rngs=rngs, mutable=["batch_stats"])
    close(got, want)
    close(new["batch_stats"]["norm"]["mean"], wanted["batch_stats"]["norm"]["mean"])
    close(apply(tuned, X, method="encode"), Model().apply(merged, X, method="encode"))
    close(apply(tuned, X, method=Model.encode), Model().apply(merged, X, method=Model.encode))
    _, sown = apply(tuned, X, False, capture_intermediates=True, mutable=["intermediates"])
    close(sown["intermediates"]["dense"]["__call__"][0], Model().apply(merged, X, method="encode"))


# Regions


@pytest.mark.parametrize("prevent_cse", [True, False])
@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_remat_keeps_its_policy(policy, prevent_cse):
    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=prevent_cse)
    def block(w, x):
        return jnp.sin(jnp.tanh(x @ w))

    fn = lambda params, x: block(params["w"], x)
    (eqn,) = [e for name in ("checkpoint", "remat2", "remat") for e in eqns(traced(pj.wrap(fn), lora(W), X), name)]
    assert eqn.params["policy"] is policy and eqn.params["prevent_cse"] is prevent_cse


def test_remat_saves_what_its_policy_says(capsys):
    def fn(params, x):
        block = lambda w, x: jnp.sin(checkpoint_name(jnp.tanh(x @ w), "kept"))
        return jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names("kept"))(params["w"], x)

    trainable, frozen = pj.partition(lora(W))
    print_saved_residuals(lambda t: pj.wrap(fn)(pj.combine(t, frozen), X).sum(), trainable)
    lines = capsys.readouterr().out.splitlines()
    made = [line for line in lines if "from the argument" not in line and "from a constant" not in line]
    assert len(made) == 1 and "'kept'" in made[0]


@pytest.mark.parametrize("reverse,unroll", [(False, 1), (True, 1), (False, 3), (True, 2)])
def test_scan_keeps_its_direction_and_its_unrolling(reverse, unroll):
    fn = functools.partial(stacked, reverse=reverse, unroll=unroll)
    tuned = moved(stacked_lora(), 0)
    (eqn,) = eqns(traced(pj.wrap(fn), tuned, X), "scan")
    assert (eqn.params["reverse"], eqn.params["unroll"], eqn.params["length"]) == (reverse, unroll, 3)
    close(pj.wrap(fn)(tuned, X), fn(pj.merge(tuned), X))


def test_a_scan_with_carries_outputs_and_constants():
    def fn(params, x):
        def step(carry, w):
            x, total, same = carry
            y = jnp.tanh(x @ w @ params["v"])
            return (y, total + y.sum(), same), (y[0], w, same)

        return lax.scan(step, (x, jnp.float32(0), params["v"]), params["w"])

    params = {"w": STACK["w"], "v": data(8, 8)}
    roles = pj.roles(fn, params, X)
    tuned = moved(pj.lora(rank=2, alpha=6, targets="[wv]").init(KEY, params, roles), 0)
    (carry, ys), (want_carry, want_ys) = pj.wrap(fn)(tuned, X), fn(pj.merge(tuned), X)
    close(carry[0], want_carry[0])
    close(carry[1], want_carry[1])
    close(ys[0], want_ys[0])
    for got, want in ((carry[2], want_carry[2]), (ys[1], want_ys[1]), (ys[2], want_ys[2])):
        close(pj.merge([got])[0], want)


def test_a_weight_that_a_scan_changes():
    step = lambda carry, _: ((jnp.tanh(carry[0] @ carry[1]), 0.5 * carry[1]), None)
    fn = lambda params, x: lax.scan(step, (x, params["w"]), None, length=3)[0][0]
    params = {"w": data(8, 8)}
    tuned = lora(params, targets="w")
    close(pj.wrap(fn)(tuned, X), fn(pj.merge(tuned), X))
    assert pj.explain(fn, tuned, X).merged


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_switch_runs_one_branch(which):
    branches = [lambda w, x: x @ w, lambda w, x: x @ (2 * w), lambda w, x: jnp.zeros((5, 6)) + x.sum()]
    fn = lambda params, x, k: lax.switch(k, branches, params["w"], x)
    tuned = lora(W)
    close(pj.wrap(fn)(tuned, X, jnp.int32(which)), fn(pj.merge(tuned), X, which))


def test_a_branch_that_returns_the_weight():
    fn = lambda params, x: x @ lax.cond(x[0, 0] > 100, lambda w: 2 * w, lambda w: w, params["w"])
    tuned = lora(W)
    close(pj.wrap(fn)(tuned, X), fn(pj.merge(tuned), X))


def test_ordered_prints_stay_in_order(capfd):
    example = MODELS["ordered_prints"].make()
    tuned = pj.lora(rank=2, targets="w.").init(KEY, example.params)
    for apply in (pj.wrap(example.fn), jax.jit(pj.wrap(example.fn))):
        for _ in range(2):
            jax.block_until_ready(apply(tuned, *example.args))
            jax.effects_barrier()
        words = [line.split()[0] for line in capfd.readouterr().out.splitlines()]
        assert words == ["first", "second"] * 2


def test_callbacks_see_what_they_saw():
    def fn(params, x):
        h = x @ params["w"]
        return h + jax.pure_callback(lambda h: np.sin(h), jax.ShapeDtypeStruct(h.shape, h.dtype), h)

    tuned = lora(W)
    close(pj.wrap(fn)(tuned, X), fn(pj.merge(tuned), X))


# Caching


@pytest.mark.parametrize("method", some(list(METHODS), 6))
def test_an_eager_call_compiles_once_for_all_values(method):
    it = case(method, usual(method))
    jax.block_until_ready(it.apply(it.tuned, *it.args))
    before = len(it.traces)
    for tuned in (it.fresh, moved(it.tuned, 1), pj.scale(it.tuned, 0.5), pj.disable(it.tuned)):
        jax.block_until_ready(it.apply(tuned, *(x[::-1] for x in it.args)))
    assert len(it.traces) == before


def test_an_eager_call_compiles_again_for_other_types_trees_and_static_arguments():
    traces = []

    def fn(params, x, flag=False):
        traces.append(flag)
        return x @ params["w"].astype(x.dtype)

    apply, tuned = pj.wrap(fn), lora(W)
    calls = [
        lambda: apply(tuned, X),
        lambda: apply(tuned, X[:3]),
        lambda: apply(tuned, X.astype(jnp.bfloat16)),
        lambda: apply(tuned, X, True),
        lambda: apply(lora(W, rank=1), X),
        lambda: apply(pj.unfreeze("w").init(KEY, W), X),
    ]
    for n, call in enumerate(calls, 1):
        for _ in range(3):
            jax.block_until_ready(call())
        assert len(traces) == n
    assert traces == [False, False, False, True, False, False]


def test_a_tree_without_overlays_goes_straight_to_the_function():
    seen = []
    fn = lambda params, x: seen.append(params) or x @ params["w"]
    close(pj.wrap(fn)(W, X), X @ W["w"])
    assert seen[0] is W


def test_wrapping_keeps_the_name_and_may_be_repeated():
    tuned = lora(W)
    twice = pj.wrap(pj.wrap(product))
    assert twice.__name__ == "product"
    close(twice(tuned, X), pj.wrap(product)(tuned, X))


def test_dropout_drops_with_a_key_and_only_then():
    tuned = lora(W, dropout=0.5)
    apply, key = pj.wrap(product), jax.random.key(5)
    keyed = pj.with_key(tuned, key)
    close(apply(tuned, X), X @ pj.merge(tuned)["w"])
    assert (apply(keyed, X) != apply(tuned, X)).any()
    close(apply(keyed, X), apply(pj.with_key(tuned, key), X))
    assert (apply(keyed, X) != apply(pj.with_key(tuned, jax.random.key(6)), X)).any()
    mean = jnp.mean(jnp.stack([apply(pj.with_key(tuned, jax.random.key(k)), X) for k in range(400)]), 0)
    close(mean, apply(tuned, X), 0.2)
    close(jax.jit(apply)(keyed, X), apply(keyed, X))
    with pytest.raises(TypeError, match="with_key: expected a random key.*found 0"):
        pj.with_key(tuned, 0)


@pytest.mark.parametrize(
    "fn, where",
    [
        (lambda params, x: x @ jnp.tanh(params["w"]), "tanh"),
        (lambda params, x: x @ (params["w"] @ params["w"].T), "dot_general"),
        (lambda params, x: params["w"][:1] * 2 + x[0, 0], "mul"),
    ],
)
def test_dropout_where_a_weight_would_be_merged_is_refused(fn, where):
    keyed = pj.with_key(lora(W, dropout=0.5), jax.random.key(5))
    with pytest.raises(ValueError, match=f"the overlay at w has dropout.* would have to be merged for {where}"):
        pj.wrap(fn)(keyed, X)
    close(pj.wrap(fn)(pj.with_key(keyed, None), X), fn(pj.merge(keyed), X))


# Transformations from outside


def test_vmap_over_examples():
    tuned, xs = lora(W), data(3, 5, 8)
    got = jax.vmap(pj.wrap(product), in_axes=(None, 0))(tuned, xs)
    close(got, xs @ pj.merge(tuned)["w"])


def test_reverse_over_reverse():
    tuned = lora({"w": data(8, 8)}, targets="w")
    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) ** 2)
    force = lambda apply, params: jnp.sum(jax.grad(lambda x: apply(params, x))(X) ** 2)
    second = lambda apply, build: jax.grad(lambda b: force(apply, build(b)))(tuned["w"].b)
    build = lambda b: {"w": tuned["w"].replace(b=b)}
    close(second(pj.wrap(fn), build), second(fn, lambda b: pj.merge(build(b))))


def test_forward_mode():
    tuned, direction = lora(W), data(5, 8, seed=2)
    got = jax.jvp(lambda x: pj.wrap(product)(tuned, x), (X,), (direction,))[1]
    close(got, direction @ pj.merge(tuned)["w"])
    b = tuned["w"].b
    got = jax.jvp(lambda b: pj.wrap(product)({"w": tuned["w"].replace(b=b)}, X), (b,), (b,))[1]
    close(got, pj.wrap(product)(tuned, X) - X @ W["w"])


def test_forward_over_reverse():
    tuned = lora({"w": data(8, 8) / 4}, targets="w")  # small enough that rounding stays below the tolerance
    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) ** 2)
    curvature = lambda apply, params: jax.jvp(jax.grad(lambda x: apply(params, x)), (X,), (X,))[1]
    close(curvature(pj.wrap(fn), tuned), curvature(fn, pj.merge(tuned)))


def test_derivatives_inside_the_function():
    """A divergence by forward mode, and an energy's force by reverse mode."""

    def fn(params, x):
        field = lambda x: jnp.tanh(x @ params["w"])
        force = jax.grad(lambda x: jnp.sum(field(x) ** 2))(x)
        return force + jax.jvp(field, (x,), (x,))[1] + jax.hessian(lambda x: jnp.sum(field(x)))(x[0]).sum(0)[None]

    params = {"w": data(8, 8)}
    tuned = lora(params, targets="w")
    close(pj.wrap(fn)(tuned, X), fn(pj.merge(tuned), X))


@jax.custom_jvp
def halved(x, w):
    return x @ w


@halved.defjvp
def _halved_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 0.5 * (dx @ w + x @ dw)


@jax.custom_vjp
def clipped(x, w):
    return x @ w


def _clipped_fwd(x, w):
    return x @ w, (x, w)


def _clipped_bwd(saved, g):
    x, w = saved
    g = jnp.clip(g, -0.1, 0.1)
    return g @ w.T, x.T @ g


clipped.defvjp(_clipped_fwd, _clipped_bwd)


def gradients(fn, tuned):
    """The gradients of what trains, through overlays and through the merged weight."""
    trainable, frozen = pj.partition(tuned)
    total = lambda apply: jax.grad(lambda t: jnp.sum(jnp.sin(apply(pj.combine(t, frozen)))))(trainable)["w"]
    overlaid, merged = total(lambda tree: pj.wrap(fn)(tree, X)), total(lambda tree: fn(pj.merge(tree), X))
    return (overlaid.a, overlaid.b), (merged.a, merged.b)


@pytest.mark.parametrize("rule", [halved, clipped])
def test_custom_derivatives_are_kept(rule):
    fn = lambda params, x: rule(x, params["w"])
    tuned = lora(W)
    (a, b), (want_a, want_b) = gradients(fn, tuned)
    close(a, want_a)
    close(b, want_b)
    (plain, _), _ = gradients(product, tuned)
    assert np.abs(np.asarray(plain - a)).max() > 0.1, "the custom rule does not matter here"
    if rule is clipped:
        assert [event.primitive for event in pj.explain(fn, tuned, X).merged] == ["custom_vjp_call"]


def test_a_custom_rule_with_static_arguments():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scaled(factor, x, w):
        return factor * (x @ w)

    scaled.defvjp(lambda f, x, w: (f * (x @ w), (x, w)), lambda f, saved, g: (2 * g @ saved[1].T, 2 * saved[0].T @ g))
    (a, b), (want_a, want_b) = gradients(lambda params, x: scaled(3.0, x, params["w"]), lora(W))
    close(a, want_a)
    close(b, want_b)


def test_stop_gradient_is_kept():
    fn = lambda params, x: x @ lax.stop_gradient(params["w"]) + jnp.sum(params["w"])
    (a, b), (want_a, want_b) = gradients(fn, lora(W))
    close(a, want_a)
    close(b, want_b)


def test_a_weight_that_meets_itself():
    fn = lambda params, x: x @ params["w"] @ (params["w"].T @ params["w"])
    (a, b), (want_a, want_b) = gradients(fn, lora(W))
    close(a, want_a, 1e-4)
    close(b, want_b, 1e-4)
