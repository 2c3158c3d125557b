"""finetune.py on many devices: simulated ones, and those of two real processes over gloo, against one device."""

import conftest  # noqa: F401  (for the processes started here: the same platform, and what is compiled is shared)

import io
import json
import multiprocessing
import os
import re

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from test_experiments import configured, place  # noqa: F401
from test_processes import free_port

from experiments import finetune, processes

pytestmark = pytest.mark.third_party  # optax's Adam needs the usual promotion
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_finetune_many"])


def trained(folder, name, **changes):
    """What a run left whose results go to `folder / name`."""
    c = configured(folder, epochs=2, out=str(folder / name), **changes)
    finetune.run(c, Console(file=io.StringIO()))
    return left(folder / name)


def left(out):
    """The last line of the results, the losses after each epoch, and the adapter."""
    row = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
    scores = [score["loss"] for score in row["results"]["validation"]]
    return row, scores, load_file(out / "mine-lora-seed0" / "adapter" / "adapter.safetensors")


@pytest.fixture(scope="module")
def alone(place):  # noqa: F811
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return trained(place, "alone")


def same(found, alone):
    np.testing.assert_allclose(found[1], alone[1], rtol=1e-5)
    assert found[0]["results"]["test"][-1]["scores"] == alone[0]["results"]["test"][-1]["scores"]
    assert set(found[2]) == set(alone[2])
    for name, x in alone[2].items():
        np.testing.assert_allclose(found[2][name], x, atol=1e-3 * np.abs(x).max(), err_msg=name)


@pytest.mark.ci
def test_a_mesh_by_a_flag_gives_what_one_device_gives(place, alone):  # noqa: F811
    found = trained(place, "mesh", mesh="data:2,fsdp:2,model:2")
    assert (found[0]["device"]["count"], found[0]["device"]["processes"]) == (8, 1)
    same(found, alone)


def child(index, port, folder):
    """One of two processes of two devices, as the script runs it; what it prints goes to a file."""
    os.environ["XLA_FLAGS"] = re.sub(r"device_count=\d+", "device_count=2", os.environ["XLA_FLAGS"])
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    mine = {"mesh": "data:2,fsdp:2", "join": f"127.0.0.1:{port},2,{index}", "timeout": 120.0, "resume": "auto"}
    c = configured(folder, epochs=2, out=str(folder / "two"), **mine)
    with (folder / f"printed-{index}").open("w") as file:
        finetune.start(c, Console(file=file, width=120))
    jax.distributed.shutdown()


@pytest.mark.full
def test_two_processes_give_what_one_device_gives(place, alone):  # noqa: F811
    """Each reads its part of the batches, both write the checkpoints, one prints and leaves the results."""
    port = free_port()
    both = [PROCESSES.Process(target=child, args=(k, port, place)) for k in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(200)
    assert [process.exitcode for process in both] == [0, 0]
    printed = [(place / f"printed-{k}").read_text() for k in range(2)]
    assert "Test rows: 30" in printed[0] and not printed[1]
    assert len((place / "two" / "results.jsonl").read_text().splitlines()) == 1
    found = left(place / "two")
    assert (found[0]["device"]["count"], found[0]["device"]["processes"]) == (4, 2)
    same(found, alone)
    again = trained(place, "two", resume="auto")  # the run has ended: one device takes it as it is
    assert again[1] == found[1] and again[0]["device"]["processes"] == 1
    for name, x in found[2].items():
        np.testing.assert_array_equal(again[2][name], x)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"join": "host:1"}, 'join \'host:1\'; expected "auto", or "host:port,n,k"'),
        ({"join": "host:1,2,two"}, "expected"),
        ({"join": "host,2,1"}, "coordinator 'host': expected host:port"),
    ],
)
def test_what_cannot_be_joined_is_named(place, changes, words):  # noqa: F811
    with pytest.raises(ValueError, match=re.escape(words)):
        processes.join(configured(place, **changes))
