"""The plan: what a step costs each device, by the real compiler, for devices that are here and for some that are not."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies
from rich.console import Console

import peftjax as pj
from experiments.models.decoder import REMAT, planned
from peftjax import plan, step_cost
from peftjax.flops import flops
from peftjax.plan_table import show
from peftjax.sharding_rules import make_mesh

pytestmark = pytest.mark.third_party  # optax's own promotions
ROOT = Path(__file__).parents[1]
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def costs(config):
    """LoRA and full fine-tuning on the eight devices that are here."""
    mesh = make_mesh("fsdp:4,model:2")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = planned(config, mesh, 8, 16, "layers")
        return [plan.plan(model, mesh, plan.METHODS[name](1), name) for name in ("lora", "full")]


def test_what_is_held_is_the_trees_own_bytes(costs):
    """Bytes of arguments: the base, and for full fine-tuning two moments of every parameter, split over the devices."""
    lora, full = costs
    base = 2 * full.trainable  # bfloat16
    assert lora.trainable < full.trainable / 5 and (lora.devices, lora.device) == (8, "cpu")
    assert base / 8 < lora.arguments < base and base * 3 / 8 < full.arguments < 3 * base
    assert full.temporaries > 0 and lora.fits is None and lora.error is None


def test_work_is_counted_through_the_stack(costs):
    """A weight takes part in four products of full fine-tuning with remat (the last one of a layer, in three), and in
    three of LoRA, whose own are small."""
    lora, full = costs
    assert 0.65 < lora.flops / full.flops < 0.9
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    tokens, head, attention = 8 * 16, 32 * 64, 2 * 32 * 16
    forward = 2 * tokens * (layer + attention)
    last = 2 * tokens * 32 * 64
    assert full.flops * 8 == pytest.approx(3 * (4 * forward - last) + 3 * 2 * tokens * head, rel=0.01)


def test_products_that_are_kept_are_not_computed_again(config):
    """Of the forward pass, the backward pass then repeats what each query finds of each key alone."""
    mesh = make_mesh("fsdp:8")
    models = {remat: planned(config, mesh, 8, 16, remat) for remat in REMAT}
    tokens, layer, pairs, head = 8 * 16, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64, 32 * 16, 32 * 64
    plain = 2 * tokens * (3 * 3 * (layer + 2 * pairs) + 3 * head)
    again = {"none": 0, "products": 2 * tokens * 3 * pairs, "layers": 2 * tokens * 3 * (layer + 2 * pairs - 32 * 64)}
    for remat, model in models.items():
        total = lambda params, batch, model=model: model.loss(model.fn(params, batch), batch)[0]
        found = flops(jax.grad(total), model.params, model.batch)
        assert found == pytest.approx(plain + again[remat], rel=0.01), remat


def test_less_that_trains_is_less_to_exchange(costs):
    moved = [sum(t.bytes for t in c.collectives.values()) for c in costs]
    assert 0 < moved[0] < moved[1]


class Device:
    """A device that says what memory it has, or how it does not."""

    def __init__(self, said, kind="NVIDIA H100 80GB HBM3"):
        self.said, self.device_kind = said, kind

    def memory_stats(self):
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


@pytest.mark.parametrize(
    "device, expected",
    [
        (Device({"bytes_in_use": 5, "bytes_limit": 60 * 2**30}), 60 * 2**30),
        (Device({"bytes_limit": 15 * 2**30}, "TPU v5 lite"), 15 * 2**30),
        (Device(None, "TPU v5 lite"), 63 * 2**28),
        (Device(jax.errors.JaxRuntimeError("UNIMPLEMENTED: not there"), "TPU v5 lite"), 63 * 2**28),
        (Device({"bytes_in_use": 5}), None),
        (Device(NotImplementedError()), None),
    ],
)
def test_the_memory_of_a_device(device, expected):
    assert step_cost.memory_of(device) == expected


def test_a_step_is_compared_with_the_memory_of_the_devices_that_are_here(monkeypatch):
    """As those of a GPU say; a CPU's say nothing."""
    params = {"w": jax.ShapeDtypeStruct((8, 4), "float32")}
    model = plan.Planned(
        lambda params, batch: batch["x"] @ params["w"],
        params,
        {"x": jax.ShapeDtypeStruct((16, 8), "float32")},
        None,
        lambda y, batch: ((y**2).mean(), {}),
    )
    cost = lambda: plan.plan(model, make_mesh("data:8"), plan.METHODS["lora"](2), "lora")
    assert (cost().hbm, cost().fits) == (None, None)
    needed = cost().total
    for limit, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(step_cost, "memory_of", lambda device, limit=limit: limit)
        assert (cost().hbm, cost().fits) == (limit, fits)


def test_the_table(costs):
    console = Console(file=io.StringIO(), width=80)
    large = dataclasses.replace(costs[1], name="adapter", trainable=405_000_000_000, arguments=2**37, flops=9e15)
    show([*costs, large], "tiny", console)
    printed = console.file.getvalue()
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80 and "405,000.0 128.00" in printed
    for part in ("tiny", "lora", "full", "8 x cpu", "GiB", "TFLOPs", "Mcycles"):
        assert part in printed
    found = re.search(r"^ ?full +all-reduce +(\d+) +[\d.]+ ?$", printed, re.M)
    assert int(found[1]) == costs[1].collectives["all-reduce"].count
    assert re.search(r"^ ?full +results +1 +0.00 ?$", printed, re.M)


def test_a_step_that_the_compiler_refuses_is_a_row(monkeypatch, config):
    """As one that does not fit a TPU: with its words."""

    class Refused:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 252.35G exceeds available HBM (15.75G)\n\nmore")

    monkeypatch.setattr(pj.TrainStep, "lower", lambda *_: Refused())
    mesh = make_mesh("fsdp:8")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = plan.plan(planned(config, mesh, 8, 16, "layers"), mesh, plan.METHODS["dora"](1), "dora")
    assert (found.total, found.fits) == (None, False) and found.flops > 0
    console = Console(file=io.StringIO(), width=80)
    show([found], "tiny", console)
    printed = console.file.getvalue()
    assert re.search(r"dora .* no ", printed) and "dora: RESOURCE_EXHAUSTED: 252.35G exceeds" in printed
    assert "more" not in printed


def test_a_tpus_compiler_says_what_fits(costs):
    """It refuses what does not; the sum of what it lists may be above."""
    tpu = dataclasses.replace(costs[0], device="TPU v5 lite", hbm=costs[0].total - 1)
    assert tpu.fits and not dataclasses.replace(tpu, device="NVIDIA H100").fits


@pytest.mark.ci
def test_the_command_prints_json(config, capsys):
    arguments = ["--model", str(config), "--mesh=fsdp:8", "--length=16", "--methods=lora", "--rank=2", "--json"]
    assert plan.main(arguments) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "lora" and found["devices"] == 8 and found["total"] >= found["arguments"]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--methods=lora,dorra"], "method 'dorra'; expected some of lora, dora, adapter, full"),
        (["--mesh=fsdp:3"], "the sizes multiply to 3, expected 8"),
        (["--topology=v5e"], "topology 'v5e': expected local, or a slice such as v5e:2x4"),
        (["--builder=nowhere:planned"], "run this in its folder, or give a function of your own"),
        (["--remat=some"], "remat 'some'; expected one of layers, products, none"),
        (["--mesh=fdsp:8"], "nothing is split over the axis 'fdsp' of the mesh (fdsp)"),
        (["--length=0"], "length 0: expected 1 at least"),
        (["--batch=0"], "batch 0: expected 1 at least"),
        (["--topology=v4:2x2x1"], "topology 'v4:2x2x1': expected local, or a slice such as v5e:2x4 (v5e, v5p, v6e)"),
        (["--model=nowhere.json"], "expected a config.json of the Llama family"),
    ],
)
def test_what_is_wrong_is_named(config, arguments, words, capsys):
    assert plan.main(["--model", str(config), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": "32"}, "hidden_size is '32', expected a whole number, 1 at least"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', expected an object with a rope_type, or null"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2, expected a whole number, 1 at least"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number: its features turn in pairs"),
    ],
)
def test_what_is_wrong_in_the_page_is_one_line(tmp_path, changes, words, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, **changes}))
    assert plan.main(["--model", str(path), "--length=16"]) == 2
    assert capsys.readouterr().err == f"plan: {path}: {words}\n"


def test_no_compiler_is_told_from_one_that_refuses(monkeypatch, tmp_path):
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    with pytest.raises(ValueError, match=r'is not installed; pip install "peftjax\[plan\]"'):
        plan.devices("v5e:2x4")

    def refuses(**_):
        raise jax.errors.JaxRuntimeError('INVALID_ARGUMENT: Topology layout "v5e:3x5" is not divisible\nmore')

    (tmp_path / "libtpu.so").touch()
    monkeypatch.setattr(topologies, "get_topology_desc", refuses)
    with pytest.raises(ValueError, match='compiler refuses it: INVALID_ARGUMENT: .* "v5e:3x5" is not divisible$'):
        plan.devices("v5e:3x5")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
def test_a_slice_that_is_not_there(config):
    command = [sys.executable, "-m", "peftjax.plan", "--model", str(config), "--topology=v5e:2x4", "--length=128"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, "--methods=lora", "--json"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["device"], found["devices"], found["fits"]) == ("TPU v5 lite", 8, True)
    assert found["cycles"] > found["cycles_once"] > 0
