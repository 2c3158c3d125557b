"""What a train step costs each device, by what the compiler says of it: nothing runs."""

import dataclasses
import time
from typing import Any, Mapping

import jax

from peftjax.flops import flops
from peftjax.hlo import Program, Traffic
from peftjax.training import TrainState, TrainStep

GIB = 2**30
# Memory of a chip in GiB, by what JAX calls it, that the compiler gives programs: of those that are not there to say it.
HBM = {"TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one step costs each device.

    Attributes:
      name: of the method.
      device, devices: their kind, and how many.
      trainable: how many numbers train.
      arguments, temporaries, outputs: bytes of the state and batch, of what a step holds besides, and of results that
        do not take the place of arguments. None where it does not compile.
      hbm: the memory of a device, in bytes; None where it is not known.
      flops: of products, on one device.
      cycles: the compiler's estimate, loops in full; `cycles_once` counts each loop's body once. 0 where it makes none.
      collectives: the traffic by kind.
      seconds: that tracing and compiling took.
      error: why the compiler refused, in its words; None where it did not.
    """

    name: str
    device: str
    devices: int
    trainable: int
    arguments: int | None
    temporaries: int | None
    outputs: int | None
    hbm: int | None
    flops: float
    cycles: int
    cycles_once: int
    collectives: Mapping[str, Traffic]
    seconds: float
    error: str | None = None

    @property
    def total(self) -> int | None:
        """The bytes that a device needs; None where it does not compile."""
        if self.arguments is None or self.temporaries is None or self.outputs is None:
            return None
        return self.arguments + self.temporaries + self.outputs

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the memory of the device is not known.

        A TPU's compiler refuses what does not. Where it does not refuse, the sum may be above the memory by a little:
        not all temporaries are there while all arguments are.
        """
        if self.total is None:
            return False
        if self.device.startswith("TPU"):
            return True
        return None if self.hbm is None else self.total <= self.hbm

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {**dataclasses.asdict(self), "total": self.total, "fits": self.fits}


def memory_of(device: Any) -> int | None:
    """The bytes of memory of a device: what it says itself, such as a GPU, or its kind's; None where neither is known.

    Args:
      device: one of `jax.devices()`, or of a slice that is not there and says nothing.
    """
    try:
        said = (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        said = None
    known = HBM.get(device.device_kind)
    return said or (None if known is None else int(known * GIB))


def cost(step: TrainStep, state: TrainState, batch: Any, name: str = "") -> Cost:
    """Compiles a step and reads what it costs; nothing runs, and abstract arrays serve.

    Args:
      step, state, batch: of `peftjax.make_train_step`, on a mesh.
      name: of the method, for the table.

    Returns:
      The cost. A program that the compiler refuses, as one that does not fit, has its words in `error`.

    Raises:
      ValueError: the step has no mesh.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> from peftjax.step_cost import cost
      >>> from peftjax.sharding_rules import make_mesh
      >>> mesh = make_mesh("data:1", jax.devices()[:1])
      >>> params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
      >>> tuned = jax.eval_shape(lambda p: pj.lora(rank=2).init(jax.random.key(0), p), params)
      >>> apply, tx = pj.wrap(lambda params, batch: batch["x"] @ params["w"]), optax.sgd(0.1)
      >>> step = pj.make_train_step(apply, lambda y, batch: ((y**2).mean(), {}), tx, mesh)
      >>> batch = {"x": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
      >>> cost(step, pj.train_state(tuned, tx, mesh=mesh), batch).trainable
      24
    """
    if step.mesh is None:
        raise ValueError("a step without a mesh has no devices to plan for; give make_train_step a mesh")
    begun, first = time.perf_counter(), step.mesh.devices.flat[0]
    count = step.mesh.devices.size
    known: dict[str, Any] = dict(
        name=name,
        device=first.device_kind,
        devices=count,
        trainable=sum(x.size for x in jax.tree.leaves(state.trainable)),
        hbm=memory_of(first),
        flops=flops(step.advance, *step.arguments(state, batch)) / count,
    )
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        refused: dict[str, Any] = dict(
            arguments=None, temporaries=None, outputs=None, cycles=0, cycles_once=0, collectives={}
        )
        return Cost(**known, **refused, seconds=time.perf_counter() - begun, error=str(error).split("\n\n")[0])
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    return Cost(
        **known,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        cycles=program.cycles,
        cycles_once=program.cycles_once,
        collectives=program.collectives,
        seconds=time.perf_counter() - begun,
    )
