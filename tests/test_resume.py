"""Runs that are stopped, by whatever, and go on: to the bit what they would have been."""

import conftest  # noqa: F401  (for the processes started here: the same platform, and what is compiled is shared)

import io
import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import peftjax as pj
from experiments import display, logs, train
from experiments.interruption import Interrupted
from peftjax.runs import Runs

pytestmark = pytest.mark.third_party  # optax's own promotions
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_resume"])
METHOD = pj.lora(rank=2, dropout=0.2, targets=("up", "down"))
STEPS, EPOCHS = 12, 3


def go(folder, seen, pause=0.0, limit=None, judging=None, epochs=EPOCHS):
    """Trains a small network, from the checkpoint in `folder` if there is one; what it ends with goes into a file there.

    `seen` is a file that gets a byte per step; `limit` is the largest file that may be written, in bytes; after the
    step `judging`, validation takes 20 s.
    """
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = {"up": normal(64, 512) / 8, "down": normal(512, 2) / 20}
    fn = lambda params, batch, key=None: jnp.tanh(batch["ids"] @ params["up"]) @ params["down"]
    rows = [
        {"ids": normal(4, 64), "label": rng.integers(0, 2, 4), "weight": np.ones(4, np.float32)} for _ in range(STEPS)
    ]
    apply, tuned = pj.attach(METHOD, fn, params, rows[0], key=jax.random.key(0))
    tx = optax.adamw(1e-2)
    step = pj.make_train_step(apply, train.cross_entropy, tx)

    def slow(state, batch):
        time.sleep(pause)
        with open(seen, "ab") as file:
            file.write(b".")
        return step(state, batch)

    def validate(state, check):
        kernel = np.asarray(pj.merge(state.tuned)["down"])
        for _ in range(100 if int(state.step) == judging else 1):
            time.sleep(0.2 if judging else 0.0)
            check()
        return train.Score(0.5, float(np.abs(kernel).sum()))

    epoch = lambda number: grain.MapDataset.source(rows).seed(number).shuffle()
    state = pj.train_state(tuned, tx, key=jax.random.key(1))
    with Runs(Path(folder) / "runs", METHOD, metric="epoch", lowest=False) as runs:
        trained = train.train(slow, state, epoch, validate, train.Limits(epochs, epochs), logs.Together([]), runs, every=2)
    progress = {k: v for k, v in trained.progress.to_dict().items() if k != "seconds"}
    np.savez(
        Path(folder) / "end.npz",
        progress=json.dumps(progress),
        **{k.replace("/", "."): v for k, v in pj.extract(trained.tuned).items()},
    )


def child(folder, seen, options):
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    try:
        go(folder, seen, **options)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (folder / "error").write_text(str(error))
        raise


def started(folder, steps=0, **options):
    """A process that runs `go`, once it has begun so many steps."""
    seen = folder / "seen"
    seen.write_bytes(b"")
    process = PROCESSES.Process(target=child, args=(folder, seen, options))
    process.start()
    while process.is_alive() and seen.stat().st_size < steps:
        time.sleep(0.002)
    return process


def stopped(process, how):
    os.kill(process.pid, how)
    process.join(10)
    assert process.exitcode not in (0, None)


def goes_on_to(whole, folder, **options):
    """A process goes on from what is in the folder, and ends as the run does that nothing stopped."""
    process = started(folder, **options)
    process.join()
    assert process.exitcode == 0
    same(ended(folder), whole)


def ended(folder):
    with np.load(folder / "end.npz") as found:
        return {name: found[name] for name in found.files}


def same(got, want):
    assert set(got) == set(want)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """How a run ends that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    process = started(folder, pause=0.02)
    process.join()
    assert process.exitcode == 0 and (folder / "seen").stat().st_size == STEPS * EPOCHS
    return ended(folder)


def saving(folder):
    """Whether a checkpoint is being written."""
    return any("orbax-checkpoint-tmp" in path.name for path in (folder / "runs").glob("*"))


def whole_ones(folder):
    """The numbers of the checkpoints that are there and whole."""
    return {int(path.name) for path in (folder / "runs").glob("*") if path.name.isdigit()}


def killed_and_restarted(folder, whole, kills, epochs):
    """Kills a run `kills` times, each life after its first checkpoint, and lets the last life end.

    Every other kill comes at a random moment, every other one while a checkpoint is being written.
    """
    draw, cut, before = random.Random(0), 0, set()
    for k in range(kills):
        process, end = started(folder, steps=2, pause=0.02, epochs=epochs), time.monotonic() + 30
        while not whole_ones(folder) - before and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)  # some steps, each of which takes 20 ms and more; every other one saves
        while k % 2 and not saving(folder) and time.monotonic() < end:
            time.sleep(0.001)
        stopped(process, signal.SIGKILL)
        cut += saving(folder)
        assert max(whole_ones(folder)) > max(before, default=0)  # this life began where the one before had come to
        before |= whole_ones(folder)
    assert cut >= kills // 2, cut
    goes_on_to(whole, folder, epochs=epochs)
    left = [x.name for x in (folder / "runs").iterdir()]
    assert all(name.isdigit() for name in left), left
    goes_on_to(whole, folder, epochs=epochs)
    assert not (folder / "seen").stat().st_size  # it had ended: nothing is done again


def test_killed_at_any_moment_it_goes_on_bit_by_bit(whole, tmp_path):
    killed_and_restarted(tmp_path, whole, 2, EPOCHS)


@pytest.mark.full
def test_killed_at_twenty_moments(tmp_path):
    (tmp_path / "whole").mkdir()
    process = started(tmp_path / "whole", epochs=25)
    process.join()
    (tmp_path / "killed").mkdir()
    killed_and_restarted(tmp_path / "killed", ended(tmp_path / "whole"), 20, 25)


@pytest.mark.ci
def test_sigterm_saves_and_ends_the_run(whole, tmp_path):
    stopped(started(tmp_path, steps=5, pause=0.05), signal.SIGTERM)
    done = (tmp_path / "seen").stat().st_size
    with Runs(tmp_path / "runs", METHOD) as runs:
        assert runs.numbers[-1] == done
    goes_on_to(whole, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("epoch", [EPOCHS, 1])
def test_sigterm_during_validation_saves_and_ends_the_run(epoch, whole, tmp_path):
    """After the batch in hand, of 0.2 s, not after all of them; and the epoch is judged when the run goes on."""
    process = started(tmp_path, steps=epoch * STEPS, judging=epoch * STEPS)
    time.sleep(0.5)
    begin = time.monotonic()
    stopped(process, signal.SIGTERM)
    assert time.monotonic() - begin < 5 and not (tmp_path / "end.npz").exists()
    with Runs(tmp_path / "runs", METHOD) as runs:
        assert runs.numbers[-1] == epoch * STEPS
    goes_on_to(whole, tmp_path)


@pytest.mark.full  # of two processes it runs before a change lands, in test_processes.py
def test_a_full_disk_leaves_the_checkpoint_before(whole, tmp_path):
    stopped(started(tmp_path, steps=8, pause=0.02), signal.SIGKILL)
    with Runs(tmp_path / "runs", METHOD) as runs:
        before = runs.numbers
    assert before
    process = started(tmp_path, limit=2000)  # what is saved is larger
    process.join()
    assert process.exitcode != 0
    said = (tmp_path / "error").read_text()
    assert f"a checkpoint could not be written, and the last one that is whole is {before[-1]}: " in said
    assert len(said) < 600 and len(said.splitlines()) == 1
    with Runs(tmp_path / "runs", METHOD) as runs:
        assert runs.numbers == before
    goes_on_to(whole, tmp_path)


def test_sigterm_without_checkpoints_is_left_alone():
    from experiments.interruption import Interruption

    before = signal.getsignal(signal.SIGTERM)
    with Interruption(None) as interruption:
        assert signal.getsignal(signal.SIGTERM) is before
        interruption.check(1, lambda: None)
    assert issubclass(Interrupted, Exception)


# Losses that are not finite


def failing(folder, bad, epochs=2, shown=logs.Together([]), read=lambda row: row, before=lambda: None):
    """Trains on ten batches an epoch, those in `bad` of NaN; what it gives, and the states after each step.

    `read` is called with what each batch is made of, and `before` before each step.
    """
    rows = [{"ids": np.full((2, 3), np.nan if k in bad else 1 + k, np.float32)} for k in range(10)]
    rows = [{**row, "label": np.zeros(2, np.int32), "weight": np.ones(2, np.float32)} for row in rows]
    tuned, tx, states = pj.unfreeze("w").init(jax.random.key(0), {"w": np.ones((3, 2), np.float32)}), optax.sgd(1e-2), []
    step = pj.make_train_step(pj.wrap(lambda params, batch: batch["ids"] @ params["w"]), train.cross_entropy, tx)

    def kept(state, batch):
        before()
        state, metrics = step(state, batch)
        states.append((np.asarray(state.tuned["w"].value), float(metrics["loss"])))
        return state, metrics

    with Runs(folder / "runs", pj.unfreeze("w"), metric="epoch", lowest=False) as runs:
        state, epoch = pj.train_state(tuned, tx), lambda number: grain.MapDataset.source(rows).map(read)
        judge = lambda state, check: train.Score(0.5, 1.0)
        try:
            return train.train(kept, state, epoch, judge, train.Limits(epochs, 9), shown, runs), states
        except FloatingPointError as error:
            return (error, runs.restore(pj.train_state(tuned, tx))), states


def test_batches_are_made_while_a_step_runs(tmp_path):
    """Before the first step is taken, the second batch comes without being asked for."""
    made, second = [], threading.Event()

    def read(row):
        made.append(row)
        if len(made) > 1:
            second.set()
        return row

    waited = []
    failing(tmp_path, (), epochs=1, read=read, before=lambda: waited.append(second.wait(60)))
    assert waited == [True] * 10 and len(made) >= 10


def test_the_run_stops_with_the_last_good_state_saved(tmp_path):
    (error, (state, data)), states = failing(tmp_path, range(3, 10))
    assert "5 steps in a row, up to step 8" in str(error) and len(states) == 8
    assert str(error).endswith(f"The state before them is in {tmp_path / 'runs'}")
    np.testing.assert_array_equal(state.tuned["w"].value, states[2][0])
    assert not np.array_equal(states[2][0], states[1][0])
    assert (int(state.step), int(state.skipped), data["skipped"]) == (8, 5, [5])
    assert data["losses"] == [pytest.approx(np.mean([loss for _, loss in states[:3]]))]


def test_a_step_that_is_left_out_is_counted_and_not_in_the_mean(tmp_path):
    printed = io.StringIO()
    with display.Bar(Console(file=printed, width=120)) as bar:
        trained, states = failing(tmp_path, (0, 4), shown=bar)
    losses = np.array([loss for _, loss in states]).reshape(2, 10)
    assert trained.progress.skipped == [2, 2]
    np.testing.assert_allclose(trained.progress.losses, np.nanmean(losses, 1), rtol=1e-6)
    assert "epoch 2: 2 steps left out, whose loss or gradient was not finite" in printed.getvalue()
    assert "nan" not in printed.getvalue().split("epoch 2: validation")[1]
