"""The train step: what moves, what stays, and one compiled function from one state to the next."""

import dataclasses
import functools
import math
import warnings
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftjax.advance import Loss, advance
from peftjax.method import Method
from peftjax.overlay import layers
from peftjax.paths import flatten
from peftjax.sharding import BATCH_AXES, shardings
from peftjax.state_layout import abstract, like_trainable, on, put
from peftjax.switches import dropping
from peftjax.tree import combine, partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is at one step.

    Attributes:
      step: how many batches have been seen, int32 ().
      trainable: the first part of `peftjax.partition`.
      frozen: the second part; a step reads it and never donates it.
      model_state: what the model itself carries on (batch statistics, counts of a random stream), or None.
      opt_state: the optimizer's state.
      key: what dropout draws from, folded with `step` at every step, or None for none.
      skipped: how many steps were left out, for a loss or a gradient that was not finite, int32 ().
      failing: how many of the last steps, in a row, int32 ().

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> state = pj.train_state(tuned, optax.sgd(0.1), key=jax.random.key(1))
      >>> type(state).__name__, pj.extract(state.tuned), int(state.skipped)
      ('TrainState', {'b/value': Array([1., 1.], dtype=float32)}, 0)
    """

    step: Any
    trainable: Any
    frozen: Any
    model_state: Any
    opt_state: Any
    key: Any
    skipped: Any
    failing: Any

    @property
    def tuned(self) -> Any:
        """The tuned tree."""
        return combine(self.trainable, self.frozen)


def train_state(
    tuned: Any,
    tx: optax.GradientTransformation,
    *,
    key: Any = None,
    model_state: Any = None,
    mesh: Mesh | None = None,
    specs: Any = None,
) -> TrainState:
    """The state before the first step.

    Args:
      tuned: a tree with overlays, the same on every process. Abstract arrays make an abstract state, for
        `TrainStep.lower`.
      tx: the optimizer of what trains; it never sees a frozen array, so clipping and decay take none into account.
      key: a PRNG key for dropout; None for none. A step gives overlays and the model a new one each time; see
        `make_train_step`.
      model_state: what the model carries from step to step; replicated on the mesh unless it lies there already.
      mesh: the devices; None leaves every array where it is.
      specs: the partition of the base on the mesh, as `peftjax.sharding.specs` reads it: see `peftjax.sharding_rules`.
        Overlay fields and the optimizer's state follow it. An axis that the mesh does not divide is replicated, and a
        warning says so. None replicates all.

    Returns:
      The state. What trains is copied, for a step donates its buffers, and the caller's are not ours to give.

    Raises:
      ValueError: nothing trains, or specs without a mesh, of axes that it does not have, or longer than their arrays.

    Warns:
      UserWarning: an overlay has dropout, and there is no key: unless `apply` gives it one, nothing drops out.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> state = pj.train_state(tuned, optax.adam(1e-3))
      >>> int(state.step), state.trainable["w"], state.frozen["w"] is tuned["w"]
      (0, None, True)
    """
    trainable, frozen = partition(tuned)
    if not jax.tree.leaves(trainable):
        raise ValueError("nothing in this tree trains: it holds no overlay, or all of them are locked")
    if key is None and (kept := dropping(tuned)):
        warnings.warn(
            f"the overlays at {', '.join(kept[:3])}{' ...' if kept[3:] else ''} have dropout, and the state no key to draw "
            "it from: nothing will drop out; expected `key=` here, or `peftjax.with_key` in the step's apply",
            stacklevel=2,
        )
    if specs is not None and mesh is None:
        raise ValueError("specs say where arrays lie on a mesh; expected `mesh=` beside them")
    if mesh is not None:
        lies = partition(shardings(tuned, mesh, specs))
        frozen = jax.tree.map(put, frozen, lies[1])
    return state_of(trainable, frozen, tx, key, model_state, mesh, None if mesh is None else lies[0])


def state_of(
    trainable: Any, frozen: Any, tx: optax.GradientTransformation, key: Any, model_state: Any, mesh: Any, lies: Any
) -> TrainState:
    """The state before the first step, of a tree in two parts; `lies` are the shardings of the first on the mesh."""
    counts = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "failing")}
    own = {"trainable": trainable, "model_state": model_state, "key": key, **counts}
    copied = lambda: jax.tree.map(lambda x: x if abstract(x) else jnp.array(x, copy=True), own)
    own = jax.eval_shape(copied) if any(map(abstract, jax.tree.leaves(trainable))) else copied()
    if mesh is not None:
        own["trainable"] = jax.tree.map(put, own["trainable"], lies)
        own = jax.tree.map(lambda x: x if on(mesh, x) else put(x, _whole(mesh)), own)
    return TrainState(frozen=frozen, opt_state=_start(tx, own["trainable"], mesh), **own)


def _start(tx: optax.GradientTransformation, trainable: Any, mesh: Mesh | None) -> Any:
    shapes = jax.eval_shape(tx.init, trainable)
    lies = None if mesh is None else like_trainable(shapes, trainable, _whole(mesh))
    if any(map(abstract, jax.tree.leaves(trainable))):
        return shapes if lies is None else jax.tree.map(put, shapes, lies)
    return jax.jit(tx.init, out_shardings=lies)(trainable)


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def make_train_step(
    apply: Callable[..., Any],
    loss: Loss,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    method: Method | None = None,
    accumulate: int = 1,
    batch_axes: Sequence[str] | None = None,
) -> "TrainStep":
    """Makes `step(state, batch) -> (state, metrics)`, compiled once: gradients of what trains, and the optimizer.

    `g = sum_k grad total_k / sum_k weight_k + grad penalty` over `accumulate` parts of the batch, one after the other.
    A step whose loss or gradient is not finite changes nothing but its counts, and one in which nothing counts (of weight
    0) nothing but `step`; its means are 0.

    Args:
      apply: `apply(tuned, batch)`, the wrapped model. Where the state has a key, the overlays get theirs of it, as by
        `peftjax.with_key`, and apply is given another one, `key=`, which it has to take also where the model itself has
        no use for it. Where the state has a model state, it is given `model_state=` and returns `(outputs, model_state)`.
      loss: `loss(outputs, batch) -> (value, aux)`. With `aux["weight"]`, the number of examples or tokens that count,
        value and the rest of aux are sums over these; without it they are means, of parts that weigh the same.
      tx: the optimizer, the one of `train_state`.
      mesh: the devices that the state lies on; None for a state of one device.
      method: the method that made the tree: its `penalty` is added to the loss, its `update` runs after the optimizer.
      accumulate: into how many parts the batch is cut; 1 for none.
      batch_axes: the axes of the mesh over which the examples are split; by default "data" and "fsdp", of those that
        the mesh has.

    Returns:
      The step. It donates what trains, the optimizer's state and the model's; the frozen part stays. `metrics` are
      `loss`, `grad_norm`, the weighted means of aux, `weight`, and `skipped`: scalars, equal on all devices.

    Raises:
      ValueError: fewer than one part, or axes that the mesh does not have; when it is called, examples that the parts
        and the mesh do not divide, a state that does not lie on the mesh, a model state of another structure than it
        was, or aux with a name of the step's own metrics.
      TypeError: when it is called, a state with a key or a model state, and an apply that takes none; or an apply or a
        loss that returns something else than a pair where one is expected.

    Warns:
      UserWarning: when it is called, overlays of a method with an `update`, and no `method=` that has one.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> apply = pj.wrap(lambda params, batch: batch["x"] @ params["w"] + params["b"])
      >>> tx = optax.sgd(0.1)
      >>> step = pj.make_train_step(apply, lambda y, batch: ((y**2).mean(), {}), tx)
      >>> state, metrics = step(pj.train_state(tuned, tx), {"x": jnp.ones((4, 2))})
      >>> print(metrics["loss"], state.tuned["b"].value)
      9.0 [0.7 0.7]

    With dropout, here in the overlays alone:
      >>> tuned = pj.lora(rank=1, dropout=0.5).init(jax.random.key(0), {"w": jnp.ones((2, 2))})
      >>> apply = pj.wrap(lambda params, batch, key: batch["x"] @ params["w"])
      >>> step = pj.make_train_step(apply, lambda y, batch: ((y**2).mean(), {}), tx)
      >>> state, metrics = step(pj.train_state(tuned, tx, key=jax.random.key(1)), {"x": jnp.ones((4, 2))})
      >>> int(state.step)
      1
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}: expected 1 or more parts of a batch")
    had = () if mesh is None else mesh.axis_names
    if batch_axes is not None and (strays := [name for name in batch_axes if name not in had]):
        raise ValueError(f"batch_axes: {strays[0]!r} is no axis of the mesh ({', '.join(map(str, had)) or 'none'})")
    axes = tuple(name for name in (BATCH_AXES if batch_axes is None else batch_axes) if name in had)
    return TrainStep(apply, loss, tx, mesh, method, accumulate, axes)


@dataclasses.dataclass(eq=False)
class TrainStep:
    """A compiled step from one `TrainState` to the next, as `make_train_step` makes it.

    Example, what a step costs, without running it:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> apply, tx = pj.wrap(lambda params, x: x @ params["w"] + params["b"]), optax.sgd(0.1)
      >>> step = pj.make_train_step(apply, lambda y, x: ((y**2).mean(), {}), tx)
      >>> step.lower(pj.train_state(tuned, tx), jnp.ones((4, 2))).compile().cost_analysis()["flops"] > 0
      True
    """

    apply: Callable[..., Any]
    loss: Loss
    tx: optax.GradientTransformation
    mesh: Mesh | None
    method: Method | None
    accumulate: int
    batch_axes: tuple[str, ...]
    _jitted: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The next state, and the metrics of this batch."""
        moving, frozen, batch = self.arguments(state, batch)
        moving, changed, metrics = self._compiled(moving, frozen, batch)(moving, frozen, batch)
        put_back = lambda new, old: old if new is None else self._as_before(new, old)
        kept = jax.tree.map(put_back, changed, frozen, is_leaf=lambda x: x is None)
        return dataclasses.replace(moving, frozen=kept), metrics

    def _as_before(self, new: Any, old: Any) -> Any:
        """A frozen array that a method changed, where it lay: lying elsewhere, it would be compiled for anew."""
        return new if self.mesh is None or new.sharding == old.sharding else jax.device_put(new, old.sharding)

    def lower(self, state: TrainState, batch: Any) -> Any:
        """The step lowered for these types, `jax.stages.Lowered`: its `compile()` tells what it costs and holds."""
        arguments = self.arguments(state, batch)
        return self._compiled(*arguments).lower(*arguments)

    def place(self, batch: Any) -> Any:
        """The batch on the mesh, its examples (axis 0) split over `batch_axes`; from each process its `share`."""
        mesh = self.mesh
        return batch if mesh is None else jax.tree.map(lambda x: self._placed(x, mesh), batch)

    def _placed(self, x: Any, mesh: Mesh) -> Any:
        lies = NamedSharding(mesh, PartitionSpec(self.batch_axes) if np.ndim(x) else PartitionSpec())
        if abstract(x):
            return put(x, lies)
        return x if on(mesh, x) else jax.make_array_from_process_local_data(lies, np.asarray(x))

    def arguments(self, state: TrainState, batch: Any) -> tuple[Any, Any, Any]:
        """What `advance` is given: what moves, what is frozen, and the batch on the mesh."""
        self._check(batch)
        return dataclasses.replace(state, frozen=None), state.frozen, self.place(batch)

    @functools.cached_property
    def _ways(self) -> int:
        """Over how many devices the examples are split."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in self.batch_axes)

    @functools.cached_property
    def share(self) -> tuple[int, int]:
        """(k, n): this process gives the k-th of n equal parts of each batch.

        Processes whose devices lie at the same place of `batch_axes` give the same part.

        Raises:
          ValueError: the devices of this process do not hold examples that follow each other.
        """
        if self.mesh is None:
            return 0, 1
        lies = NamedSharding(self.mesh, PartitionSpec(self.batch_axes))
        held = lies.addressable_devices_indices_map((self._ways,)).values()
        parts = sorted({at[0].start or 0 for at in held if at})
        n = self._ways // len(parts)
        if parts[0] % len(parts) or parts != list(range(parts[0], parts[0] + len(parts))):
            raise ValueError(
                f"the devices of process {jax.process_index()} hold the parts {parts} of {self._ways} of a batch; expected "
                f"parts that follow each other: put the batch's axes {self.batch_axes} first in the mesh"
            )
        return parts[0] // len(parts), n

    def _check(self, batch: Any) -> None:
        for where, x in jax.tree_util.tree_leaves_with_path(batch):
            local = self.mesh is not None and not on(self.mesh, x) and not abstract(x)
            examples = x.shape[0] * (self.share[1] if local else 1) if np.ndim(x) else 0
            if examples % (self.accumulate * self._ways):
                raise ValueError(
                    f"batch{jax.tree_util.keystr(where)} holds {examples} examples, expected a multiple of "
                    f"{self.accumulate * self._ways}: {self.accumulate} parts over {self._ways} devices of the axes "
                    f"{self.batch_axes}"
                )

    def _compiled(self, moving: Any, frozen: Any, batch: Any) -> Any:
        if self.mesh is None:
            if None not in self._jitted:
                self._jitted[None] = jax.jit(self.advance, donate_argnums=0)
            return self._jitted[None]
        lies = jax.tree.map(lambda x: getattr(x, "sharding", None), (moving, frozen, batch))
        key = (jax.tree.structure(lies), tuple(jax.tree.leaves(lies)))
        if key not in self._jitted:
            if strays := [x for x in jax.tree.leaves((moving, frozen)) if not on(self.mesh, x)]:
                raise ValueError(
                    f"{len(strays)} arrays of the state do not lie on the mesh of this step ({self.mesh}); expected a "
                    "state of `train_state(..., mesh=mesh)`"
                )
            out = (lies[0], None, _whole(self.mesh))
            self._jitted[key] = jax.jit(self.advance, in_shardings=lies, out_shardings=out, donate_argnums=0)
        return self._jitted[key]

    def advance(self, moving: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Any, dict[str, Any]]:
        """The step as a pure function, not compiled: see `peftjax.advance`."""
        if self.method is None or self.method.update is None:
            _warn_unguided(combine(moving.trainable, frozen))
        return advance(self.apply, self.loss, self.tx, self.method, self.accumulate, moving, frozen, batch)


def _warn_unguided(tuned: Any) -> None:
    if left := [path for path, leaf in flatten(tuned) if any(x.guided for x in layers(leaf))]:
        warnings.warn(
            f"the overlays at {', '.join(left[:3])}{' ...' if left[3:] else ''} are moved by their method's update too, and "
            "this step has none to run: expected `make_train_step(..., method=)`, the method that made the tree",
            stacklevel=2,
        )
