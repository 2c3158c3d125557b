"""Will it fit, and what will it cost? Compiles the real train step for devices that need not be there.

    python -m peftjax.plan --model=config.json --topology=v5e:2x4 --mesh=fsdp:2,model:4 --length=4096

compiles one step of each method for a TPU slice, without weights and without a TPU (the extra `plan` brings the
compiler), and prints what each chip holds and does. From Python, `plan(Planned(...), mesh, method)` gives the same as a
`peftjax.step_cost.Cost`, of any model and method.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
from typing import Any, Callable, Sequence

import jax
import optax
from jax.sharding import Mesh

from peftjax.evaluate import wrap
from peftjax.method import Method
from peftjax.methods.adapter import adapter
from peftjax.methods.dora import dora
from peftjax.methods.lora import lora
from peftjax.roles import Roles, roles
from peftjax.sharding import shardings
from peftjax.sharding_rules import make_mesh
from peftjax.step_cost import Cost, cost
from peftjax.training import make_train_step, state_of, train_state

# What libtpu calls a slice of n chips.
SLICES = {"v5e": "v5litepod-{1}", "v5p": "v5p-{0}", "v6e": "v6e-{1}"}
METHODS: dict[str, Callable[[int], Method | None]] = {
    "lora": lambda rank: lora(rank),
    "dora": lambda rank: dora(rank),
    "adapter": lambda rank: adapter("pfeiffer", bottleneck=4 * rank),
    "full": lambda rank: None,
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A model without weights, to be planned for.

    Attributes:
      fn: `fn(params, batch)`.
      params: its parameters, as `jax.ShapeDtypeStruct`s.
      batch: a batch, likewise; examples along axis 0, a multiple of the devices over which they are split.
      specs: where the parameters lie on the mesh, as `peftjax.train_state` reads it; None replicates them.
      loss: as `peftjax.make_train_step` reads it.
    """

    fn: Callable[..., Any]
    params: Any
    batch: Any
    specs: Any
    loss: Callable[..., Any]


def devices(topology: str) -> list[Any]:
    """The devices of a TPU slice that need not be there, such as "v5e:2x4" or "v5p:4x4x4"; "local" are those that are.

    For a slice it sets, where they are not set, the environment variables that say which machine this is.

    Raises:
      ValueError: a name of another form, a slice that the compiler refuses, or no compiler here.

    Example:
      >>> devices("local") == jax.devices()
      True
      >>> devices("v5e")
      Traceback (most recent call last):
      ...
      ValueError: topology 'v5e': expected local, or a slice such as v5e:2x4 (v5e, v5p, v6e)
    """
    if topology == "local":
        return jax.devices()
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    if found is None or found[1] not in SLICES:
        raise ValueError(f"topology {topology!r}: expected local, or a slice such as v5e:2x4 ({', '.join(SLICES)})")
    if importlib.util.find_spec("libtpu") is None and not os.path.isfile(os.environ.get("TPU_LIBRARY_PATH", "")):
        raise ValueError(
            f"topology {topology!r}: libtpu, the compiler for TPUs, is not installed; pip install \"peftjax[plan]\""
        )
    chips = math.prod(map(int, found[2].split("x")))
    # Without these, the compiler asks a metadata server that is not there which machine it is on.
    here = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    for name, value in {**here, "TPU_ACCELERATOR_TYPE": SLICES[found[1]].format(2 * chips, chips)}.items():
        os.environ.setdefault(name, value)
    try:
        from jax.experimental import topologies

        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        said = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"topology {topology!r}: the compiler refuses it: {said}") from error


def plan(model: Planned, mesh: Mesh, method: Method | None, name: str = "", found: Roles | None = None) -> Cost:
    """What a step of a method costs on a model, with AdamW.

    Args:
      model: the model.
      mesh: the devices.
      method: the method; None is fine-tuning of every parameter in its own dtype, as without peftjax.
      name: for the table.
      found: the model's roles, where they are known already.

    Returns:
      The cost, as `peftjax.step_cost.cost` reads it off the compiler. Where that refuses, its `error` says why.

    Raises:
      ValueError: a leaf that the method cannot tune, specs that do not fit, or examples that the mesh does not divide.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> from peftjax.plan import Planned, plan
      >>> from peftjax.sharding_rules import make_mesh
      >>> model = Planned(
      ...     fn=lambda params, batch: batch @ params["w"],
      ...     params={"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
      ...     batch=jax.ShapeDtypeStruct((16, 8), jnp.float32),
      ...     specs=None,
      ...     loss=lambda y, batch: ((y**2).mean(), {}),
      ... )
      >>> cost = plan(model, make_mesh("data:1", jax.devices()[:1]), pj.lora(rank=2, targets="w"), "lora")
      >>> cost.trainable, cost.devices
      (24, 1)
    """
    tx = optax.adamw(1e-4)
    if method is None:
        lies = shardings(model.params, mesh, model.specs)
        state = state_of(model.params, jax.tree.map(lambda _: None, model.params), tx, None, None, mesh, lies)
        return cost(make_train_step(model.fn, model.loss, tx, mesh), state, model.batch, name)
    of = roles(model.fn, model.params, model.batch) if found is None else found
    tuned = jax.eval_shape(lambda params: method.init(jax.random.key(0), params, of), model.params)
    state = train_state(tuned, tx, mesh=mesh, specs=model.specs)
    return cost(make_train_step(wrap(model.fn), model.loss, tx, mesh, method=method), state, model.batch, name)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m peftjax.plan", description="Will it fit, and what will it cost?")
    parser.add_argument("--model", required=True, help="a config.json of the Llama family, as Hugging Face writes it")
    parser.add_argument("--topology", default="local", help="a TPU slice, as v5e:2x4 or v5p:4x4x4; or local")
    parser.add_argument("--mesh", default="fsdp:-1", help="axes and sizes, as fsdp:2,model:4; -1 is what is left")
    parser.add_argument("--methods", default="lora,dora,adapter,full", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA and DoRA; adapters are four times as wide")
    parser.add_argument("--batch", type=int, help="examples over all devices; by default one for each")
    parser.add_argument("--length", type=int, default=4096, help="tokens of an example")
    parser.add_argument(
        "--remat", default="layers", help="computed again going back: layers, all but products, or none"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, a list of costs, instead of a table")
    parser.add_argument("--builder", default="experiments.models.decoder:planned", help="module:function of the model")
    return parser.parse_args(argv)


def _builder(name: str) -> Callable[..., Planned]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"builder {name!r}: {error}. The default lies in a clone of the repository: run this in its folder, or give "
            "a function of your own"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan that the command line asks for; returns the exit status."""
    asked = _arguments(argv)
    try:
        wanted = asked.methods.split(",")
        if unknown := [name for name in wanted if name not in METHODS]:
            raise ValueError(f"method {unknown[0]!r}; expected some of {', '.join(METHODS)}")
        for name in ("rank", "length", "batch"):
            if (given := getattr(asked, name)) is not None and given < 1:
                raise ValueError(f"{name} {given}: expected 1 at least")
        mesh = make_mesh(asked.mesh, devices(asked.topology))
        examples = asked.batch or mesh.devices.size
        model = _builder(asked.builder)(asked.model, mesh, examples, asked.length, asked.remat)
        found = roles(model.fn, model.params, model.batch)
        costs = [plan(model, mesh, METHODS[name](asked.rank), name, found) for name in wanted]
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps([c.to_dict() for c in costs], indent=1))
    else:
        from peftjax.plan_table import show

        show(costs, f"{asked.model}, {examples} x {asked.length} tokens on {asked.topology}, mesh {asked.mesh}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
