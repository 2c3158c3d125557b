"""optax on tuned trees: nothing frozen moves, decays, clips, or costs memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from peftjax.depth import spans
from peftjax.gradient import value_and_grad
from peftjax.methods.lora import LoRA
from peftjax.copies import Full
from peftjax.optim import Untouched, groups, layerwise, lora_plus, train_only
from peftjax.overlay import type_of
from peftjax.roles import Role
from peftjax.switches import lock, with_key
from peftjax.tree import combine, entries, labels, mask, partition

pytestmark = pytest.mark.third_party  # optax promotes dtypes


def lora_on(w: Any, dropout: float = 0.0, axes: str = "io") -> LoRA:
    """A LoRA of rank 2 on a kernel of axes (s,) i, o."""
    *lead, n_in, n_out = type_of(w).shape
    a, b = (jnp.ones((*lead, *shape)) for shape in ((n_in, 2), (2, n_out)))
    return LoRA(base=w, a=a, b=b, scale=jnp.ones(lead), axes=axes, dropout=dropout)


def full_on(w: Any) -> Full:
    """A trained copy."""
    return Full(base=w, value=jnp.array(w, jnp.float32, copy=True), scale=jnp.ones(()), axes="io"[-w.ndim :])


def tree() -> dict[str, Any]:
    """Frozen arrays of every sort a step must keep: negative zeros, bf16, an integer, a NumPy array, nothing."""
    return {
        "bias": full_on(jnp.array([-0.0, 1.0])),
        "kernel": lora_on(jnp.full((3, 2), -0.0)),
        "plain": jnp.array([-0.0, 3.0], jnp.bfloat16),
        "step": jnp.int32(3),
        "numpy": np.array([-0.0, 2.0], np.float32),
        "none": None,
    }


def bits(x: Any) -> bytes:
    """Its bytes: unlike `==`, they tell -0.0 from 0.0."""
    return np.asarray(x).tobytes()


def grads_of(tuned: Any, size: float = 1.0) -> Any:
    """A gradient for everything."""
    return jax.tree.map(lambda x: jnp.full_like(x, size), tuned)


def frozen_bits(tuned: Any) -> list[bytes]:
    """The bytes of what is frozen."""
    return [bits(e.value) for e in entries(tuned) if not e.trains]


@pytest.mark.parametrize("jit", [False, True])
def test_frozen_arrays_keep_their_bits(jit):
    tuned = tree()
    tx = train_only(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.5)), tuned)

    def step(tuned: Any, state: Any) -> Any:
        updates, state = tx.update(grads_of(tuned), state, tuned)
        return optax.apply_updates(tuned, updates), state

    after, state = tuned, tx.init(tuned)
    for _ in range(2):
        after, state = (jax.jit(step) if jit else step)(after, state)
    assert frozen_bits(after) == frozen_bits(tuned)
    assert jax.tree.structure(after) == jax.tree.structure(tuned)
    moved = [bool((x != y).all()) for x, y in zip(*(jax.tree.leaves(partition(t)[0]) for t in (after, tuned)))]
    assert moved == [True] * 3


def test_it_is_the_same_as_training_the_part_alone():
    tuned, tx = tree(), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    whole, (trainable, frozen) = train_only(tx, tuned), partition(tuned)
    updates, state = whole.update(grads_of(tuned), whole.init(tuned), tuned)
    expected, expected_state = tx.update(partition(grads_of(tuned))[0], tx.init(trainable), trainable)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    new = optax.apply_updates(tuned, updates)
    for x, y in zip(*map(jax.tree.leaves, (new, combine(optax.apply_updates(trainable, expected), frozen)))):
        assert bits(x) == bits(y)


def test_no_state_and_no_clipping_by_frozen_gradients():
    tuned = tree()
    tx = train_only(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9)), tuned)
    grads = combine(partition(grads_of(tuned, 0.01))[0], partition(grads_of(tuned, 100.0))[1])
    updates, state = tx.update(grads, tx.init(tuned), tuned)
    np.testing.assert_allclose(updates["bias"].value, [-0.01, -0.01], rtol=1e-6)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 + 3 * 2 + 2 * 2
    assert isinstance(updates["plain"], Untouched) and updates["none"] is None
    assert len(jax.tree.leaves(updates)) == 3


def test_traps_that_train_only_avoids():
    """Why not something simpler: each of these hands frozen arrays an update, decay, or memory."""
    tuned = {"k": lora_on(jnp.ones((3, 2)))}
    run = lambda tx: tx.update(grads_of(tuned), tx.init(tuned), tuned)[0]["k"].base[0, 0]
    frozen = jax.tree.map(lambda m: not m, mask(tuned))
    assert run(optax.masked(optax.sgd(0.1), mask(tuned))) == 1.0
    assert run(optax.chain(optax.masked(optax.set_to_zero(), frozen), optax.adamw(0.1, weight_decay=0.1))) != 0
    state = optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), frozen)).init(tuned)
    assert sum(x.size for x in jax.tree.leaves(state)) > 2 * 6 * 2
    kept = optax.partition({"train": optax.adamw(0.1), "freeze": optax.set_to_zero()}, labels(tuned))
    assert run(kept) == 0.0
    lost = optax.apply_updates(jnp.float32(-0.0), jnp.float32(0.0))
    assert not jnp.signbit(lost) and jnp.signbit(optax.apply_updates(jnp.float32(-0.0), Untouched()))


def test_part_trees_give_part_updates():
    tuned = tree()
    tx = train_only(optax.adam(0.1), tuned)
    trainable, _ = partition(tuned)
    updates, _ = tx.update(partition(grads_of(tuned))[0], tx.init(trainable), trainable)
    assert jax.tree.structure(updates) == jax.tree.structure(trainable)
    optax.apply_updates(trainable, updates)


def test_in_a_train_state():
    tuned = {"k": lora_on(jnp.ones((3, 2))), "b": full_on(jnp.zeros(2))}
    state = TrainState.create(apply_fn=None, params=tuned, tx=train_only(optax.adam(0.1), tuned))
    loss = lambda p: (p["k"].a @ p["k"].b * p["k"].base.sum()).sum() + p["b"].value.sum()
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    after = step(step(state))
    assert frozen_bits(after.params) == frozen_bits(tuned) and int(after.step) == 2
    part = jax.jit(lambda s: s.apply_gradients(grads=value_and_grad(loss)(s.params)[1]))
    with pytest.raises(TypeError):
        part(state)  # the loop is over the full tree, so the updates have to be too


def test_with_gradients_of_integers():
    tuned = {"k": full_on(jnp.ones(2)), "n": jnp.int32(2)}
    tx = train_only(optax.sgd(1.0), tuned)
    grads = jax.grad(lambda t: t["k"].value.sum() * t["n"], allow_int=True)(tuned)
    after = optax.apply_updates(tuned, tx.update(grads, tx.init(tuned), tuned)[0])
    assert after["k"].value[0] == -1 and after["n"] == 2 and after["n"].dtype == jnp.int32


def test_in_an_nnx_state():
    tuned = nnx.State({"k": nnx.Param(lora_on(jnp.ones((3, 2)))), "c": nnx.Param(jnp.array(-0.0))})
    tx = train_only(optax.adamw(0.1), tuned)
    updates, _ = tx.update(grads_of(tuned), tx.init(tuned), tuned)
    after = optax.apply_updates(tuned, updates)
    assert frozen_bits(after) == frozen_bits(tuned)
    assert bool((after["k"].get_value().a != 1).all())


def test_under_wrappers_of_optax():
    tuned = tree()
    steps = train_only(optax.MultiSteps(optax.sgd(1.0), 2), tuned)
    updates, state = steps.update(grads_of(tuned), steps.init(tuned), tuned)
    assert not updates["bias"].value.any()
    assert (steps.update(grads_of(tuned), state, tuned)[0]["bias"].value == -1).all()
    finite = train_only(optax.apply_if_finite(optax.sgd(1.0), 3), tuned)
    updates, _ = jax.jit(finite.update)(grads_of(tuned), finite.init(tuned), tuned)
    assert frozen_bits(optax.apply_updates(tuned, updates)) == frozen_bits(tuned)


def test_extra_arguments_are_passed_on():
    class Seen(NamedTuple):
        value: Any

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, grad: Any) -> Any:
        return updates, Seen(value + len(jax.tree.leaves(grad)))

    inner = optax.GradientTransformationExtraArgs(lambda p: Seen(jnp.float32(0)), update)
    tuned = tree()
    tx = train_only(inner, tuned)
    state = tx.update(grads_of(tuned), tx.init(tuned), tuned, value=2.0, grad=grads_of(tuned))[1]
    assert state.value == 5


def test_train_only_refuses():
    with pytest.raises(ValueError, match="nothing in this tree trains"):
        train_only(optax.sgd(1.0), lock(tree()))
    with pytest.raises(ValueError, match=r"dropout keys \(k/key\): call `with_key"):
        train_only(optax.sgd(1.0), with_key({"k": lora_on(jnp.ones((3, 2)), 0.1)}, jax.random.key(0)))
    tx = train_only(optax.sgd(1.0), tree())
    with pytest.raises(ValueError, match="made for the overlays of another tree"):
        tx.init({"k": lora_on(jnp.ones((3, 2)))})


def test_groups_first_match_wins():
    tuned = tree()
    tx = groups(tuned, {"kernel/a": optax.sgd(3.0), "kernel": optax.sgd(2.0), ".*": optax.sgd(1.0)})
    updates, _ = tx.update(grads_of(tuned), tx.init(tuned), tuned)
    assert [float(u.ravel()[0]) for u in (updates["kernel"].a, updates["kernel"].b, updates["bias"].value)] == [
        -3,
        -2,
        -1,
    ]
    assert isinstance(updates["plain"], Untouched)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["kernal/.*", ".*"], r"match nothing that trains.*'kernal/\.\*' \(nearest: kernel/"),
        ([".*", "kernel/b"], r"only what one before took: 'kernel/b'"),
        (["kernel/.*"], r"no pattern matches bias/value; end with '\.\*'"),
    ],
)
def test_groups_refuse(patterns, said):
    with pytest.raises(ValueError, match=said):
        groups(tree(), {p: optax.sgd(1.0) for p in patterns})


def test_lora_plus_with_a_schedule():
    tuned = {"k": lora_on(jnp.ones((3, 2)))}
    tx = lora_plus(tuned, optax.linear_schedule(1.0, 0.0, 2), optimizer=optax.sgd)
    state = tx.init(tuned)
    for rate in (1.0, 0.5):
        updates, state = tx.update(grads_of(tuned), state, tuned)
        assert float(updates["k"].a[0, 0]) == -rate and float(updates["k"].b[0, 0]) == -16 * rate
    with pytest.raises(ValueError, match="match nothing that trains"):
        lora_plus({"b": full_on(jnp.ones(2))}, 1.0)


def test_lora_plus_takes_fields_and_no_leaf_called_b():
    """Haiku's biases are called `b`; only LoRA's own B is fast."""
    tuned = {"linear": {"w": lora_on(jnp.ones((3, 2))), "b": full_on(jnp.ones(2))}}
    tx = lora_plus(tuned, 1.0, ratio=4.0, optimizer=optax.sgd)
    updates = tx.update(grads_of(tuned), tx.init(tuned), tuned)[0]["linear"]
    assert [float(u.ravel()[0]) for u in (updates["w"].a, updates["w"].b, updates["b"].value)] == [-1, -4, -1]


def linear(order: int, axes: str = "io") -> Role:
    """The role of a kernel."""
    return Role(op="linear", axes=axes, order=order)


def test_layers_of_a_numbered_model():
    paths = ["emb/word", "emb/pos", "enc/layer/0/q", "rel", "enc/layer/0/k", "enc/layer/10/q", "pool/w", "head/w"]
    roles = {path: linear(k) for k, path in enumerate(paths)}
    found = spans({path: jnp.ones((2, 2)) for path in paths}, roles)
    assert [found[path].first for path in paths] == [0, 0, 1, 1, 1, 2, 3, 3]


def test_layers_that_are_stacked_each_have_a_rate():
    w = jnp.ones((3, 4, 2))
    shapes = {"emb": jnp.ones((4, 4)), "q": lora_on(w, axes="sio"), "k": full_on(w), "out": lora_on(jnp.ones((4, 2)))}
    roles = {"emb": linear(0), "q": linear(1, "sio"), "k": linear(2, "sio"), "out": linear(3)}
    tx = layerwise(shapes, 1.0, 0.5, roles, optimizer=optax.sgd)
    updates, _ = jax.jit(tx.update)(grads_of(shapes), tx.init(shapes), shapes)
    for u in (updates["q"].a, updates["q"].b, updates["k"].value):
        np.testing.assert_allclose(-u[:, 0, 0], [0.125, 0.25, 0.5])
    assert updates["out"].a[0, 0] == -1


def test_a_stack_along_another_axis():
    x = full_on(jnp.ones((4, 3, 2)))
    roles = {"w": linear(0, "iso"), "v": linear(1)}
    tuned = {"w": x, "v": jnp.ones((2, 2))}
    tx = layerwise(tuned, 1.0, 0.5, roles, optimizer=optax.sgd)
    np.testing.assert_allclose(-tx.update(grads_of(tuned), tx.init(tuned))[0]["w"].value[0, :, 0], [0.125, 0.25, 0.5])
    with pytest.raises(ValueError, match="serves 3 stacked layers at once"):
        layerwise({"w": lora_on(jnp.ones((3, 3, 2)), axes="bio"), "v": jnp.ones((2, 2))}, 1.0, 0.5, roles)
    nested = {"w": lora_on(lora_on(jnp.ones((3, 4, 2)), axes="sio"), axes="sio"), "v": jnp.ones((2, 2))}
    tx = layerwise(nested, 1.0, 0.5, roles | {"w": linear(0, "sio")}, optimizer=optax.sgd)
    np.testing.assert_allclose(
        -tx.update(grads_of(nested), tx.init(nested))[0]["w"].base.b[:, 0, 0], [0.125, 0.25, 0.5]
    )


def test_layerwise_refuses():
    tuned = {"a": full_on(jnp.ones((2, 2))), "b": jnp.ones((2, 2))}
    roles = {"a": linear(0), "b": linear(1)}
    with pytest.raises(ValueError, match="the model has 1 layer"):
        layerwise(tuned, 1.0, 0.5, roles)
    with pytest.raises(ValueError, match=r"decay in \(0, 1\]"):
        layerwise(tuned, 1.0, 1.5, roles)
    with pytest.raises(ValueError, match="a trains, but has no role"):
        layerwise(tuned | {"c": jnp.ones((2, 2))}, 1.0, 0.5, {"b": linear(0), "c": linear(1)}, block=lambda path: path)
    made = layerwise(tuned, 1.0, 0.5, roles, block=lambda path: path, optimizer=optax.sgd)
    assert made.update(grads_of(tuned), made.init(tuned))[0]["a"].value[0, 0] == -0.5
