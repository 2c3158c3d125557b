"""Checkpoints of runs: what comes back is what was saved, on any mesh, and nothing else is taken for it."""

import ast
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import peftjax as pj
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from peftjax.fingerprint import sums
from peftjax.runs import Runs
from peftjax.sharding_rules import by_rules, make_mesh

pytestmark = pytest.mark.third_party  # optax's own promotions
KEY = jax.random.key(0)
PARAMS = {"up": np.ones((8, 16), np.float32) / 8, "down": np.linspace(0, 1, 64, dtype=np.float32).reshape(16, 4)}


def fn(params, batch, key=None):
    return jnp.tanh(batch["x"] @ params["up"]) @ params["down"]


def batch_of(seed):
    return {"x": np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)}


def loss(y, batch):
    return ((y - 1) ** 2).mean(), {}


METHOD = pj.lora(rank=2, alpha=6, dropout=0.3, targets=".*")
TX = optax.adamw(1e-2)


@functools.cache
def made(method=METHOD):
    return pj.attach(method, fn, PARAMS, batch_of(0), key=KEY)


def start(mesh=None, method=METHOD, tx=TX):
    apply, tuned = made(method)
    specs = mesh and by_rules([("up", P(None, "model")), ("down", P("model", None))], PARAMS, mesh)
    return pj.train_state(tuned, tx, key=jax.random.key(1), mesh=mesh, specs=specs)


def stepper(mesh=None, method=METHOD):
    return pj.make_train_step(made(method)[0], loss, TX, mesh)


def run(step, state, seeds):
    for seed in seeds:
        state, _ = step(state, batch_of(seed))
    return state


def same(got, want):
    raw = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(raw(x), raw(y))


def test_a_run_goes_on_bit_by_bit(tmp_path):
    whole = run(stepper(), start(), range(6))
    with Runs(tmp_path / "a", METHOD) as runs:
        assert runs.restore(start()) is None
        runs.save(run(stepper(), start(), range(3)), data={"next": 3})
    with Runs(tmp_path / "a", METHOD) as runs:
        state, data = runs.restore(start())
        assert data == {"next": 3} and int(state.step) == 3
        same(run(stepper(), state, range(data["next"], 6)), whole)


def test_the_next_step_may_donate_what_is_being_saved(tmp_path):
    with Runs(tmp_path / "a", METHOD, latest=9) as runs:
        state, step, kept = start(), stepper(), []
        for seed in range(4):
            state = run(step, state, [seed])
            kept.append(jax.tree.map(np.asarray, state.trainable))
            runs.save(state)
        runs.wait()
        for k, want in zip(runs.numbers, kept, strict=True):
            same(runs.restore(start(), k)[0].trainable, want)


def test_restores_onto_another_mesh(tmp_path):
    one = run(stepper(), start(), range(2))
    with Runs(tmp_path / "a", METHOD) as runs:
        mesh = make_mesh("data:2,model:4")
        runs.save(run(stepper(mesh), start(mesh), range(2)))
        runs.wait()
        other = make_mesh("data:4,model:2")
        state, _ = runs.restore(start(other))
        assert state.trainable["up"].b.sharding.mesh == other and state.trainable["up"].b.sharding.spec == P(
            None, "model"
        )
        for x, y in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(one.trainable), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
        state, _ = runs.restore(start())
        run(stepper(), state, [2])


class Normed(nnx.Module):
    """A model that carries statistics of its batches, and a key for dropout with its count."""

    def __init__(self, rngs):
        self.up, self.norm = nnx.Linear(8, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.drop, self.down = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(self.norm(jnp.tanh(self.up(x)))))


@functools.cache
def normed():
    """The model wrapped, its tuned tree, and its own state."""
    graphdef, params, carried = nnx.split(Normed(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, batch, model_state):
        model = nnx.merge(graphdef, params, model_state)
        return model(batch["x"]), nnx.state(model, nnx.Not(nnx.Param))

    method = pj.lora(rank=2, targets=".*kernel.*")
    return method, *pj.attach(method, fn, params, batch_of(0), carried, key=KEY), carried


@pytest.mark.parametrize("axes", [pytest.param(None, marks=pytest.mark.ci), "data:4,model:2"])
def test_a_models_own_state_goes_on_bit_by_bit(tmp_path, axes):
    method, apply, tuned, carried = normed()
    mesh = axes and make_mesh(axes)
    rules = [("up/kernel.*", P(None, "model")), ("down/kernel.*", P("model", None))]
    specs = mesh and by_rules(rules, pj.strip(tuned), mesh)
    begun = lambda: pj.train_state(tuned, TX, model_state=carried, mesh=mesh, specs=specs)
    step = pj.make_train_step(apply, loss, TX, mesh)
    whole = run(step, begun(), range(4))
    with Runs(tmp_path / "a", method) as runs:
        half = run(step, begun(), range(2))
        runs.save(half)
        runs.wait()
        state, _ = runs.restore(begun())
    same(state.model_state, half.model_state)
    assert int(state.model_state["drop"]["rngs"]["count"].get_value()) == 2
    assert np.abs(state.model_state["norm"]["mean"].get_value()).max() > 0
    same(run(step, state, range(2, 4)), whole)


def test_keeps_the_latest_and_the_best(tmp_path):
    with Runs(tmp_path / "a", METHOD, latest=2, best=1) as runs:
        state, step = start(), stepper()
        for seed, value in enumerate([0.5, 0.1, 0.4, 0.3, 0.6]):
            state = run(step, state, [seed])
            runs.save(state, metrics={"loss": value})
            runs.wait()
        assert runs.numbers == [2, 4, 5] and runs.best == 2


def test_the_base_is_never_written(tmp_path):
    with Runs(tmp_path / "a", METHOD) as runs:
        runs.save(start())
    names = {"/".join(ast.literal_eval(key)) for key in json.loads((tmp_path / "a/0/arrays/_METADATA").read_text())["tree_metadata"]}
    assert {"trainable/up/a", "frozen/up/scale", "opt_state/0/mu/up/a", "step"} <= names
    assert not [name for name in names if name.endswith("base")]


def test_frozen_fields_that_a_methods_update_moves_come_back(tmp_path):
    state = start()
    halved = jax.tree.map(lambda x: x, state.frozen)
    halved["up"] = halved["up"].replace(scale=halved["up"].scale / 2)
    with Runs(tmp_path / "a", METHOD) as runs:
        runs.save(type(state)(**{**vars(state), "frozen": halved}))
        runs.wait()
        again, _ = runs.restore(start())
    np.testing.assert_array_equal(again.frozen["up"].scale, halved["up"].scale)
    assert again.frozen["up"].base is start().frozen["up"].base


def test_another_run_is_refused_and_named(tmp_path):
    with Runs(tmp_path / "a", METHOD) as runs:
        runs.save(start())
    refused = [
        (Runs(tmp_path / "a", pj.lora(rank=3, alpha=6, dropout=0.3, targets=".*")), start(), "another method"),
        (
            Runs(tmp_path / "a", METHOD),
            start(tx=optax.sgd(0.1)),
            r"opt_state/0/mu/down/a: found float32\[16,2\], expected none",
        ),
        (
            Runs(tmp_path / "a", METHOD),
            start(method=pj.lora(rank=1, targets=".*")),
            r"found float32\[16,2\], expected float32\[16,1\]",
        ),
    ]
    for runs, state, words in refused:
        with runs, pytest.raises(ValueError, match=words):
            runs.restore(state)
    other = {**PARAMS, "up": PARAMS["up"] + np.float32(1e-6)}
    _, tuned = pj.attach(METHOD, fn, other, batch_of(0), key=KEY)
    with Runs(tmp_path / "a", METHOD) as runs:
        with pytest.raises(ValueError, match="up: other values"):
            runs.restore(pj.train_state(tuned, TX, key=KEY))
        with pytest.raises(ValueError, match="no checkpoint 7; expected one of"):
            runs.restore(start(), 7)


OTHERS = {
    "rank": (lambda folder: Runs(folder, RANK_3), lambda: start(method=RANK_3), "another method"),
    "optimizer": (lambda folder: Runs(folder, METHOD), lambda: start(tx=optax.sgd(0.1)), "another optimizer or tree"),
    "settings": (lambda folder: Runs(folder, METHOD, settings={"seed": 1}), start, "seed: found none, expected 1"),
}
RANK_3 = pj.lora(rank=3, alpha=6, dropout=0.3, targets=".*")


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_saves_nothing_where_one_has_saved(tmp_path, other):
    """It would delete what is there: only the latest and the best are kept."""
    opened, state, words = OTHERS[other]
    with Runs(tmp_path / "a", METHOD) as runs:
        runs.save(run(stepper(), start(), range(2)))
    with opened(tmp_path / "a") as runs:
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"(?s)checkpoint 2 has .*{words}.*a folder of its own"):
                runs.save(state())
        assert runs.numbers == [2]
    with Runs(tmp_path / "a", METHOD) as runs:
        assert int(runs.restore(start())[0].step) == 2


def test_what_is_there_is_compared_once(tmp_path, monkeypatch):
    """With the first that is saved or restored; a folder that was empty is this run's anyway."""
    calls, compare = [], Runs._compare
    monkeypatch.setattr(Runs, "_compare", staticmethod(lambda *args: calls.append(args) or compare(*args)))
    saves = lambda runs: [runs.save(start()) for _ in range(3)]
    for first, expected in ((saves, 0), (saves, 1), (lambda runs: runs.restore(start()), 1)):
        calls.clear()
        with Runs(tmp_path / "a", METHOD) as runs:
            first(runs)
            saves(runs)
        assert len(calls) == expected


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        Runs(tmp_path, METHOD)


def test_metrics_that_tell_nothing(tmp_path):
    with Runs(tmp_path / "a", METHOD) as runs:
        for metrics in ({"accuracy": 1.0}, {"loss": float("nan")}):
            with pytest.raises(ValueError, match="expected a finite 'loss'"):
                runs.save(start(), metrics=metrics)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_sums_are_those_of_any_mesh_and_see_a_swap(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 9, (8, 4)), dtype)
    mesh = make_mesh("data:2,model:4")
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data", "model")))
    assert sums({"x": split}) == sums({"x": x})
    swapped = x.at[jnp.array([0, 1])].set(x[jnp.array([1, 0])])
    assert sums({"x": swapped}) != sums({"x": x})


def _flips(folder):
    for path in (folder / "0/arrays").rglob("d/*"):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)


def _cuts(folder):
    path = next((folder / "0/page").glob("metadata"))
    path.write_bytes(path.read_bytes()[:40])


def _loses(folder):
    for path in list((folder / "0/arrays").rglob("*")):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize("damage", [_flips, _cuts, _loses])
def test_what_is_damaged_is_named_and_not_loaded(tmp_path, damage):
    with Runs(tmp_path / "a", METHOD) as runs:
        runs.save(start())
    damage(tmp_path / "a")
    with Runs(tmp_path / "a", METHOD) as runs:
        with pytest.raises(ValueError, match=r"a, checkpoint 0 .*damaged") as found:
            runs.restore(start())
    assert len(str(found.value)) < 600


def test_the_checkpoints_of_another_library_are_named(tmp_path):
    with ocp.CheckpointManager(tmp_path / "a") as theirs:
        theirs.save(0, args=ocp.args.StandardSave({"x": np.ones(3)}))
    (tmp_path / "b/3").mkdir(parents=True)
    for folder, at in (("a", 0), ("b", 3)):
        with Runs(tmp_path / folder, METHOD) as runs:
            with pytest.raises(ValueError, match=rf"{folder}, checkpoint {at} cannot be read.*`Runs` did not write it"):
                runs.restore(start())
            with pytest.raises(ValueError, match="`Runs` did not write it(?s:.*)a folder of its own"):
                runs.save(start())


def test_folders_and_numbers_that_are_none(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="a is a file; expected a folder"):
        Runs(tmp_path / "a", METHOD)
    for option in ({"latest": 0}, {"latest": 1.5}, {"best": -1}, {"timeout": 0}):
        with pytest.raises(ValueError, match=r"^(latest|best|timeout)=.*: expected a whole number, [01] at least"):
            Runs(tmp_path / "b", METHOD, **option)
    assert not (tmp_path / "b").exists()


def test_other_roles_are_named_leaf_by_leaf(tmp_path):
    roles = pj.roles(fn, PARAMS, batch_of(0))
    with Runs(tmp_path / "a", METHOD, roles) as runs:
        runs.save(start())
    other = pj.Roles({**roles, "up": dataclasses.replace(roles["up"], axes="oi")})
    with Runs(tmp_path / "a", METHOD, other) as runs:
        with pytest.raises(ValueError, match=r"has other roles:\n  up: found .*'io'.*expected .*'oi'[^\n]*$"):
            runs.restore(start())


def test_a_base_of_complex_numbers_and_of_pythons(tmp_path):
    wave, params = np.array([1 + 2j, 3 - 1j], np.complex64), {"b": jnp.ones(2), "gain": 2.0}
    assert sums({"x": wave}) != sums({"x": wave.conj()})
    method = pj.unfreeze("b")
    begun = lambda wave: pj.train_state(method.init(KEY, {**params, "wave": wave}), TX)
    with Runs(tmp_path / "a", method) as runs:
        runs.save(begun(wave))
        runs.wait()
        same(runs.restore(begun(wave))[0].trainable, begun(wave).trainable)
        with pytest.raises(ValueError, match="wave: other values"):
            runs.restore(begun(wave.conj()))


def test_a_key_comes_back_as_the_kind_it_was(tmp_path):
    with Runs(tmp_path / "a", METHOD) as runs:
        for key in (jax.random.PRNGKey(3), jax.random.key(3)):
            begun = pj.train_state(made()[1], TX, key=key)
            runs.save(begun)
            runs.wait()
            again = runs.restore(begun)[0].key
            assert again.dtype == key.dtype and jax.random.bits(again) == jax.random.bits(key)
