"""Real processes over gloo: the losses of one device, one file of checkpoints, and a roll call that says who is missing."""

import conftest  # noqa: F401  (for the processes started here: the same platform, and what is compiled is shared)

import contextlib
import multiprocessing
import os
import re
import resource
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import peftjax as pj
from experiments import logs
from experiments.batches import batches
from experiments.interruption import Interrupted
from experiments.train import Limits, arrays, train
from peftjax.clusters import SLURM
from peftjax.processes import join
from peftjax.runs import Runs
from peftjax.sharding_rules import by_rules, make_mesh
from test_clusters import serving

pytestmark = pytest.mark.third_party  # optax's own promotions
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_processes"])
METHOD = pj.lora(rank=2, targets=("up", "down"))
RULES = [("up", P(None, "model")), ("down", P("model", None))]
IDS = [[1 + (7 * k + j) % 10 for j in range(1 + k % 4)] for k in range(40)]
TX = optax.adamw(1e-2)


def token_loss(logits, batch):
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]) * batch["weight"]
    return each.sum(), {"weight": batch["weight"].sum()}


def begin(mesh=None):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 4
    params = {"embed": normal(11, 8), "up": normal(8, 16), "down": normal(16, 3)}
    pooled = lambda params, b: (params["embed"][b["ids"]] * b["mask"][..., None].astype(jnp.float32)).sum(1)
    fn = lambda params, b: jnp.tanh(pooled(params, b) @ params["up"]) @ params["down"]
    example = arrays(batches(IDS, {"label": np.zeros(40, np.int32)}, 8, (2, 4))[0])
    apply, tuned = pj.attach(METHOD, fn, params, example, key=jax.random.key(0))
    specs = mesh and by_rules(RULES, params, mesh)
    return pj.make_train_step(apply, token_loss, TX, mesh), pj.train_state(tuned, TX, mesh=mesh, specs=specs)


def losses(step, state, first=0, last=6):
    found = []
    data = batches(IDS, {"label": (np.arange(40) % 3).astype(np.int32)}, 8, (2, 4), (0,), step.share)
    for k in range(first, last):
        state, metrics = step(state, arrays(data[k % len(data)]))
        found.append(float(metrics["loss"]))
    return found, state


def joined(index, port):
    """Makes this process one of two, of two devices each."""
    os.environ["XLA_FLAGS"] = re.sub(r"device_count=\d+", "device_count=2", os.environ["XLA_FLAGS"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    join(f"127.0.0.1:{port}", 2, index, timeout=120)


def child(index, port, folder, out):
    """One of two processes of two devices: three steps, a checkpoint, and three more from it on another mesh."""
    joined(index, port)
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    step, state = begin(make_mesh("data:2,model:2"))
    assert step.share == (index, 2)
    found, state = losses(step, state, 0, 3)
    step, fresh = begin(make_mesh("model:4"))
    assert step.share == (0, 1)  # both hold every example
    with Runs(folder, METHOD) as runs:
        runs.save(state, data={"batch": 3}, metrics={"loss": found[-1]})
        runs.wait()
        state, data = runs.restore(fresh)
    more, _ = losses(step, state, data["batch"], 6)
    turned = pj.make_train_step(None, None, None, Mesh(np.array(jax.devices())[[0, 2, 1, 3]], ("data",)))
    with pytest.raises(ValueError, match=rf"process {index} hold the parts \[{index}, {index + 2}\] of 4"):
        turned.share
    out.put((index, found + more))
    jax.distributed.shutdown()


def saving(index, port, folder, out):
    """One of two processes that save after every step, of twelve, and go on from what is saved; a file says how far."""
    joined(index, port)
    (step, state), found = begin(make_mesh("data:2,model:2")), []
    with Runs(folder / "runs", METHOD) as runs:
        state, data = runs.restore(state) or (state, {"batch": 0})
        for k in range(data["batch"], 12):
            one, state = losses(step, state, k, k + 1)
            found += one
            runs.save(state, data={"batch": k + 1})
            runs.wait()
            (folder / f"done-{index}").write_text(str(k + 1))
    out.put((index, found))
    jax.distributed.shutdown()


def filling(index, port, folder, out):
    """One of two processes that save twice; at the second time the first of them has no room on its disk."""
    joined(index, port)
    _, state = begin(make_mesh("data:2,model:2"))
    with Runs(folder, METHOD, timeout=4) as runs:
        runs.save(state, data={"batch": 0})
    if index == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        with Runs(folder, METHOD, timeout=4) as runs:
            runs.save(state, data={"batch": 1})
            runs.wait()
    except OSError as error:
        out.put((index, str(error)))
    jax.distributed.shutdown()


def absent(index, port, processes, out):
    try:
        join(f"127.0.0.1:{port}", processes, index, timeout=3)
    except (TimeoutError, ValueError) as error:
        out.put((index, str(error)))


def stopping(index, port, folder, checkpoints, out):
    """One of two processes that train a step, and then judge for a minute; a file says that they do."""
    joined(index, port)
    step, state = begin(make_mesh("data:2,model:2"))
    epoch = lambda number: batches(IDS[:8], {"label": np.zeros(8, np.int32)}, 8, (4,), (0,), step.share)

    def judge(state, check):
        (folder / f"judges-{index}").touch()
        for _ in range(600):
            time.sleep(0.1)
            check()

    with Runs(folder / "runs", METHOD) if checkpoints else contextlib.nullcontext() as runs:
        try:
            train(step, state, epoch, judge, Limits(1, 1), logs.Together([]), runs)
        except Interrupted as error:
            out.put((index, str(error), runs.numbers))
    out.close()
    out.join_thread()
    if index == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # behind the run it is as it always is
    time.sleep(60)


def judging(folder, checkpoints, out):
    """Both processes, once they judge."""
    port = free_port()
    both = [PROCESSES.Process(target=stopping, args=(k, port, folder, checkpoints, out)) for k in range(2)]
    for process in both:
        process.start()
    end = time.monotonic() + 120
    while len(list(folder.glob("judges-*"))) < 2 and all(p.is_alive() for p in both) and time.monotonic() < end:
        time.sleep(0.05)
    return both


def free_port_above(least):
    for port in range(least, 2**16):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            return port


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(target, each):
    out = PROCESSES.Queue()
    processes = [PROCESSES.Process(target=target, args=(*arguments, out)) for arguments in each]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return dict(out.get(timeout=10) for _ in processes)


def test_two_processes_give_what_one_device_gives(tmp_path):
    port = free_port()
    found = run(child, [(k, port, tmp_path / "runs") for k in range(2)])
    want, state = losses(*begin())
    assert found[0] == found[1]
    np.testing.assert_allclose(found[0], want, rtol=1e-5)
    with Runs(tmp_path / "runs", METHOD) as runs:
        again, data = runs.restore(begin()[1])
    assert data == {"batch": 3} and int(again.step) == 3
    np.testing.assert_allclose(losses(begin()[0], again, first=3)[0], want[3:], rtol=1e-5)


@pytest.mark.ci
def test_a_disk_that_is_full_for_one_ends_both_and_leaves_the_checkpoint_before(tmp_path):
    port = free_port()
    found = run(filling, [(k, port, tmp_path / "runs") for k in range(2)])
    for k, why in ((0, ".*(file|File)"), (1, "not all processes got to its end")):
        assert re.search(f"could not be written, and the last one that is whole is 0: {why}", found[k])
    with Runs(tmp_path / "runs", METHOD) as runs:
        assert runs.numbers == [0] and runs.restore(begin()[1])[1] == {"batch": 0}


def test_sigterm_to_one_stops_both_within_validation(tmp_path):
    out = PROCESSES.Queue()
    both = judging(tmp_path, True, out)
    os.kill(both[1].pid, signal.SIGTERM)
    found = sorted(out.get(timeout=10) for _ in both)
    both[1].join(10)
    both[0].kill()
    assert both[1].exitcode == -signal.SIGTERM
    for index, (k, message, numbers) in enumerate(found):
        assert k == index and "stopped by SIGTERM after step 1; the state is in" in message and numbers == [1]


@pytest.mark.ci
def test_sigterm_without_checkpoints_does_what_it_always_does(tmp_path):
    both = judging(tmp_path, False, PROCESSES.Queue())
    os.kill(both[1].pid, signal.SIGTERM)
    both[1].join(10)
    both[0].kill()
    assert both[1].exitcode == -signal.SIGTERM


@pytest.mark.full
def test_when_one_process_dies_the_others_end_and_the_run_goes_on(tmp_path):
    """JAX ends them when it has not heard of it for a while."""
    port, out = free_port(), PROCESSES.Queue()
    both = [PROCESSES.Process(target=saving, args=(k, port, tmp_path, out)) for k in range(2)]
    for process in both:
        process.start()
    done, end = tmp_path / "done-1", time.monotonic() + 120
    while not (done.exists() and done.read_text() not in ("", "1", "2")) and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(both[1].pid, signal.SIGKILL)
    both[0].join(180)
    assert both[0].exitcode not in (0, None) and int((tmp_path / "done-0").read_text()) < 12
    port, want = free_port(), losses(*begin(), 0, 12)[0]
    found = run(saving, [(k, port, tmp_path) for k in range(2)])
    assert found[0] == found[1] and 0 < len(found[0]) < 12
    np.testing.assert_allclose(found[0], want[-len(found[0]) :], rtol=1e-5)


@pytest.mark.ci
def test_a_process_that_never_joins_is_named():
    port = free_port()
    found = run(absent, [(0, port, 3), (2, port, 3)])
    assert found[0] == found[2] == f"of 3 processes, 1 did not join at 127.0.0.1:{port} within 3 s"
    found = run(absent, [(1, free_port(), 3)])
    assert "of 3 processes, 0 did not join" in found[1]


def by_slurm(index, n, port, out):
    """A task as SLURM starts it, one of n of a step of which only the first three came."""
    told = {"JOB_ID": port - 2**16 + 2**12, "STEP_NODELIST": "localhost", "NTASKS": n, "PROCID": index, "LOCALID": index}
    os.environ |= {f"SLURM_{name}": str(x) for name, x in told.items()}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        join(timeout=3 if n > 3 else 60)
        out.put((index, (jax.process_index(), jax.process_count(), jax.config.values["jax_cuda_visible_devices"])))
        jax.distributed.shutdown()
    except TimeoutError as error:
        out.put((index, str(error)))


@pytest.mark.full
def test_the_roll_is_called_under_slurm_too():
    port = free_port_above(2**16 - 2**12)
    found = run(by_slurm, [(k, 4, port) for k in (0, 1, 3)])
    assert set(found.values()) == {f"of 4 processes, 2 did not join at localhost:{port} within 3 s"}
    found = run(by_slurm, [(k, 2, port) for k in range(2)])
    assert found == {k: (k, 2, str(k)) for k in range(2)}  # one GPU for each


def a_node(port, out):
    """A task that is alone on its node, and says where it meets the others."""
    os.environ |= {name: "0" for name in SLURM} | {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "localhost"}
    join(f"localhost:{port}", 1, 0)
    out.put((0, jax.config.values["jax_cuda_visible_devices"]))


def test_a_process_that_is_told_where_to_join_keeps_all_gpus_under_slurm():
    assert run(a_node, [(free_port(),)]) == {0: "all"}


def on_tpu(index, out):
    """A worker of a slice of three as Cloud TPU starts it, of which two came."""
    workers = {"agent-worker-number": str(index), "worker-network-endpoints": "localhost,localhost,localhost"}
    with serving(workers) as server:
        os.environ["GCE_METADATA_IP"] = server
        os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it where it finds no TPU
        try:
            join(timeout=3)
        except TimeoutError as error:
            out.put((index, str(error)))


@pytest.mark.full
def test_the_roll_is_called_on_cloud_tpu_too():
    found = run(on_tpu, [(k,) for k in (0, 2)])
    assert set(found.values()) == {"of 3 processes, 1 did not join at localhost:8482 within 3 s"}


def test_two_processes_of_one_number_are_refused():
    port = free_port()
    out = PROCESSES.Queue()
    same = [PROCESSES.Process(target=absent, args=(k, port, 3, out)) for k in (0, 1, 1)]
    for process in same:
        process.start()
    found = [out.get(timeout=60)[1] for _ in range(3)]
    for process in same:
        process.join(60)
    assert sum("two processes joined" in message and "as number 1" in message for message in found) >= 2, found


def test_processes_that_are_told_different_numbers_are_refused():
    port = free_port()
    found = run(absent, [(0, port, 2), (3, port, 4)])
    assert found[0] == found[3] and f"at 127.0.0.1:{port}, process 3 of 4 joined a run of 2" in found[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("127.0.0.1:80", 2, 2), "process 2 of 2: expected a number of processes, and an index below it"),
        (("127.0.0.1:80", None, 0), "process 0 of None: expected a number of processes"),
        (("nowhere", 2, 0), "coordinator 'nowhere': expected host:port of process 0"),
        (("127.0.0.1:99999", 2, 0), "coordinator '127.0.0.1:99999': expected .* the port from 1 to 65535"),
        (("127.0.0.1:99999", 2, 1), "coordinator '127.0.0.1:99999': expected .* the port from 1 to 65535"),
        (("127.0.0.1:0", 2, 0), "coordinator '127.0.0.1:0': expected .* the port from 1 to 65535"),
    ],
)
def test_what_cannot_be_joined(arguments, words):
    with pytest.raises(ValueError, match=words):
        join(*arguments)


def test_shares_of_a_batch_are_its_parts():
    whole = batches(IDS, {"label": np.arange(40)}, 8, (2, 4), (3,))
    parts = [batches(IDS, {"label": np.arange(40)}, 8, (2, 4), (3,), (k, 2)) for k in range(2)]
    for k in range(len(whole)):
        for name, x in whole[k].items():
            np.testing.assert_array_equal(np.concatenate([part[k][name] for part in parts]), x)
    with pytest.raises(ValueError, match="a batch of 8 examples: expected a multiple of 3"):
        batches(IDS, {"label": np.arange(40)}, 8, (2, 4), (3,), (0, 3))
