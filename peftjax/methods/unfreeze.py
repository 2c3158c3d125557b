"""Training leaves themselves: `unfreeze`, and the sentences over it."""

from typing import Any

import jax.numpy as jnp

from peftjax.factored import Term, wide_dtype
from peftjax.method import Leaf, Method, method, per_leaf
from peftjax.overlay import Overlay, atoms, frozen, is_overlay, overlay, static, trained
from peftjax.roles import Role
from peftjax.targets import Targets


@overlay
class Full(Overlay):
    """A trained copy: `scale value + (1 - scale) W`, which is the copy while the scale is 1."""

    base: Any = frozen()
    value: Any = trained()
    scale: Any = frozen()
    axes: str = static()
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The copy has the base's axes; the scale the stacked ones."""
        return {"value": tuple((k,) for k in range(len(self.axes))), "scale": atoms(self.axes, "sb")}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The copy alone, in the base's dtype."""
        wide = self.base.astype(self.value.dtype)
        scale = self.scale.reshape([n if x in "sb" else 1 for n, x in zip(self.value.shape, self.axes)])
        return (Term(dense=(scale * self.value + (1 - scale) * wide).astype(self.base.dtype)),)


@method
def unfreeze(targets: Targets, *, exclude: Targets = ()) -> Method:
    """Trains chosen leaves themselves, whatever they are: `W' = W + dW`, all of it.

    Args:
      targets: which leaves. A head by its module's name, biases by ".*bias", everything by ".*".
      exclude: leaves to leave out; wins over `targets`.

    Returns:
      The method. The trained copy is float32, also on a bfloat16 base; the original stays as it is. A leaf that trains
      itself already, as a bias of the head does in `chain(bitfit(), head())`, goes on doing so.

    Raises:
      ValueError: a pattern that matches nothing, a leaf of integers, a leaf that already holds another overlay.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {"head": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
      >>> pj.unfreeze(".*bias").init(jax.random.key(0), params)["head"]["bias"]
      Full(float32[2])
    """
    return per_leaf(_full, targets, exclude)


def _full(leaf: Leaf) -> Full:
    if isinstance(leaf.value, Full) and leaf.value.trained_fields:
        return leaf.value
    if is_overlay(leaf.value):
        raise ValueError(
            f"unfreeze: {leaf.path} already holds {leaf.value!r}, which would act no more; exclude the leaf"
        )
    # A view of the buffer would die with it when a train step donates the trainable tree.
    return Full(
        base=leaf.value,
        value=jnp.array(leaf.value, wide_dtype(leaf.type.dtype), copy=True),
        scale=jnp.ones(leaf.sizes("sb"), jnp.float32),
        axes=leaf.axes,
    )


def bitfit() -> Method:
    """Trains the biases alone (Ben Zaken et al. 2021, arXiv 2106.10199): every leaf whose name ends in "bias".

    Example:
      >>> import peftjax as pj
      >>> pj.bitfit()
      unfreeze(targets='.*bias', exclude=())
    """
    return unfreeze(".*bias")


def full() -> Method:
    """Trains every leaf: ordinary fine-tuning, to compare with.

    Example:
      >>> import peftjax as pj
      >>> pj.full()
      unfreeze(targets='.*', exclude=())
    """
    return unfreeze(".*")


@method
def layer_norm() -> Method:
    """Trains the normalisations alone: every module with a scale and no kernel, found from roles, with its biases."""

    def start(key: Any, params: Any, roles: Any) -> Any:
        _needed(roles, "layer_norm")
        modules = {path.rpartition("/")[0] for path, role in roles.items() if role.op == "scale"}
        return unfreeze(lambda path, role: path.rpartition("/")[0] in modules).init(key, params, roles)

    return Method(name="", options={}, start=start)


@method
def head() -> Method:
    """Trains the output head: the last linear kernel, which `roles` marks, and its bias."""

    def start(key: Any, params: Any, roles: Any) -> Any:
        _needed(roles, "head")
        return unfreeze(lambda path, role: _in_head(role, roles)).init(key, params, roles)

    return Method(name="", options={}, start=start)


def _in_head(role: Role | None, roles: Any) -> bool:
    return role is not None and (
        role.head or (role.op == "bias" and role.kernel is not None and roles[role.kernel].head)
    )


@method
def last_layers(n: int) -> Method:
    """Trains the last n layers that hold a kernel, in the order in which the model runs, and prints which these are.

    A layer is a kernel's module and all in it, and the norms that run after it: their scales and biases, not the
    statistics that a batch norm keeps.

    Args:
      n: how many; at least 1.

    Raises:
      ValueError: n below 1, more layers than the model has, or no roles.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda p, x: (x @ p["up"]["kernel"] * p["norm"]["scale"]) @ p["down"]["kernel"]
      >>> params = {k: {"kernel": jnp.ones((2, 2))} for k in ("down", "up")} | {"norm": {"scale": jnp.ones((1, 2))}}
      >>> tuned = pj.last_layers(2).init(jax.random.key(0), params, pj.roles(fn, params, jnp.ones((1, 2))))
      last_layers(2): up, norm, down
      >>> deeper = pj.last_layers(1).init(jax.random.key(0), params, pj.roles(fn, params, jnp.ones((1, 2))))
      last_layers(1): down
    """
    if n < 1:
        raise ValueError(f"last_layers: expected at least 1 layer, found n={n}")

    def start(key: Any, params: Any, roles: Any) -> Any:
        _needed(roles, "last_layers")
        modules = _last(roles, n)
        print(f"last_layers({n}): {', '.join(modules)}")
        return unfreeze(lambda path, role: path.rpartition("/")[0] in modules).init(key, params, roles)

    return Method(name="", options={}, start=start)


def _last(roles: Any, n: int) -> list[str]:
    """The modules of the last n layers, in the order in which they run."""
    used = sorted((path for path in roles if roles[path].op != "unused"), key=lambda path: roles[path].order)
    module = lambda path: path.rpartition("/")[0]
    layers = list(dict.fromkeys(module(path) for path in reversed(used) if roles[path].op in ("linear", "conv")))
    if n > len(layers):
        raise ValueError(f"last_layers: n={n}, and the model has {len(layers)} layers: {', '.join(layers)}")
    chosen = set(layers[:n])
    first = min(roles[path].order for path in used if module(path) in chosen)
    norms = {module(path) for path in used if roles[path].op == "scale" and roles[path].order > first}
    return list(dict.fromkeys(module(path) for path in used if module(path) in chosen | norms))


def _needed(roles: Any, name: str) -> None:
    if roles is None:
        raise ValueError(
            f"{name} counts on what the model does with its leaves: pass `roles=peftjax.roles(fn, params, batch)`"
        )
