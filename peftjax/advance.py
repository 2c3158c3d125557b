"""The arithmetic of one train step: gradients over the parts of a batch, the optimizer, and a method's own hooks."""

import dataclasses
import inspect
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from peftjax.method import Method
from peftjax.microbatches import split
from peftjax.overlay import short
from peftjax.switches import with_key
from peftjax.tree import combine, partition

Apply = Callable[..., Any]
Loss = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
Sums = dict[str, Any]
OWN = {"loss", "grad_norm", "skipped"}  # metrics of a step that no loss gives


def advance(
    apply: Apply,
    loss: Loss,
    tx: optax.GradientTransformation,
    method: Method | None,
    parts: int,
    moving: Any,
    frozen: Any,
    batch: Any,
) -> tuple[Any, Any, Sums]:
    """One step of `peftjax.make_train_step`, whose arguments the first ones are.

    Args:
      moving: the `TrainState` without its frozen part.
      frozen: that part.
      batch: the batch, in `parts` parts.

    Returns:
      The next state without its frozen part, what the method has changed of that part (None for the rest), and the
      metrics.
    """
    key = None if moving.key is None else jax.random.fold_in(moving.key, moving.step)
    run = jax.value_and_grad(_total(apply, loss, frozen), has_aux=True)
    sums, grads, model_state = _gradients(run, moving, batch, parts, key)
    weight = sums.pop("weight")
    by = jnp.where(weight == 0, 1, weight)
    grads = jax.tree.map(lambda g: g / by.astype(g.dtype), grads)
    metrics = {name: value / by for name, value in sums.items()}
    if method is not None and (penalty := method.penalty) is not None:
        value, more = jax.value_and_grad(lambda t: penalty(combine(t, frozen)))(moving.trainable)
        metrics["loss"], grads = metrics["loss"] + value, jax.tree.map(jnp.add, grads, more)
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, moving.opt_state, moving.trainable)
    fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    trainable, changed = _updated(method, optax.apply_updates(moving.trainable, updates), frozen, grads, moving.step)
    learns = fine & (weight != 0)

    keep = lambda new, old: jax.tree.map(
        lambda x, y: None if x is None else jnp.where(learns, x, y), new, old, is_leaf=_none
    )
    after = dataclasses.replace(
        moving,
        step=moving.step + 1,
        trainable=keep(trainable, moving.trainable),
        opt_state=keep(opt_state, moving.opt_state),
        model_state=keep(model_state, moving.model_state),
        skipped=moving.skipped + jnp.where(fine, 0, 1),
        failing=jnp.where(fine, 0, moving.failing + 1),
    )
    return after, keep(changed, frozen), {**metrics, "grad_norm": norm, "weight": weight, "skipped": after.skipped}


def _none(x: Any) -> bool:
    return x is None


def _total(apply: Apply, loss: Loss, frozen: Any) -> Callable[..., Any]:
    """The loss of one part of a batch, by what trains; beside it the sums, and the model's state after it."""

    def total(trainable: Any, model_state: Any, part: Any, key: Any) -> Any:
        model, adapters = (None, None) if key is None else jax.random.split(key)
        tuned = combine(trainable, frozen) if key is None else with_key(combine(trainable, frozen), adapters)
        given = {"key": model, "model_state": model_state}
        given = {name: x for name, x in given.items() if x is not None}
        _check_takes(apply, given)
        out, after = apply(tuned, part, **given), None
        if model_state is not None:
            out, after = _pair(out, "apply", "(outputs, model_state), for the state has a model state")
            _check_same(after, model_state)
        value, aux = _pair(loss(out, part), "loss", "(value, aux)")
        if not isinstance(aux, Mapping):
            raise TypeError(f"loss returned {type(aux).__name__} as aux; expected a dictionary, {{}} for none")
        if taken := OWN & set(aux):
            raise ValueError(f"loss: aux holds {min(taken)!r}, which a step's own metrics have; expected another name")
        sums = {"weight": 1.0, **aux, "loss": value}
        return value, (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sums), after)

    return total


def _pair(found: Any, name: str, expected: str) -> tuple[Any, Any]:
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return found[0], found[1]
    what = f"a sequence of {len(found)}" if isinstance(found, (tuple, list)) else f"one {type(found).__name__}"
    raise TypeError(f"{name} returned {what}; expected {expected}")


def _check_same(after: Any, before: Any) -> None:
    """Raises unless a model's state is of the structure and the shapes that it had."""
    named = lambda tree: {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    new, old = named(after), named(before)
    for path in (*old, *new):
        found, expected = (short(tree[path]) if path in tree else "nothing" for tree in (new, old))
        if found != expected:
            raise ValueError(f"apply returned a model state with {found} at {path}; expected {expected}, as given")
    found, expected = (str(jax.tree.structure(tree)) for tree in (after, before))
    if found != expected:
        raise ValueError(f"apply returned a model state of the structure {found}; expected {expected}, as given")


def _check_takes(apply: Apply, given: Mapping[str, Any]) -> None:
    """Raises unless the function takes these keywords, as far as its signature can tell."""
    try:
        options = inspect.signature(apply).parameters.values()
    except (TypeError, ValueError):  # a function that tells nothing of its arguments
        return
    named = {o.name for o in options if o.kind in (o.POSITIONAL_OR_KEYWORD, o.KEYWORD_ONLY)}
    lacking = [name for name in given if name not in named]
    if lacking and not any(o.kind is o.VAR_KEYWORD for o in options):
        raise TypeError(
            f"apply takes ({', '.join(o.name for o in options)}) and no `{lacking[0]}=`, which a step gives it, for the "
            f"state has {'a key' if lacking[0] == 'key' else 'a model state'}; expected "
            f"`apply(tuned, batch, {', '.join(given)})`, also where the model has no use for it"
        )


def _gradients(run: Callable[..., Any], moving: Any, batch: Any, parts: int, key: Any) -> tuple[Sums, Any, Any]:
    """The sums over the parts of a batch, of the loss and what goes with it and of the gradients; the model's state."""
    if parts == 1:
        (_, (sums, model_state)), grads = run(moving.trainable, moving.model_state, batch, key)
        return sums, grads, model_state

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        number, sums, grads, model_state = carry
        own = None if key is None else jax.random.fold_in(key, number)
        (_, (more, model_state)), extra = run(moving.trainable, model_state, part, own)
        return (number + 1, *jax.tree.map(jnp.add, (sums, grads), (more, extra)), model_state), None

    batches = split(batch, parts)
    first = jax.tree.map(lambda x: x[0], batches)
    (_, (shapes, _)), _ = jax.eval_shape(run, moving.trainable, moving.model_state, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = (jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, moving.trainable), moving.model_state)
    (_, sums, grads, model_state), _ = jax.lax.scan(add, start, batches)
    return sums, grads, model_state


def _updated(method: Method | None, trainable: Any, frozen: Any, grads: Any, step: Any) -> tuple[Any, Any]:
    """What trains and, of the frozen part, what the method's own update has changed; None for the rest."""
    if method is None or method.update is None:
        return trainable, jax.tree.map(lambda _: None, frozen)
    trainable, after = partition(method.update(combine(trainable, frozen), grads, step))
    return trainable, jax.tree.map(lambda new, old: None if new is old else new, after, frozen)
