"""AdaLoRA: worked numbers of its update, its schedule and its scores; what is pruned, against peft's own steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peftjax as pj
import pytest
from golden_models import GOLDEN
from laws import moved
from peftjax.budget import Plan
from peftjax.method import from_dict
from peftjax.paths import flatten
from zoo import MODELS

KEY = jax.random.key(0)
draw = lambda seed, *shape: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
W = {"v": draw(1, 4, 3), "w": draw(2, 3, 5)}
X, Y = draw(3, 6, 4), draw(4, 6, 5)
OPTIONS = dict(rank=3, target_rank=1, alpha=6, total_steps=8, tinit=1, tfinal=2, beta1=0.6, beta2=0.7)


def fn(p, x):
    return jnp.tanh(x @ p["v"]) @ p["w"]


def loss_of(method, apply=pj.wrap(fn)):
    return lambda tuned, x=X: jnp.mean((apply(tuned, x) - Y) ** 2) + method.penalty(tuned)


def trained(method, tuned, steps, lr=0.1, loss=None):
    """The tree after each step of gradient descent, and the gradients of each."""
    run, found = jax.jit(pj.value_and_grad(loss or loss_of(method))), []
    update = jax.jit(method.update)
    for step in steps:
        grads = run(tuned)[1]
        trainable, frozen = pj.partition(tuned)
        tuned = pj.combine(jax.tree.map(lambda p, g: p - lr * g, trainable, grads), frozen)
        tuned = update(tuned, grads, step)
        found.append((tuned, grads))
    return found


def test_the_update_entry_by_entry():
    """dW_ij = s sum_r a_ir e_r b_rj, with s = alpha / (rank + 1e-5)."""
    tuned = moved(pj.adalora(rank=2, target_rank=1, alpha=6, total_steps=9).init(KEY, {"v": W["v"]}), 0)
    x, want = tuned["v"], W["v"].astype(np.float64)
    for i in range(4):
        for j in range(3):
            want[i, j] += sum(6 / (2 + 1e-5) * float(x.a[i, r]) * float(x.e[r]) * float(x.b[r, j]) for r in range(2))
    np.testing.assert_allclose(pj.merge(tuned)["v"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pj.wrap(lambda p, x: x @ p["v"])(tuned, X), X @ want, rtol=1e-5, atol=1e-5)


def test_it_starts_at_zero_with_small_factors():
    x = pj.adalora(rank=8, target_rank=8, total_steps=9).init(KEY, {"w": np.ones((300, 200), np.float32)})["w"]
    assert not np.any(x.e) and x.scale == np.float32(8 / (8 + 1e-5)) and np.all(x.kept)
    for factor in (x.a, x.b):
        assert abs(np.std(factor) - 0.02) < 1e-3 and abs(np.mean(factor)) < 2e-3
    assert x.a.shape == (300, 8) and x.b.shape == (8, 200)


def test_the_penalty_is_the_mean_distance_from_orthonormal_sets():
    method = pj.adalora(**OPTIONS, orth_weight=0.25)
    tuned = moved(method.init(KEY, W), 0)
    gaps = []
    for x in tuned.values():
        a, b = np.float64(x.a), np.float64(x.b)
        gaps += [np.sqrt(((a.T @ a - np.eye(3)) ** 2).sum()), np.sqrt(((b @ b.T - np.eye(3)) ** 2).sum())]
    np.testing.assert_allclose(method.penalty(tuned), 0.25 * np.mean(gaps), rtol=1e-6)


def test_an_orthonormal_set_has_no_penalty_and_a_finite_gradient():
    method = pj.adalora(rank=1, target_rank=1, total_steps=9)
    tuned = method.init(KEY, {"w": W["w"]})
    unit = {"w/a": np.float32([[0], [1], [0]]), "w/b": np.float32([[0, 0, 1, 0, 0]])}
    value, grads = pj.value_and_grad(method.penalty)(pj.insert(tuned, pj.extract(tuned) | unit))
    assert value == 0 and not any(np.any(g) or np.isnan(g).any() for g in jax.tree.leaves(grads))


def test_the_budget_falls_with_the_cube():
    """12 ranks of 3 matrices, 6 in the end: 6 + 6 (1 - k / 4)^3 at k steps after tinit, rounded down."""
    plan = Plan(target_rank=2, total_steps=8, tinit=1, tfinal=3, delta_t=1, beta1=0.5, beta2=0.5)
    scores = jnp.asarray(np.random.default_rng(0).permutation(12) + 1.0, jnp.float32)
    kept = [int((scores > plan.cutoff(scores, 3, step)).sum()) for step in range(9)]
    assert kept == [12, 12, 8, 6, 6, 6, 6, 6, 6]  # 6 (27, 8, 1) / 64 = 2.53, 0.75, 0.09
    assert [bool(plan.prunes(step)) for step in range(9)] == [False, False, True, True, True, True, False, False, False]


@pytest.mark.parametrize("delta_t,pruning", [(2, [2, 4, 6, 7]), (3, [3, 6, 7]), (100, [7])])
def test_ranks_are_chosen_every_delta_t_steps_and_at_the_last_one(delta_t, pruning):
    plan = Plan(target_rank=2, total_steps=10, tinit=1, tfinal=3, delta_t=delta_t, beta1=0.5, beta2=0.5)
    assert [step for step in range(12) if plan.prunes(step)] == pruning


def test_averages_scores_and_what_is_pruned_step_by_step():
    """Written out from the paper's equations, with NumPy, in double precision."""
    method = pj.adalora(**OPTIONS)
    tuned = moved(method.init(KEY, W), 0)
    mean = {name: {k: 0.0 for k in W} for name in "aeb"}
    doubt = {name: {k: 0.0 for k in W} for name in "aeb"}
    before = tuned
    for step, (tuned, grads) in enumerate(trained(method, tuned, range(10))):
        moved_e = {k: np.float64(before[k].e) - 0.1 * np.float64(grads[k].e) for k in W}
        for name in "aeb":
            for k in W:
                g = np.float64(getattr(grads[k], name))
                seen = np.abs((np.float64(getattr(before[k], name)) - 0.1 * g) * g)
                if step < 6:
                    mean[name][k] = 0.6 * mean[name][k] + 0.4 * seen
                    doubt[name][k] = 0.7 * doubt[name][k] + 0.3 * np.abs(seen - mean[name][k])
        matters = lambda name, k: mean[name][k] * doubt[name][k]
        scores = {k: matters("e", k) + matters("a", k).mean(0) + matters("b", k).mean(1) for k in W}
        if 1 < step <= 6:  # two matrices of rank 3, one rank each in the end
            budget = int((6 - 2) * (1 - (step - 1) / 5) ** 3 + 2)
            lowest = np.sort(np.concatenate(list(scores.values())))[6 - budget - 1]
            kept = {k: scores[k] > lowest for k in W}
        for k in W:
            np.testing.assert_allclose(tuned[k].sensitivity_b, mean["b"][k], rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(tuned[k].uncertainty_a, doubt["a"][k], rtol=1e-3, atol=1e-9)
            np.testing.assert_array_equal(tuned[k].kept, kept[k] if step > 1 else True)
            want = np.where(kept[k], moved_e[k], 0) if step > 1 else moved_e[k]
            np.testing.assert_allclose(tuned[k].e, want, rtol=1e-5, atol=1e-7)
        before = tuned
    assert sum(int(np.sum(x.kept)) for x in tuned.values()) == 2


def test_one_compilation_serves_every_step():
    method, traces = pj.adalora(**OPTIONS), []
    tuned = moved(method.init(KEY, W), 0)
    grads = pj.value_and_grad(loss_of(method))(tuned)[1]

    @jax.jit
    def update(tuned, grads, step):
        traces.append(step)
        return method.update(tuned, grads, step)

    for step in range(9):
        tuned = update(tuned, grads, step)
    assert len(traces) == 1 and sum(int(np.sum(x.kept)) for x in tuned.values()) == 2


def test_the_train_step_runs_both_hooks(usual_promotion):
    method, tx = pj.adalora(**OPTIONS), optax.sgd(0.1)
    tuned = moved(method.init(KEY, W), 0)
    apply = pj.wrap(lambda p, batch: fn(p, batch["x"]))
    step = pj.make_train_step(apply, lambda y, batch: (jnp.mean((y - batch["y"]) ** 2), {}), tx, method=method)
    state, want = pj.train_state(tuned, tx), trained(method, tuned, range(8))
    with usual_promotion():
        for tree, _ in want:
            state, _ = step(state, {"x": jnp.asarray(X), "y": jnp.asarray(Y)})
            for k in W:
                np.testing.assert_array_equal(state.tuned[k].kept, tree[k].kept)
                np.testing.assert_allclose(state.tuned[k].e, tree[k].e, rtol=1e-5, atol=1e-7)


def test_a_whole_tree_of_gradients_serves_as_well():
    method = pj.adalora(**OPTIONS)
    tuned = moved(method.init(KEY, W), 0)
    part = pj.value_and_grad(loss_of(method))(tuned)[1]
    whole = pj.combine(part, pj.partition(tuned)[1])
    for x, y in zip(*(jax.tree.leaves(method.update(tuned, g, 3)) for g in (part, whole)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_stacked_layers_are_matrices_of_their_own():
    """A scan's three layers rank and prune as three leaves do."""
    stacked = {"w": draw(5, 3, 4, 4)}
    apart = {f"w{k}": stacked["w"][k] for k in range(3)}
    scanned = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    looped = lambda p, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ p["w0"]) @ p["w1"]) @ p["w2"])
    method = pj.adalora(rank=2, target_rank=1, total_steps=6, targets=".*")
    one = moved(method.init(KEY, stacked, pj.roles(scanned, stacked, X)), 0)
    many = method.init(KEY, apart, pj.roles(looped, apart, X))
    flat = pj.extract(one)
    many = pj.insert(many, {f"w{k}/{f}": flat[f"w/{f}"][k] for k in range(3) for f in "aeb"})

    def after(tree, run):
        apply = pj.wrap(run)
        loss = lambda tuned: jnp.mean((apply(tuned, X) - 0.5) ** 2) + method.penalty(tuned)
        return [tuned for tuned, _ in trained(method, tree, range(6), loss=loss)]

    for left, right in zip(after(one, scanned), after(many, looped), strict=True):
        for name in ("e", "a", "b", "kept", "uncertainty_e"):
            want = np.stack([getattr(right[f"w{k}"], name) for k in range(3)])
            np.testing.assert_allclose(getattr(left["w"], name), want, rtol=1e-5, atol=1e-7)
    assert int(left["w"].kept.sum()) <= 4 and left["w"].kept.shape == (3, 2)


def test_convolutions_and_experts_are_ranked_too():
    for model in ("linen_conv", "linen_vmap_dense"):
        example = MODELS[model].make()
        method = pj.adalora(rank=2, target_rank=1, total_steps=5, targets=MODELS[model].targets)
        roles = pj.roles(example.fn, example.params, *example.args)
        tuned = moved(method.init(KEY, example.params, roles), 0)
        grads = jax.tree.map(
            lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), pj.partition(tuned)[0]
        )
        for step in range(5):
            tuned = method.update(tuned, grads, step)
        kept = [
            leaf.kept for leaf in jax.tree.leaves(tuned, is_leaf=lambda x: hasattr(x, "kept")) if hasattr(leaf, "kept")
        ]
        total = sum(x.size for x in kept)
        assert total / 2 <= sum(int(x.sum()) for x in kept) < total


def test_a_chain_passes_the_hooks_on_and_each_prunes_its_own():
    first, second = pj.adalora(**OPTIONS, targets="v"), pj.adalora(**OPTIONS, targets="w")
    both = pj.chain(first, second, pj.lora(rank=1, targets=("w",)))
    tuned = moved(both.init(KEY, W), 0)
    np.testing.assert_allclose(both.penalty(tuned), first.penalty(tuned) + second.penalty(tuned), rtol=1e-6)
    grads = pj.value_and_grad(loss_of(both))(tuned)[1]
    chained, alone = both.update(tuned, grads, 3), first.update(tuned, grads, 3)
    assert not np.any(alone["w"].base.sensitivity_a)
    for x, y in zip(jax.tree.leaves(chained), jax.tree.leaves(second.update(alone, grads, 3)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.any(chained["v"].sensitivity_a) and np.any(chained["w"].base.sensitivity_a)
    assert pj.chain(pj.lora(rank=1)).update is None and from_dict(first.to_dict()).update is not None


def test_the_state_is_kept_on_the_way_through_files_and_flat_forms(tmp_path):
    method = pj.adalora(**OPTIONS)
    tuned = trained(method, moved(method.init(KEY, W), 0), range(4))[-1][0]
    pj.save(tmp_path / "a", tuned, method)
    for again in (pj.load(tmp_path / "a", W), pj.insert(tuned, pj.extract(tuned))):
        assert jax.tree.structure(again) == jax.tree.structure(tuned)
        jax.tree.map(np.testing.assert_array_equal, again, tuned)
    loaded = pj.load(tmp_path / "a", W)
    on = [trained(method, tree, range(4, 9))[-1][0] for tree in (tuned, loaded)]
    jax.tree.map(np.testing.assert_array_equal, *on)


def test_pruned_ranks_stay_at_zero_under_an_optimizer_with_momentum(usual_promotion):
    method, tx = pj.adalora(**OPTIONS), optax.adam(0.05)
    tuned = moved(method.init(KEY, W), 0)
    with usual_promotion():
        state = tx.init(pj.partition(tuned)[0])
        for step in range(8):
            grads = pj.value_and_grad(loss_of(method))(tuned)[1]
            trainable, frozen = pj.partition(tuned)
            updates, state = tx.update(grads, state, trainable)
            tuned = method.update(pj.combine(optax.apply_updates(trainable, updates), frozen), grads, step)
    for x in tuned.values():
        assert np.all((x.e == 0) == ~np.asarray(x.kept))


def test_locked_overlays_are_left_alone():
    method = pj.adalora(**OPTIONS)
    tuned = pj.lock(moved(method.init(KEY, W), 0))
    assert method.update(tuned, pj.partition(tuned)[0], 3) is tuned


def test_the_target_itself_prunes_nothing():
    method = pj.adalora(**OPTIONS | {"target_rank": 3})
    tuned = trained(method, moved(method.init(KEY, W), 0), range(9))[-1][0]
    assert all(np.all(x.kept) and np.all(x.e != 0) for x in tuned.values())


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"target_rank": 4}, "target_rank is 4, expected 1 to the rank at the start, 3"),
        ({"target_rank": 0}, "target_rank is 0"),
        ({"tinit": 6}, "no step is left to prune at.*tinit=6, tfinal=2, delta_t=1, total_steps=8"),
        ({"tinit": -1}, "no step is left"),
        ({"delta_t": 0}, "delta_t=0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"beta1": 1.0}, "found 1.0 and 0.7"),
        ({"beta2": 0}, "found 0.6 and 0"),
        ({"orth_weight": -1}, "orth_weight from 0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
    ],
)
def test_options_that_cannot_be_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        pj.adalora(**OPTIONS | changes)


def test_wrong_use_raises():
    method = pj.adalora(**OPTIONS)
    tuned = method.init(KEY, W)
    with pytest.raises(ValueError, match="rank 9 at v .*expected 1 to 3"):
        pj.adalora(rank=9, target_rank=1, total_steps=5).init(KEY, W)
    with pytest.raises(ValueError, match="v already holds AdaLoRA"):
        pj.adalora(rank=1, target_rank=1, total_steps=5, targets="v").init(KEY, tuned)
    with pytest.raises(ValueError, match="none of the method's overlays"):
        method.update(W, W, 0)
    with pytest.raises(ValueError, match="none of the method's overlays"):
        method.penalty(pj.adalora(**OPTIONS | {"tinit": 0}).init(KEY, W))
    with pytest.raises(ValueError, match="no gradients for v, w"):
        method.update(tuned, pj.partition(tuned)[1], 0)
    with pytest.raises(TypeError, match="total_steps"):
        pj.adalora(rank=3)


@pytest.mark.third_party
def test_the_steps_of_peft():
    """From peft's own start, on its own base and ids: the same ranks kept at every step, and the same entries."""
    pytest.importorskip("transformers")
    import golden_models as golden

    fn, params, roles, ids, masks = golden.model("llama")
    given = np.load(GOLDEN / "adalora_steps.npz")
    page = json.loads((GOLDEN / "llama" / "adalora_pruned" / "adapter_config.json").read_text())
    method = pj.adalora(
        rank=page["init_r"],
        target_rank=page["target_r"],
        alpha=page["lora_alpha"],
        total_steps=page["total_step"],
        tinit=page["tinit"],
        tfinal=page["tfinal"],
        delta_t=page["deltaT"],
        beta1=page["beta1"],
        beta2=page["beta2"],
        targets=("q_proj", "v_proj"),
    )
    flat = {}
    for name in (name for name in given if name.startswith("start/")):
        *path, field = name.removeprefix("start/base_model.model.").split(".")
        field = field.removeprefix("lora_").lower()
        flat[f"{'/'.join(path)}/kernel/{field}"] = given[name].ravel() if field == "e" else given[name].T
    tuned, apply = pj.insert(method.init(KEY, params, roles), flat), pj.wrap(fn)

    def loss(tuned):
        logits = apply(tuned, ids, masks["full"])[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean() + method.penalty(tuned)

    steps = sorted({int(name.split("/")[1]) for name in given if name.startswith("e/")})
    for step, (tuned, _) in enumerate(trained(method, tuned, steps, lr=0.3, loss=loss)):
        leaves = {path.replace("/", "."): x for path, x in flatten(tuned)}
        for name in (name for name in given if name.startswith(f"kept/{step}/")):
            module = name.rpartition("/")[2]
            x = leaves[f"{module}.kernel"]
            np.testing.assert_array_equal(x.kept, given[name], err_msg=name)
            np.testing.assert_allclose(x.e, given[f"e/{step}/{module}"], rtol=1e-4, atol=1e-6, err_msg=name)
    assert int(sum(given[name].sum() for name in given if name.startswith(f"kept/{steps[-1]}/"))) == 8
