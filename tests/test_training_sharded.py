"""The train step on eight devices: as on one, and nothing of the base is gathered, copied or donated for it."""

import collections
import functools
import itertools
import json
import math
import re
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax as pj
import pytest
from covers import covered, some
from test_training import token_loss
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from experiments.models.decoder import planned
from peftjax import plan, sharding
from peftjax.hlo import Program
from peftjax.overlay import frozen, overlay, trained
from peftjax.paths import flatten
from peftjax.roles import Role, Roles
from peftjax.sharding_rules import by_metadata, by_rules, make_mesh, within

pytestmark = pytest.mark.third_party  # optax's own promotions
KEY = jax.random.key(0)
RULES = [
    (".*/up/kernel", P("fsdp", "model")),
    (".*/up/bias", P("model")),
    (".*/down/kernel", P("model", "fsdp")),
    ("embed/embedding", P("model", "fsdp")),
    ("head/kernel", P("fsdp", "model")),
]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(nn.Dense(32, name="up")(h)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(24, 16, name="embed")(ids)  # (B, T, D)
        for k in range(2):
            x = Block(name=f"block_{k}")(x)
        return nn.Dense(24, use_bias=False, name="head")(x)


def batch_of(seed=0, n=16):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 24, (n, 6)).astype(np.int32)
    return {"ids": ids, "mask": (rng.random((n, 6)) < 0.7).astype(np.float32)}


METHODS = {"lora": pj.lora(rank=4, alpha=8), "dora": pj.dora(rank=4), "full": pj.full()}


@functools.cache
def made(method):
    model = Net()
    params = model.init(KEY, batch_of()["ids"])["params"]
    fn = lambda params, batch: model.apply({"params": params}, batch["ids"])
    return *pj.attach(METHODS[method], fn, params, batch_of(), key=KEY), fn


def losses(step, state, steps=4):
    found = []
    for seed in range(steps):
        state, metrics = step(state, batch_of(seed))
        found.append(float(metrics["loss"]))
    return found, state


@functools.cache
def alone(method):
    apply, tuned, _ = made(method)
    tx = optax.adamw(1e-2)
    return losses(pj.make_train_step(apply, token_loss, tx), pj.train_state(tuned, tx))


def started(method, mesh, tx):
    tuned = made(method)[1]
    return pj.train_state(tuned, tx, mesh=mesh, specs=by_rules(RULES, pj.strip(tuned), mesh))


@pytest.mark.parametrize("method, accumulate", covered(list(METHODS), [1, 2], at=(0, 1)))
def test_eight_devices_give_what_one_gives(method, accumulate):
    mesh, tx = make_mesh("data:2,fsdp:2,model:2"), optax.adamw(1e-2)
    step = pj.make_train_step(made(method)[0], token_loss, tx, mesh, accumulate=accumulate)
    found, state = losses(step, started(method, mesh, tx))
    np.testing.assert_allclose(found, alone(method)[0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(alone(method)[1].trainable), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_fields_and_moments_lie_as_their_base_and_stay_there():
    mesh, tx = make_mesh("data:2,fsdp:2,model:2"), optax.adamw(1e-2)
    state = started("lora", mesh, tx)
    step = pj.make_train_step(made("lora")[0], token_loss, tx, mesh)
    for state in (state, losses(step, state, 1)[1]):
        adam = state.opt_state[0]
        for tree in (state.trainable, adam.mu, adam.nu):
            x = tree["block_0"]["up"]["kernel"]
            assert x.a.sharding.spec == P("fsdp", None) and x.b.sharding.spec == P(None, "model")
        assert state.frozen["block_0"]["up"]["kernel"].base.sharding.spec == P("fsdp", "model")
        assert adam.count.sharding.spec == P()


def test_under_set_mesh():
    mesh, tx = make_mesh("data:4,model:2"), optax.adamw(1e-2)
    apply, tuned, _ = made("lora")
    with jax.set_mesh(mesh):
        specs = by_rules([(".*/up/kernel", P(None, "model"))], pj.strip(tuned), mesh)
        state = pj.train_state(tuned, tx, mesh=mesh, specs=specs)
        found, _ = losses(pj.make_train_step(apply, token_loss, tx, mesh), state)
    np.testing.assert_allclose(found, alone("lora")[0], rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_explicit_axes(accumulate):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = {"up": jnp.ones((4, 8)) / 4, "down": jnp.ones((8, 2)) / 8}
    whole = lambda y: (
        jax.sharding.reshard(y, P("data", None)) if "data" in jax.sharding.get_abstract_mesh().shape else y
    )
    fn = lambda params, batch: whole(jnp.tanh(batch["x"] @ params["up"])) @ params["down"]
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    loss, tx = lambda y, batch: ((y**2).mean(), {}), optax.adam(1e-2)
    apply, tuned = pj.attach(pj.lora(rank=2, targets=".*"), fn, params, {"x": x}, key=KEY)
    plain, _ = pj.make_train_step(apply, loss, tx)(pj.train_state(tuned, tx), {"x": x})
    with jax.set_mesh(mesh):
        specs = {"up": P(None, "model"), "down": P()}
        state = pj.train_state(tuned, tx, mesh=mesh, specs=specs)
        state, _ = pj.make_train_step(apply, loss, tx, mesh, accumulate=accumulate)(state, {"x": x})
    for got, want in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(plain.trainable), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_a_penalty_and_an_update_under_explicit_axes():
    """AdaLoRA's, whose norms and scores are of whole matrices: of kernels in parts, and of experts on several devices."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"up": P(None, "model"), "down": P("model", None), "experts": P("data", None, "model")}
    draw = lambda k, *shape: jax.random.normal(jax.random.key(k), shape)
    params = {"up": draw(0, 4, 8), "down": draw(1, 8, 6), "experts": draw(2, 4, 4, 8)}
    axes = {"up": "io", "down": "io", "experts": "bio"}
    roles = Roles({k: Role(op="linear", axes=x, order=0, uses=("dot_general",)) for k, x in axes.items()})
    method = pj.adalora(rank=3, target_rank=1, total_steps=8, tinit=1, tfinal=2)
    tuned = method.init(KEY, params, roles)

    @jax.jit
    def step(trainable, frozen, grads):
        value, pulled = jax.value_and_grad(lambda t: method.penalty(pj.combine(t, frozen)))(trainable)
        return value, pulled, method.update(pj.combine(trainable, frozen), grads, 2)

    trainable, frozen = pj.partition(tuned)
    trainable, grads = (jax.tree.map(lambda x: draw(k, *x.shape), trainable) for k in (3, 4))
    want = step(trainable, frozen, grads)
    with jax.set_mesh(mesh):
        lies = pj.partition(sharding.shardings(tuned, mesh, specs))
        got = step(*jax.device_put((trainable, frozen, grads), (*lies, lies[0])))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert got[2]["experts"].kept.sharding.spec == P("data", None)
    assert sum(int(x.kept.sum()) for x in got[2].values()) == 12  # of 18; 6 in the end


def collectives(compiled, kind):
    """The bytes of each collective of a kind in a compiled program."""
    return [size for k, size, _ in Program(compiled.as_text()).exchanges if k == kind]


def lowered(method, mesh, tx=optax.adamw(1e-2)):
    step = pj.make_train_step(made(method)[0], token_loss, tx, mesh)
    return step.lower(started(method, mesh, tx), batch_of()).compile()


KERNELS = ".*/(up|down)/kernel|head/kernel"
MESHES = {
    "rows": ("fsdp:8", [(KERNELS, P("fsdp", None))]),
    "columns": ("data:2,fsdp:4", [(KERNELS, P(None, "fsdp"))]),
    "both": ("fsdp:4,model:2", [rule for rule in RULES if rule[0] != "embed/embedding"]),
    "table": ("data:2,fsdp:2,model:2", RULES),
    "model": ("data:4,model:2", [(".*/up/kernel", P(None, "model")), (".*/down/kernel", P("model", None))]),
}
FROZEN = {
    "lora": pj.lora(rank=3),
    "dora": pj.dora(rank=3),
    "ia3": pj.ia3(targets=".*/(up|down)/kernel"),
    "adapter": pj.adapter("pfeiffer", bottleneck=3),
}


def wholes(x):
    """The shapes that a matrix has on a device where it has been gathered, along some axes or all."""
    part = x.sharding.shard_shape(x.shape)
    return {*itertools.product(*map(set, zip(x.shape, part)))} - {part}


def gathered_weights(compiled, base):
    """How often a program gathers an array whose shape is that of a matrix of the base; no other array has one."""
    shapes = {shape for x in jax.tree.leaves(base) if x.ndim == 2 for shape in wholes(x)}
    made = re.findall(r"= \(?f32\[(\d+),(\d+)\]\S* all-gather(?:-start)?\(", compiled.as_text())
    return collections.Counter(shape for dims in made if (shape := tuple(map(int, dims))) in shapes)


@functools.cache
def base_gathers(name):
    """What the base gathers going forward, and what it gathers for the gradient of its embeddings too."""
    (params, batch), fn = on_mesh(name, "lora")[1:3], made("lora")[2]

    def back(params, batch):
        total = lambda x: token_loss(fn({**params, "embed": {"embedding": x}}, batch), batch)[0]
        return jax.value_and_grad(total)(params["embed"]["embedding"])

    return [gathered_weights(jax.jit(f).lower(params, batch).compile(), params) for f in (fn, back)]


def on_mesh(name, method):
    """A compiled step, the base and a batch on a mesh; a device has more rows than a kernel has inputs."""
    (axes, rules), fn, tx, batch = MESHES[name], made("lora")[2], optax.adamw(1e-2), batch_of(n=80)
    params, mesh = pj.strip(made("lora")[1]), make_mesh(axes)
    apply, tuned = pj.attach(FROZEN[method], fn, params, batch, key=KEY)
    state = pj.train_state(tuned, tx, mesh=mesh, specs=by_rules(rules, params, mesh))
    step = pj.make_train_step(apply, token_loss, tx, mesh, method=FROZEN[method])
    return step.lower(state, batch).compile(), pj.strip(state.tuned), step.place(batch)


@pytest.mark.parametrize("name, method", covered(list(MESHES), list(FROZEN), at=(0, 3)))
def test_no_weight_of_the_base_is_gathered_that_the_base_does_not_gather(name, method):
    """Not once more than by the base's forward pass; where that moves activations to the weights, than by its gradient.

    Of layers that a scan makes, which are gathered anew going back, the next test speaks.
    """
    step, params, _ = on_mesh(name, method)
    forward, back = base_gathers(name)
    found = gathered_weights(step, params)
    assert found <= (back if name == "table" else forward), (found, forward, back)
    assert sum(back.values()) >= (0 if name == "model" else 5)


DECODER = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def layers_gathered(compiled, sizes):
    """How often a program gathers so many numbers as a matrix has, in all runs of its loops."""
    found = collections.Counter()
    for kind, size, times in Program(compiled.as_text()).exchanges:
        if kind == "all-gather" and size // 4 in sizes:
            found[size // 4] += times
    return found


@pytest.mark.ci
@pytest.mark.parametrize("name, remat", some(list(itertools.product(["lora", "dora", "adapter"], ["layers", "none"])), 6))
def test_a_scanned_layer_is_gathered_as_often_as_by_the_passes_of_the_base(name, remat, tmp_path):
    """Once going forward and once going back, of which the second has every layer computed again."""
    (tmp_path / "config.json").write_text(json.dumps(DECODER))
    mesh, tx, method = make_mesh("fsdp:8"), optax.adamw(1e-3), plan.METHODS[name](1)
    model = planned(str(tmp_path / "config.json"), mesh, 16, 64, remat)
    roles = pj.roles(model.fn, model.params, model.batch)
    tuned = jax.eval_shape(lambda params: method.init(KEY, params, roles), model.params)
    state = pj.train_state(tuned, tx, mesh=mesh, specs=model.specs)
    step = pj.make_train_step(pj.wrap(model.fn), model.loss, tx, mesh, method=method)
    params, batch = pj.strip(state.tuned), step.place(model.batch)

    def back(params, batch):
        table = params["model"]["embed_tokens"]["embedding"]
        with_table = lambda x: {**params, "model": {**params["model"], "embed_tokens": {"embedding": x}}}
        return jax.grad(lambda x: model.loss(model.fn(with_table(x), batch), batch)[0])(table)

    sizes = {math.prod(x.shape[1:]) for path, x in flatten(params) if x.ndim == 3}
    found, forward, base = (
        layers_gathered(x.compile(), sizes)
        for x in (step.lower(state, model.batch), *(jax.jit(f).lower(params, batch) for f in (model.fn, back)))
    )
    assert found and set(found) == set(forward) and found <= base, (found, forward, base)


def test_reduced_bytes_follow_what_trains():
    mesh, tx = make_mesh("data:8"), optax.sgd(1e-2)

    def reduced(method):
        apply, tuned, _ = made(method)
        state = pj.train_state(tuned, tx, mesh=mesh)
        step = pj.make_train_step(apply, token_loss, tx, mesh)
        return sum(collectives(step.lower(state, batch_of()).compile(), "all-reduce")), pj.count(tuned).trainable * 4

    for method in ("lora", "full"):
        found, trained = reduced(method)
        assert trained <= found <= 1.05 * trained + 64, (method, found, trained)


def test_frozen_arrays_are_neither_donated_nor_copied():
    mesh = make_mesh("data:2,fsdp:2,model:2")
    tx = optax.sgd(1e-2)
    state = started("lora", mesh, tx)
    frozen = jax.tree.leaves(state.frozen)
    moving = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.trainable, state.opt_state)))
    _, after = losses(pj.make_train_step(made("lora")[0], token_loss, tx, mesh), state, 1)
    assert all(x is y for x, y in zip(jax.tree.leaves(after.frozen), frozen, strict=True))
    memory = lowered("lora", mesh, tx).memory_analysis()
    assert memory.output_size_in_bytes < moving + 256 + 8 * len(jax.tree.leaves(state.trainable))


def test_where_an_axis_does_not_divide_it_is_replicated_and_said_so():
    mesh = make_mesh("data:1,model:8")
    params = {"w": jnp.ones((6, 16)), "v": jnp.ones((16, 6))}
    with pytest.warns(UserWarning, match="v, axis 1 of 6, over 'model' in 8"):
        specs = by_rules([(".*", P(None, "model"))], params, mesh)
    assert specs == {"w": P(None, "model"), "v": P(None, None)}


@overlay
class Halves(pj.Overlay):
    """A made-up overlay with a row for every two of its base's."""

    base: Any = frozen()
    rows: Any = trained()

    def labels(self):
        return {"rows": ((0,), "own")}


def test_specs_by_hand_are_fitted_too():
    """What the mesh does not divide is replicated in the base, the fields on it and the moments, and said once."""
    mesh = make_mesh("data:2,model:4")
    tuned = pj.lora(rank=2, targets="w").init(KEY, {"w": jnp.ones((6, 10)), "b": jnp.ones(6)})
    with pytest.warns(UserWarning) as told:
        state = pj.train_state(tuned, optax.adam(0.1), mesh=mesh, specs={"w": P("model"), "b": P(("data", "model"))})
    (words,) = [str(x.message) for x in told]
    assert words.endswith("them: b, axis 0 of 6, over ('data', 'model') in 8; w, axis 0 of 6, over 'model' in 4")
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    with pytest.warns(UserWarning, match="them: w/rows, axis 0 of 2, over 'model' in 4"):
        made = sharding.specs({"w": Halves(base=jnp.ones((4, 3)), rows=jnp.ones((2, 1)))}, {"w": P("model")}, mesh)
    assert made["w"].base == P("model", None) and made["w"].rows == P(None, None)


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"w": P("modl"), "b": None}, "w: the mesh has no axis 'modl'; expected one of data, model"),
        ({"w": None, "b": P(("data", "modl"))}, "b: the mesh has no axis 'modl'; expected one of data, model"),
        ({"w": P(), "b": P(None, "model")}, r"b: .* has 2 entries, expected at most 1, for \(6,\)"),
        (P(None, None, "model"), "has 3 entries, expected at most"),
        ({"w": P("model", "model"), "b": None}, r"w: P.*\('model', 'model'\) names the axis 'model' twice"),
        ({"w": P(("model", "data"), "model"), "b": None}, "w: .* names the axis 'model' twice"),
        ({"w": P()}, "the specs do not fit the base, expected one .*\n  missing: b$"),
        ({"w": P(), "b": None, "ww": P()}, r":\n  unknown: ww \(nearest: w\)$"),
        ({"w": {"x": P()}, "b": P()}, r":\n  missing: w\n  unknown: w/x \(nearest: w\)$"),
        ({"w": P(), "b": nn.Partitioned(P(), (None,))}, r"tree\['b'\]"),  # of the same paths: in JAX's words
        ({"w": (None, "model"), "b": P()}, r"the specs hold 'model' at 'w/1', expected a PartitionSpec \(or None\)"),
    ],
)
def test_specs_by_hand_that_are_wrong_are_named(spec, words):
    tuned = pj.lora(rank=2, targets="w").init(KEY, {"w": jnp.ones((6, 8)), "b": jnp.ones(6)})
    with pytest.raises(ValueError, match=words):
        pj.train_state(tuned, optax.sgd(0.1), mesh=make_mesh("data:2,model:4"), specs=spec)


def test_metadata_of_linen_and_nnx():
    mesh = make_mesh("data:4,model:2")
    boxed = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "mlp")))
    params = boxed.init(KEY, jnp.ones((1, 4)))["params"]
    specs = by_metadata(params, mesh, {"mlp": "model"})
    assert specs["kernel"].value == P(None, "model") and specs["bias"] == P()
    _, tuned = pj.attach(
        pj.lora(rank=2, targets="kernel"), lambda p, x: boxed.apply({"params": p}, x), params, jnp.ones((8, 4)), key=KEY
    )
    state = pj.train_state(tuned, optax.sgd(0.1), mesh=mesh, specs=specs)
    assert state.trainable["kernel"].value.b.sharding.spec == P(None, "model")

    init = nnx.with_partitioning(nnx.initializers.ones, (None, "model"))
    with warnings.catch_warnings(), jax.set_mesh(mesh):
        warnings.simplefilter("ignore", DeprecationWarning)
        graphdef, state = nnx.split(nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0)))
    specs = by_metadata(state, mesh)
    assert jax.tree.leaves(specs["kernel"], is_leaf=lambda x: isinstance(x, P)) == [P(None, "model")]
    fn = lambda params, x: nnx.merge(graphdef, params)(x)
    _, tuned = pj.attach(pj.lora(rank=2, targets="kernel"), fn, state, jnp.ones((8, 4)), key=KEY)
    placed = pj.train_state(tuned, optax.sgd(0.1), mesh=mesh, specs=specs)
    fields = {name: x for name, x in pj.extract(placed.tuned).items()}
    assert fields["kernel/b"].sharding.spec == P(None, "model")


@pytest.mark.parametrize(
    "axes,words",
    [
        ("data:3,model:2", ("multiply to 6", "expected 8")),
        ("data:2,data:4", ("names an axis twice",)),
        ("data=2", ("expected names and sizes",)),
        ("data:-1,model:3", ("3 does not divide 8, the number of devices",)),
        ("data:-1,model:-1", ("expected sizes of 1 or more, of which one may be -1",)),
        ("data:-2,model:-4", ("expected sizes of 1 or more, of which one may be -1",)),
        ("data:0,model:-1", ("expected sizes of 1 or more, of which one may be -1",)),
        ("", ("expected names and sizes",)),
    ],
)
def test_a_mesh_that_is_none(axes, words):
    with pytest.raises(ValueError) as error:
        make_mesh(axes)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "rules, words",
    [
        ([(".*", P("model"))], "no axis 'model'; expected one of data"),
        ([("up/kernle", P("data"))], r"'up/kernle' \(nearest: up/kernel\)"),
        ([(".*", P(None, None, "data"))], "has 3 entries, expected at most 2"),
        ([(".*", P("data", "data"))], r"rule '\.\*': P.*\('data', 'data'\) names the axis 'data' twice"),
        ([("up/.*", P("data")), ("up/.*", P("data"))], r"win no leaf: 'up/\.\*' \(one before it took up/kernel\)"),
        ([("*", P())], r"rule '\*': expected a regex, such as .* \(nothing to repeat at position 0\)"),
        ([("up/.*",)], r"rule \('up/\.\*',\): expected a pair of a regex and a spec"),
        ([("up/.*", "data")], "expected a pair of a regex and a spec"),
        ({"up/.*": P("data")}, r"rule 'up/\.\*': expected a pair of a regex and a spec"),
    ],
)
def test_rules_that_are_wrong_are_named(rules, words):
    with pytest.raises(ValueError, match=words):
        by_rules(rules, {"up": {"kernel": jnp.ones((2, 8))}}, make_mesh("data:8"))


def test_rules_as_json_has_them():
    mesh, params = make_mesh("data:2,model:4"), {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    rules = [["w", [None, ["data", "model"]]], ["b", P("model")]]
    assert by_rules(rules, params, mesh) == {"w": P(None, ("data", "model")), "b": P("model")}
    assert within(rules, make_mesh("model:8")) == [("w", P(None, ("model",))), ("b", P("model"))]


def test_metadata_that_are_wrong_are_named():
    mesh, params = make_mesh("data:8"), {"up": {"kernel": jnp.ones((2, 8))}}
    with pytest.raises(ValueError, match="no leaf says where it lies"):
        by_metadata(params, mesh)
    with pytest.raises(ValueError, match="names an axis 'mlp', which the mesh"):
        by_metadata({"w": nn.Partitioned(jnp.ones((2, 8)), (None, "mlp"))}, mesh)


def test_an_axis_that_splits_nothing_is_refused():
    rules = [("up", P(None, ("fsdp", "model")))]
    assert within(rules, make_mesh("data:2,model:4")) == [("up", P(None, ("model",)))]
    assert within(rules, make_mesh("model:8,extra:1")) == [("up", P(None, ("model",)))]
    for axes, name in (("dta:8", "dta"), ("data:2,tensor:4", "tensor")):
        with pytest.raises(ValueError, match=f"over the axis '{name}' of .* expected axes among data, fsdp, model"):
            within(rules, make_mesh(axes))
    assert within([], make_mesh("rows:8"), ("rows",)) == []
    with pytest.raises(ValueError, match=r"batch_axes: 'rows' is no axis of the mesh \(data, model\)"):
        pj.make_train_step(lambda t, b: b, token_loss, optax.sgd(0.1), make_mesh("data:2,model:4"), batch_axes=["rows"])


def test_a_method_that_changes_frozen_arrays_is_compiled_for_once():
    """They come back where they lay, however the compiler spells it."""
    mesh, tx = make_mesh("data:2,model:4"), optax.adamw(1e-2)
    method = pj.adalora(rank=3, target_rank=1, total_steps=8, tinit=1, tfinal=2)
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
    apply, tuned = pj.attach(method, fn, params, jnp.ones((8, 4)), key=KEY)
    loss = lambda out, batch: ((out**2).mean(), {})
    step = pj.make_train_step(apply, loss, tx, mesh, method=method)
    state = pj.train_state(tuned, tx, mesh=mesh, specs={"up": P(None, "model"), "down": P("model", None)})
    lay = [x.sharding for x in jax.tree.leaves(state.frozen)]
    before = [np.asarray(x) for x in jax.tree.leaves(state.frozen)]
    for _ in range(3):
        state, _ = step(state, jnp.ones((8, 4)))
    assert [x.sharding for x in jax.tree.leaves(state.frozen)] == lay
    assert any(not np.array_equal(x, y) for x, y in zip(before, jax.tree.leaves(state.frozen)))
    assert len(step._jitted) == 1 and [run._cache_size() for run in step._jitted.values()] == [1]


def test_a_batch_and_a_state_that_do_not_fit_the_mesh():
    mesh, tx = make_mesh("data:8"), optax.sgd(0.1)
    apply, tuned, _ = made("lora")
    step = pj.make_train_step(apply, token_loss, tx, mesh)
    with pytest.raises(ValueError, match="holds 4 examples, expected a multiple of 8"):
        step(pj.train_state(tuned, tx, mesh=mesh), batch_of(n=4))
    with pytest.raises(ValueError, match="do not lie on the mesh"):
        step(pj.train_state(tuned, tx), batch_of())


def test_an_abstract_state_lowers():
    mesh, tx = make_mesh("data:2,fsdp:2,model:2"), optax.adamw(1e-2)
    apply, tuned, _ = made("lora")
    shapes = jax.eval_shape(lambda: tuned)
    state = pj.train_state(shapes, tx, mesh=mesh, specs=by_rules(RULES, pj.strip(shapes), mesh))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of())
    memory = pj.make_train_step(apply, token_loss, tx, mesh).lower(state, batch).compile().memory_analysis()
    real = lowered("lora", mesh).memory_analysis()
    assert memory.argument_size_in_bytes == real.argument_size_in_bytes
