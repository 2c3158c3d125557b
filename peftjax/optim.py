"""optax for tuned trees: training loops over the full tree, and a learning rate for each group of fields."""

import dataclasses
import math
import re
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from peftjax.depth import rates
from peftjax.flat import near
from peftjax.roles import Role
from peftjax.tree import Entry, entries, partition

Rate = float | Callable[[Any], Any]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Untouched:
    """The update of a frozen array: like None, it is no leaf; unlike None, `optax.apply_updates` can add it.

    The sum is the array itself, down to the sign of its zeros, which adding 0.0 would not keep.
    """

    __array_ufunc__ = None

    def __radd__(self, array: Any) -> Any:
        return array


def train_only(tx: optax.GradientTransformation, tuned: Any) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer fit for a loop over the full tree, such as one with Flax's `TrainState`.

    Frozen arrays get no state, no decay and no update, and their gradients take no part in clipping. Let it be the
    outermost transform. With `partition` it is not needed: there, `tx` never sees a frozen array. Where a tree holds
    integers, the gradient of all of it is `jax.grad(loss, allow_int=True)`.

    Args:
      tx: the optimizer of what trains.
      tuned: the tree of overlays it will see, without dropout keys: call `with_key` inside the loss.

    Returns:
      A transform over trees like `tuned`. Trees that hold None where an array is frozen serve as well, as gradients
      from `value_and_grad` do; their updates are None there too.

    Raises:
      ValueError: nothing trains, the tree holds dropout keys (of which there is no gradient), or `init` or `update`
        gets a tree with other overlays.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> tx = pj.train_only(optax.adamw(0.1), tuned)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, tuned), tx.init(tuned), tuned)
      >>> new = optax.apply_updates(tuned, updates)
      >>> bool((new["w"] == tuned["w"]).all()), bool((new["b"].value == tuned["b"].value).any())
      (True, False)
    """
    inner = optax.with_extra_args_support(tx)
    expected = _trained(tuned)
    if not expected:
        raise ValueError("nothing in this tree trains: it holds no overlay, or all of them are locked")
    if keys := [e.key for e in entries(tuned) if e.is_key and not e.is_base]:
        raise ValueError(
            f"the tree holds dropout keys ({', '.join(keys)}): call `with_key(tuned, key)` inside the loss"
        )

    def trainable(tree: Any) -> Any:
        part = partition(tree)[0]
        if jax.tree.leaves(tree) and (found := _trained(tree)) != expected:
            odd = ", ".join(sorted(set(expected) ^ set(found)))
            raise ValueError(f"`train_only` was made for the overlays of another tree; they differ in {odd}")
        return part

    def init(params: Any) -> Any:
        return inner.init(trainable(params))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        full: Any = jax.tree.structure(grads)
        extra = {k: partition(v)[0] if jax.tree.structure(v) == full else v for k, v in extra.items()}
        inner_params = None if params is None else trainable(params)
        updates, state = inner.update(trainable(grads), state, inner_params, **extra)
        return jax.tree.map(_filled, updates, grads, is_leaf=lambda x: x is None), state

    return optax.GradientTransformationExtraArgs(init, update)


def _trained(tree: Any) -> list[str]:
    """The names of what trains: the same whether a framework boxes its arrays or not."""
    return [e.key for e in entries(tree) if e.trains]


def _filled(update: Any, grad: Any) -> Any:
    return Untouched() if update is None and grad is not None else update


def groups(tuned: Any, transforms: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Trains each group of fields with its own optimizer.

    Args:
      tuned: a tree with overlays.
      transforms: {pattern: optimizer}. A pattern is a regex, fullmatched on `path/field` (as `extract` names it) or on
        the leaf's path; the first that matches wins.

    Returns:
      A transform over the full tree or its trainable part, as `train_only` makes it.

    Raises:
      ValueError: a pattern wins no field, or a trained field matches no pattern.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> tuned = pj.unfreeze(".*").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> tx = pj.groups(tuned, {"b": optax.sgd(1.0), ".*": optax.sgd(0.5)})
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, tuned), tx.init(tuned))
      >>> print(updates["b"].value, updates["w"].value[0])
      [-1. -1.] [-0.5 -0.5]
    """
    return _grouped(tuned, transforms, lambda e: (e.key, e.path))


def _grouped(
    tuned: Any, transforms: Mapping[str, Any], names: Callable[[Entry], tuple[str, ...]]
) -> optax.GradientTransformationExtraArgs:
    """The groups, where a pattern wins a field that has one of `names`."""
    first = lambda e: next((p for p in transforms if any(re.fullmatch(p, name) for name in names(e))), None)
    found = entries(tuned)
    labels = [first(e) if e.trains else None for e in found]
    keys = [e.key for e in found if e.trains]
    if left := [e.key for e, label in zip(found, labels) if e.trains and label is None]:
        raise ValueError(f"no pattern matches {', '.join(left)}; end with '.*' to name what is left")
    if idle := [p for p in transforms if p not in labels]:
        lines = [f"{p!r} (nearest: {near(p, keys)})" for p in idle]
        raise ValueError(f"these patterns match nothing that trains, or only what one before took: {', '.join(lines)}")
    return train_only(optax.partition(transforms, jax.tree.unflatten(jax.tree.structure(tuned), labels)), tuned)


def lora_plus(
    tuned: Any,
    learning_rate: Rate,
    ratio: float = 16.0,
    *,
    fast: str = ".*/(b|shift)",
    optimizer: Callable[[Rate], optax.GradientTransformation] = optax.adamw,
) -> optax.GradientTransformationExtraArgs:
    """Trains B faster than A: `lr_B = ratio * lr_A`.

    Args:
      tuned: a tree with LoRA overlays.
      learning_rate: of everything but B: a number or a schedule.
      ratio: how much faster B learns; about 16 did best in the paper.
      fast: a regex, fullmatched on `path/field`: the fields that are fast, by default every B, and its bias where it has
        one. A model's own leaf called `b` is not meant: where that trains, its field is `b/value`.
      optimizer: makes an optimizer from a learning rate.

    Returns:
      A transform over the full tree or its trainable part.

    Raises:
      ValueError: no trained field is fast, or all are; a ratio of 0 or below, or that is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> tuned = pj.lora(rank=1, targets="w").init(jax.random.key(0), {"w": jnp.ones((2, 2))})
      >>> tx = pj.lora_plus(tuned, 0.5, ratio=4.0, optimizer=optax.sgd)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, tuned), tx.init(tuned))
      >>> print(updates["w"].a.ravel(), updates["w"].b.ravel())
      [-0.5 -0.5] [-2. -2.]

    A table's B is as fast as the others; where it has to have a rate of its own, `groups` names it.

    Reference: Hayou et al. 2024, arXiv 2402.12354.
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"lora_plus: ratio={ratio}; expected a number above 0")
    transforms = {fast: optimizer(_times(learning_rate, ratio)), ".*": optimizer(learning_rate)}
    return _grouped(tuned, transforms, lambda e: (e.key,))


def _times(rate: Rate, factor: float) -> Rate:
    return (lambda step: factor * rate(step)) if callable(rate) else factor * rate


def layerwise(
    tuned: Any,
    learning_rate: Rate,
    decay: float,
    roles: Mapping[str, Role],
    *,
    block: Callable[[str], str] | None = None,
    optimizer: Callable[[Rate], optax.GradientTransformation] = optax.adamw,
) -> optax.GradientTransformationExtraArgs:
    """Trains early layers slower than late ones: `lr_k = learning_rate * decay ** (n - 1 - k)` for layer k of n.

    Layers are ordered by first use. The leaves of a numbered module (`layer/3`, `block_3`) make a layer; what is used
    between such layers, as embeddings before them and a head after them, makes one. Stacked leaves that are used one
    after the other make as many layers as they stack, each with its own rate.

    Args:
      tuned: a tree with overlays.
      learning_rate: of the last layer: a number or a schedule.
      decay: how much slower the layer before is, in (0, 1]; 0.65 to 0.95 is usual.
      roles: what `peftjax.roles` found of the model.
      block: names the layer of a path, where the rule above does not fit; all leaves of one name are one layer.
      optimizer: makes an optimizer from a learning rate, in which its updates have to be linear.

    Returns:
      A transform over the full tree or its trainable part, as `train_only` makes it.

    Raises:
      ValueError: a decay outside (0, 1], a model of one layer, a leaf without a role, or an array of a stacked leaf
        that has no stacked axis itself.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> params = {"layer_0": {"w": jnp.ones((2, 2))}, "layer_1": {"w": jnp.ones((2, 2))}}
      >>> fn = lambda p, x: x @ p["layer_0"]["w"] @ p["layer_1"]["w"]
      >>> roles = pj.roles(fn, params, jnp.ones((1, 2)))
      >>> tuned = pj.unfreeze(".*w").init(jax.random.key(0), params, roles)
      >>> tx = pj.layerwise(tuned, 1.0, 0.5, roles, optimizer=optax.sgd)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, tuned), tx.init(tuned))
      >>> [float(x[0, 0]) for x in pj.extract(updates).values()]
      [-0.5, -1.0]

    Reference: Clark et al. 2020, arXiv 2003.10555 (ELECTRA), whose embeddings, layers and head it treats alike.
    """
    factors = rates(tuned, roles, decay, block)
    slower = optax.stateless(lambda updates, _: jax.tree.map(_slower, updates, factors))
    return train_only(optax.chain(optimizer(learning_rate), slower), tuned)


def _slower(update: Any, factor: Any) -> Any:
    return update * jnp.asarray(factor, update.dtype)
