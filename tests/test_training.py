"""The train step: its numbers, what it donates, its parts of a batch, and what the methods' hooks and bad steps do."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax as pj
import pytest
from peftjax.method import Method

pytestmark = pytest.mark.third_party  # optax's own promotions
KEY = jax.random.key(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8)(ids)  # (B, T, D)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(11)(x)


def batch_of(n=8, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 11, (n, 6)).astype(np.int32)
    return {"ids": ids, "mask": (rng.random((n, 6)) < 0.7).astype(np.float32)}


def token_loss(logits, batch):
    """The summed cross-entropy of the tokens that count, and how many these are."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["ids"]) * batch["mask"]
    right = (logits.argmax(-1) == batch["ids"]) * batch["mask"]
    return each.sum(), {"weight": batch["mask"].sum(), "accuracy": right.sum()}


@functools.cache
def made(method=pj.lora(rank=2, alpha=6)):
    model = Net()
    params = model.init(KEY, batch_of()["ids"])["params"]
    fn = lambda params, batch: model.apply({"params": params}, batch["ids"])
    apply, tuned = pj.attach(method, fn, params, batch_of(), key=KEY)
    return apply, tuned


def close(got, want, tolerance=1e-6):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def after(step, state, steps=3):
    for seed in range(steps):
        state, metrics = step(state, batch_of(seed=seed))
    return state, metrics


def test_equals_a_loop_by_hand():
    (apply, tuned), tx = made(), optax.adamw(1e-2)
    trainable, frozen = pj.partition(tuned)
    opt_state = tx.init(trainable)

    @jax.jit
    def by_hand(trainable, opt_state, batch):
        def mean(trainable):
            value, aux = token_loss(apply(pj.combine(trainable, frozen), batch), batch)
            return value / aux["weight"]

        value, grads = jax.value_and_grad(mean)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value, grads

    for seed in range(3):
        trainable, opt_state, value, grads = by_hand(trainable, opt_state, batch_of(seed=seed))
    state, metrics = after(pj.make_train_step(apply, token_loss, tx), pj.train_state(tuned, tx))
    close(state.trainable, trainable)
    close(state.opt_state, opt_state)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)
    assert int(state.step) == 3 and int(metrics["skipped"]) == 0


def test_compiles_once():
    apply, tuned = made()
    traces = []
    counted = lambda tuned, batch: traces.append(None) or apply(tuned, batch)
    tx = optax.sgd(0.1)
    after(pj.make_train_step(counted, token_loss, tx), pj.train_state(tuned, tx))
    assert len(traces) == 1


def test_donates_what_moves_and_nothing_of_the_callers():
    (apply, tuned), tx = made(), optax.adam(1e-2)
    start = pj.train_state(tuned, tx)
    after(pj.make_train_step(apply, token_loss, tx), start, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves((start.trainable, start.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((tuned, start.frozen)))


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_add_up_to_the_whole(parts):
    (apply, tuned), tx = made(), optax.adamw(1e-2)
    run = lambda n: after(pj.make_train_step(apply, token_loss, tx, accumulate=n), pj.train_state(tuned, tx))
    (one, metrics), (several, same) = run(1), run(parts)
    close(several.trainable, one.trainable)
    close(same, metrics)


def test_parts_of_a_mean_loss():
    (apply, tuned), tx = made(), optax.sgd(1e-1)
    mean = lambda logits, batch: ((logits**2).mean(), {"largest": logits.max()})
    run = lambda n: after(pj.make_train_step(apply, mean, tx, accumulate=n), pj.train_state(tuned, tx), 1)
    (one, metrics), (two, same) = run(1), run(2)
    close(two.trainable, one.trainable)
    np.testing.assert_allclose(same["loss"], metrics["loss"], rtol=1e-6)


def test_dropout_draws_anew_in_every_step_and_part():
    apply, tuned = made(pj.lora(rank=2, alpha=6, dropout=0.5))
    tuned = jax.tree.map(lambda x: x, pj.insert(tuned, {k: np.ones_like(x) for k, x in pj.extract(tuned).items()}))
    tx = optax.sgd(0.0)
    keyed = lambda tuned, batch, key: apply(tuned, batch)
    run = lambda n: pj.make_train_step(keyed, token_loss, tx, accumulate=n)
    state = lambda: pj.train_state(tuned, tx, key=KEY)
    losses = []
    one, now = run(1), state()
    for _ in range(3):
        now, metrics = one(now, batch_of())
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    again = float(one(state(), batch_of())[1]["loss"])
    assert again == losses[0]
    twice = jax.tree.map(lambda x: np.repeat(x[:1], 8, 0), batch_of())
    first, second = [float(run(2)(state(), jax.tree.map(lambda x: x, twice))[1]["loss"]) for _ in range(2)]
    assert first == second
    halves = run(1)(state(), jax.tree.map(lambda x: x[:4], twice))[1]["loss"]
    assert first != float(halves)


def test_a_step_that_is_not_finite_changes_nothing_but_counts():
    (apply, tuned), tx = made(), optax.adamw(1e-2)
    step = pj.make_train_step(apply, token_loss, tx)
    state, _ = step(pj.train_state(tuned, tx), batch_of())
    kept = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    bad = {**batch_of(), "mask": np.full((8, 6), np.nan, np.float32)}
    state, metrics = step(state, bad)
    state, metrics = step(state, bad)
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.opt_state), kept)
    assert (int(state.step), int(state.skipped), int(state.failing)) == (3, 2, 2)
    state, metrics = step(state, batch_of())
    assert (int(state.skipped), int(state.failing)) == (2, 0) and np.isfinite(metrics["loss"])


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_in_which_nothing_counts_changes_nothing_and_is_no_failure(parts):
    (apply, tuned), tx = made(), optax.adamw(1e-2)
    step = pj.make_train_step(apply, token_loss, tx, accumulate=parts)
    state, _ = step(pj.train_state(tuned, tx), batch_of())
    kept = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    state, metrics = step(state, {**batch_of(), "mask": np.zeros((8, 6), np.float32)})
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.opt_state), kept)
    assert (int(state.step), int(state.skipped), int(state.failing)) == (2, 0, 0)
    assert {name: float(metrics[name]) for name in ("loss", "accuracy", "weight", "grad_norm")} == dict.fromkeys(
        ("loss", "accuracy", "weight", "grad_norm"), 0.0
    )


def test_clipping_takes_no_frozen_array_into_account():
    (apply, tuned), tx = made(), optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    before = pj.train_state(tuned, tx)
    old = jax.tree.map(np.asarray, before.trainable)
    state, _ = pj.make_train_step(apply, token_loss, tx)(before, batch_of())
    moved = jax.tree.map(lambda x, y: np.asarray(x) - y, state.trainable, old)
    np.testing.assert_allclose(optax.global_norm(moved), 1e-3, rtol=1e-2)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, key=None):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=key is None)(x, rng=key))


def test_a_models_own_state_and_its_keys():
    model, x = Normed(), np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    first = model.init(KEY, x)

    def fn(params, batch, model_state, key=None):
        return model.apply({"params": params, **model_state}, batch["x"], key, mutable=["batch_stats"])

    state = {"batch_stats": first["batch_stats"]}
    apply, tuned = pj.attach(pj.lora(rank=1), fn, first["params"], {"x": x}, state, key=KEY)
    tx, loss = optax.sgd(0.1), lambda y, batch: ((y**2).mean(), {})
    step = pj.make_train_step(apply, loss, tx, accumulate=2)
    now, _ = step(pj.train_state(tuned, tx, key=KEY, model_state=state), {"x": x})
    hidden = x @ first["params"]["Dense_0"]["kernel"]
    want = np.zeros(4)
    for part in (hidden[0::2], hidden[1::2]):
        want = 0.5 * want + 0.5 * part.mean(0)
    np.testing.assert_allclose(now.model_state["batch_stats"]["BatchNorm_0"]["mean"], want, rtol=1e-5, atol=1e-6)


def hooked():
    """LoRA whose A is pulled to 0, and whose scale, a frozen field, halves at every step."""
    base = pj.lora(rank=2, alpha=6)
    penalty = lambda tuned: sum(jnp.sum(x.a**2) for x in jax.tree.leaves(tuned, is_leaf=is_overlay) if is_overlay(x))

    def update(tuned, grads, step):
        halve = lambda x: x.replace(scale=x.scale / 2) if is_overlay(x) else x
        return jax.tree.map(halve, tuned, is_leaf=is_overlay)

    return dataclasses.replace(base, penalty=penalty, update=update)


is_overlay = lambda x: isinstance(x, pj.Overlay)


def test_a_methods_penalty_and_update():
    method: Method = hooked()
    (apply, tuned), tx = made(), optax.sgd(0.1)
    plain, without = after(pj.make_train_step(apply, token_loss, tx), pj.train_state(tuned, tx), 1)
    step = pj.make_train_step(apply, token_loss, tx, method=method)
    state = pj.train_state(tuned, tx)
    kernels = [x for x in jax.tree.leaves(state.frozen) if x.ndim == 2]
    state, metrics = step(state, batch_of())
    np.testing.assert_allclose(metrics["loss"] - without["loss"], method.penalty(tuned), rtol=1e-5)
    of = lambda tree: [x for x in jax.tree.leaves(tree, is_leaf=is_overlay) if is_overlay(x)]
    for x, y, z in zip(of(state.tuned), of(plain.tuned), of(tuned), strict=True):
        np.testing.assert_allclose(x.scale, z.scale / 2)
        np.testing.assert_allclose(x.a, y.a - 0.1 * 2 * z.a, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(x.b, y.b)
    now = [x for x in jax.tree.leaves(state.frozen) if x.ndim == 2]
    assert kernels and all(x is y for x, y in zip(now, kernels, strict=True))


def test_adalora_prunes_as_it_trains():
    """No one names the method: its penalty and update run, and the state that it keeps in frozen fields moves."""
    method = pj.adalora(rank=3, target_rank=1, total_steps=8, tinit=1, tfinal=2)
    (apply, tuned), tx = made(method), optax.adamw(1e-2)
    traces = []
    counted = lambda tuned, batch: traces.append(None) or apply(tuned, batch)
    step, state = pj.make_train_step(counted, token_loss, tx, method=method), pj.train_state(tuned, tx)
    kept = []
    for seed in range(8):
        state, metrics = step(state, batch_of(seed=seed))
        overlays = [x for x in jax.tree.leaves(state.tuned, is_leaf=is_overlay) if is_overlay(x)]
        kept.append(sum(int(x.kept.sum()) for x in overlays))
    assert kept[0] == 3 * len(overlays) and kept[-1] == len(overlays) and kept == sorted(kept, reverse=True)
    assert np.isfinite(metrics["loss"]) and len(traces) == 1
    for x in overlays:
        np.testing.assert_array_equal(np.asarray(x.e)[~np.asarray(x.kept)], 0)


def test_bfloat16_compute_over_float32_adapters():
    model = nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jnp.ones((4, 3), jnp.bfloat16)
    params = model.init(KEY, x)["params"]
    apply, tuned = pj.attach(
        pj.lora(rank=1), lambda p, b: model.apply({"params": p}, b["x"]), params, {"x": x}, key=KEY
    )
    tx = optax.adam(1e-3)
    loss = lambda y, batch: (jnp.square(y.astype(jnp.float32)).mean(), {})
    state, metrics = pj.make_train_step(apply, loss, tx, accumulate=2)(pj.train_state(tuned, tx), {"x": x})
    assert {str(x.dtype) for x in jax.tree.leaves(state.trainable)} == {"float32"}
    assert metrics["loss"].dtype == jnp.float32


def test_what_is_wrong_is_named():
    apply, tuned = made()
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="accumulate=0"):
        pj.make_train_step(apply, token_loss, tx, accumulate=0)
    with pytest.raises(ValueError, match=r"batch\['ids'\] holds 8 examples, expected a multiple of 3"):
        pj.make_train_step(apply, token_loss, tx, accumulate=3)(pj.train_state(tuned, tx), batch_of())
    with pytest.raises(ValueError, match="nothing in this tree trains"):
        pj.train_state(pj.strip(tuned), tx)
    with pytest.raises(ValueError, match="expected `mesh=`"):
        pj.train_state(tuned, tx, specs={})


@pytest.mark.parametrize(
    "loss,error,words",
    [
        (lambda y, b: y.sum(), TypeError, r"loss returned one \w*Tracer; expected \(value, aux\)"),
        (lambda y, b: (y.sum(), {}, 1), TypeError, r"loss returned a sequence of 3; expected \(value, aux\)"),
        (lambda y, b: (y.sum(), None), TypeError, "loss returned NoneType as aux; expected a dictionary"),
        (lambda y, b: (y.sum(), {"grad_norm": 1.0}), ValueError, "aux holds 'grad_norm', which a step's own metrics have"),
    ],
)
def test_a_loss_that_returns_something_else(loss, error, words):
    apply, tuned = made()
    step = pj.make_train_step(apply, loss, optax.sgd(0.1))
    with pytest.raises(error, match=words):
        step(pj.train_state(tuned, step.tx), batch_of())


@pytest.mark.parametrize(
    "returned,error,words",
    [
        (lambda y, s: y, TypeError, r"apply returned one \w*Tracer; expected \(outputs, model_state\)"),
        (lambda y, s: (y, {"n": s["n"]}), ValueError, r"with nothing at \['mean'\]; expected float32\[3\]"),
        (lambda y, s: (y, {**s, "more": s["n"]}), ValueError, r"with int32\[\] at \['more'\]; expected nothing"),
        (lambda y, s: (y, {**s, "mean": jnp.zeros(4)}), ValueError, r"with float32\[4\] at \['mean'\]; expected float32\[3\]"),
        (lambda y, s: (y, {**s, "none": ()}), ValueError, "a model state of the structure PyTreeDef.*'none'"),
    ],
)
def test_an_apply_that_returns_another_model_state(returned, error, words):
    apply, tuned = made()
    carrying = lambda tuned, batch, model_state: returned(apply(tuned, batch), model_state)
    step = pj.make_train_step(carrying, token_loss, optax.sgd(0.1))
    state = pj.train_state(tuned, step.tx, model_state={"n": jnp.int32(0), "mean": jnp.zeros(3)})
    with pytest.raises(error, match=words):
        step(state, batch_of())


def test_a_method_whose_update_never_runs_is_said(recwarn):
    method = pj.adalora(rank=2, target_rank=1, total_steps=8)
    (apply, tuned), tx = made(method), optax.sgd(0.1)
    for other in (None, pj.lora(rank=2)):
        with pytest.warns(UserWarning, match=r"Dense_0/kernel.* are moved by their method's update too.*expected `make_train_"):
            pj.make_train_step(apply, token_loss, tx, method=other)(pj.train_state(tuned, tx), batch_of())
    recwarn.clear()
    pj.make_train_step(apply, token_loss, tx, method=pj.chain(method))(pj.train_state(tuned, tx), batch_of())
    assert not [str(x.message) for x in recwarn.list]


def test_what_a_step_gives_apply_is_taken():
    apply, tuned = made()
    step = pj.make_train_step(apply, token_loss, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"apply takes \(params, batch\) and no `key=`.*the state has a key; expected `apply\("):
        step(pj.train_state(tuned, step.tx, key=KEY), batch_of())
    with pytest.raises(TypeError, match="no `model_state=`.*the state has a model state"):
        step(pj.train_state(tuned, step.tx, model_state=jnp.zeros(())), batch_of())
    takes_all = pj.make_train_step(lambda tuned, batch, **given: apply(tuned, batch), token_loss, step.tx)
    assert takes_all(pj.train_state(tuned, step.tx, key=KEY), batch_of())[0].step == 1


def test_dropout_without_a_key_is_said(recwarn):
    _, tuned = made(pj.lora(rank=2, dropout=0.1, targets=".*Dense.*kernel"))
    with pytest.warns(UserWarning, match="Dense_0/kernel.* have dropout, and the state no key"):
        pj.train_state(tuned, optax.sgd(0.1))
    recwarn.clear()
    pj.train_state(tuned, optax.sgd(0.1), key=KEY)
    pj.train_state(made()[1], optax.sgd(0.1))
    assert not [str(x.message) for x in recwarn.list]
