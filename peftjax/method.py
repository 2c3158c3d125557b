"""A method: a small value that says which leaves of a tree become which overlays."""

import dataclasses
import functools
import inspect
import json
import zlib
from typing import Any, Callable, Collection, Mapping, ParamSpec, Sequence

import jax
import jax.numpy as jnp

from peftjax import sharding
from peftjax.flat import unique
from peftjax.options import check_options, plain
from peftjax.overlay import At, is_overlay, layers, type_of
from peftjax.paths import flatten, path_of
from peftjax.roles import Role, Roles
from peftjax.switches import still
from peftjax.targets import Targets, check_patterns, choose, needs_roles
from peftjax.tree import resolve

P = ParamSpec("P")
Init = Callable[[jax.Array, Any, Roles | None], Any]
FACTORIES: dict[str, Callable[..., "Method"]] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """What a factory such as `peftjax.lora` returns: its name, its options, and how it rewrites a tree.

    Attributes:
      name: the factory's name.
      options: the factory's arguments.
      identity_at_init: whether the tuned function equals the original exactly before training.
      penalty: `penalty(tuned) -> scalar`, added to the loss by a train step, or None.
      update: `update(tuned, grads, step) -> tuned`, run after the optimizer, or None.
      start: what `init` calls.

    A method of one's own is a function under `peftjax.method.method`, which gives the value its name and options, and
    lets `peftjax.save` write them: `load` finds it where its module has been imported. `per_leaf` lays one overlay on
    each target; how a new overlay is written, `peftjax.Overlay` shows.

    Example, trained copies that start beside the weights:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> from peftjax.copies import copied
      >>> from peftjax.method import Leaf, Method, from_dict, method, per_leaf
      >>> from peftjax.targets import Targets
      >>> @method
      ... def nearby(std: float = 0.01, *, targets: Targets = "all-linear") -> Method:
      ...     "Trains copies, `W' = W + std N(0, 1)` at first."
      ...     def make(leaf: Leaf):
      ...         full = copied(leaf)
      ...         return full.replace(value=full.value + std * jax.random.normal(leaf.key, leaf.type.shape))
      ...     return per_leaf(make, targets, identity_at_init=False)
      >>> nearby(0.1)
      nearby(std=0.1, targets='all-linear')
      >>> nearby(0.1).init(jax.random.key(0), {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)})["w"]
      Full(float32[4,2])
      >>> from_dict(nearby(0.1).to_dict()) == nearby(0.1)
      True
    """

    name: str
    options: Mapping[str, Any]
    start: Init = dataclasses.field(compare=False, repr=False)
    identity_at_init: bool = True
    penalty: Callable[[Any], Any] | None = dataclasses.field(default=None, compare=False, repr=False)
    update: Callable[[Any, Any, Any], Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    def init(self, key: jax.Array, params: Any, roles: Roles | None = None) -> Any:
        """A new tree with overlays; `params` and its buffers stay as they are.

        Args:
          key: a PRNG key; every leaf draws from it folded with the leaf's path.
          params: the pretrained tree, or one that already holds overlays.
          roles: what `peftjax.roles` found; without it only leaves of up to two axes are accepted, kernels as (in, out),
            and "all-linear" takes the output head for a kernel like others.

        Returns:
          The tuned tree.

        Raises:
          ValueError: a pattern that matches nothing, or a leaf that the method cannot tune.
        """
        return self.start(key, params, roles)

    def to_dict(self) -> dict[str, Any]:
        """The method as JSON-able values; `peftjax.method.from_dict` restores it.

        Raises:
          ValueError: an option that JSON cannot hold, such as targets by a function.
        """
        return {"name": self.name, "options": {k: _encoded(v, f"{self.name}({k}=)") for k, v in self.options.items()}}

    def __hash__(self) -> int:
        return hash((self.name, repr(sorted(self.options.items(), key=lambda kv: kv[0]))))

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


def _encoded(value: Any, where: str) -> Any:
    if isinstance(value, Method):
        return {"method": value.to_dict()}
    if isinstance(value, (list, tuple)):
        return [_encoded(v, where) for v in value]
    try:
        json.dumps(value)
    except TypeError:
        raise ValueError(
            f"{where} holds {value!r}, which cannot be saved; use patterns instead of a function"
        ) from None
    return value


def from_dict(saved: Mapping[str, Any]) -> Method:
    """The method that `to_dict` described.

    Raises:
      ValueError: an unknown method or option.

    Example:
      >>> import peftjax as pj
      >>> from_dict(pj.lora(rank=4).to_dict()) == pj.lora(rank=4)
      True
    """
    name, options = saved.get("name"), {k: _decoded(v) for k, v in dict(saved.get("options", {})).items()}
    if name not in FACTORIES:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(sorted(FACTORIES))}")
    positional = options.pop("methods", ())
    try:
        return FACTORIES[name](*positional, **options)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None


def _decoded(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"method"}:
        return from_dict(value["method"])
    return tuple(map(_decoded, value)) if isinstance(value, list) else value


def method(factory: Callable[P, Method]) -> Callable[P, Method]:
    """Makes a function a factory of methods: what it returns takes its name and arguments, and can be saved.

    Args:
      factory: a function whose options have annotations, and whose name no other factory has: the later one would take
        its place in `from_dict`. See `Method` for an example.

    Returns:
      The factory. It raises `ValueError` for an option of another type than is annotated, a number that is not finite,
      or an `alpha` of 0.
    """
    signature = inspect.signature(factory)
    kinds = {name: option.annotation for name, option in signature.parameters.items()}

    @functools.wraps(factory)
    def made(*args: P.args, **kwargs: P.kwargs) -> Method:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        check_options(factory.__name__, bound.arguments, kinds)
        options = {k: plain(v) for k, v in bound.arguments.items()}
        return dataclasses.replace(factory(*args, **kwargs), name=factory.__name__, options=options)

    FACTORIES[factory.__name__] = made
    return made


def check_known(factory: str, **options: tuple[str, Collection[str]]) -> None:
    """Raises unless each option of a factory, a pair of its value and what is known, is known."""
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{factory}: unknown {name} {value!r}; expected one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf that a method tunes: its path, its value (an array or an overlay), its axes, its own key, its role."""

    path: str
    value: Any
    axes: str
    uses: tuple[str, ...]
    key: jax.Array
    role: Role | None = None
    resolved: Callable[[], Mapping[str, Any]] | None = None  # the tree's leaves, with what their fields refer to

    @property
    def type(self) -> Any:
        """Its logical type."""
        return type_of(self.value)

    @property
    def dense(self) -> Any:
        """Its dense value: the array, or that which the overlays on it stand for."""
        value = self.resolved()[self.path] if self.resolved and is_overlay(self.value) else self.value
        return jnp.asarray(still(value))

    @property
    def unclear(self) -> str:
        """What made the kind of an axis unclear, if anything did."""
        return self.role.unclear if self.role is not None else ""

    def sizes(self, letters: str) -> tuple[int, ...]:
        """The sizes of its axes with these letters."""
        return tuple(n for n, x in zip(self.type.shape, self.axes) if x in letters)


def per_leaf(
    make: Callable[[Leaf], Any],
    targets: Targets,
    exclude: Targets = (),
    identity_at_init: bool = True,
    patterns: Sequence[str] = (),
    kernels: bool = False,
) -> Method:
    """A method that puts `make(leaf)` in the place of every chosen leaf.

    Args:
      make: the overlay of one leaf.
      targets, exclude: which leaves, as `peftjax.targets.choose` reads them.
      identity_at_init: whether the overlays change nothing before training, exactly.
      patterns: further patterns over the chosen paths, each of which has to match one.
      kernels: whether only kernels are wanted: a module's name then stands for its kernel.

    Returns:
      The method, without a name until a factory under `method` returns it.
    """

    def start(key: jax.Array, params: Any, roles: Roles | None) -> Any:
        chosen = chosen_leaves(key, params, roles, targets, exclude, patterns, kernels)
        return laid(params, {leaf.path: make(leaf) for leaf in chosen})

    return Method(name="", options={}, start=start, identity_at_init=identity_at_init)


def chosen_leaves(
    key: jax.Array,
    params: Any,
    roles: Roles | None,
    targets: Targets,
    exclude: Targets = (),
    patterns: Sequence[str] = (),
    kernels: bool = False,
) -> list[Leaf]:
    """The leaves that a method tunes, in tree order, for methods whose overlays depend on each other.

    Args:
      key, params, roles: what `Method.init` was given.
      targets, exclude, patterns, kernels: as in `per_leaf`.
    """
    named = flatten(params)
    taken = [path for path, x in named if any(o.trained_fields for o in layers(x))]
    chosen = set(choose(targets, params, roles, exclude=exclude, taken=taken, kernels=kernels))
    check_patterns(patterns, [path for path, _ in named if path in chosen])
    resolved = functools.cache(lambda: dict(flatten(resolve(params))))
    made = lambda path, x: dataclasses.replace(_leaf(path, x, roles, key), resolved=resolved)
    return list(unique((path, made(path, x)) for path, x in named if path in chosen).values())


def check_alone(name: str, leaf: Leaf, kind: type) -> None:
    """Raises if the leaf trains an overlay of this kind already."""
    if any(isinstance(x, kind) and x.trained_fields for x in layers(leaf.value)):
        raise ValueError(
            f"{name}: {leaf.path} already holds {leaf.value!r}, which trains; `peftjax.lock` the tree to put a new one on "
            "it, or leave the leaf out with `exclude`"
        )


def laid(params: Any, overlays: Mapping[str, Any]) -> Any:
    """The tree with overlays at these paths; their fields lie as their bases do."""

    def placed(key_path: Any, value: Any) -> Any:
        path = path_of(key_path)
        return sharding.placed(overlays[path].replace(laid_at=At(path))) if path in overlays else value

    return jax.tree_util.tree_map_with_path(placed, params, is_leaf=is_overlay)


def _leaf(path: str, value: Any, roles: Roles | None, key: jax.Array) -> Leaf:
    kind = type_of(value)
    if not jnp.issubdtype(kind.dtype, jnp.floating):
        raise ValueError(f"{path} is {kind.dtype}{list(kind.shape)}; expected floating point: integers do not train")
    role = roles[path] if roles is not None and path in roles else None
    if roles is not None and role is None:
        raise ValueError(f"{path} is not among the roles; they were taken of another tree")
    if role is not None and len(role.axes) != len(kind.shape):
        raise ValueError(
            f"{path} is {kind.str_short()}, and the roles say axes {role.axes!r}; expected the roles of this very tree"
        )
    if role is None and len(kind.shape) > 2:
        raise ValueError(needs_roles(path, kind))
    axes = role.axes if role is not None else {0: "", 1: "o", 2: "io"}[len(kind.shape)]
    depth = sum(1 for _ in layers(value))
    own = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), depth)
    return Leaf(path, value, axes, role.uses if role is not None else (), own, role)


@method
def chain(*methods: Method) -> Method:
    """Applies methods one after the other: each sees the tree that the one before it made.

    Args:
      *methods: from the inside out; a later one leaves out what an earlier one trains, unless its targets name it.

    Returns:
      The method; its penalty is the sum of theirs, its update runs theirs in turn.

    Raises:
      ValueError: no methods; at `init`, what each of them raises on the tree before it.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {"body": jnp.ones((4, 4)), "head": jnp.ones((4, 2))}
      >>> pj.chain(pj.unfreeze("head"), pj.lora(rank=2)).init(jax.random.key(0), params)
      {'body': LoRA(float32[4,4], rank=2), 'head': Full(float32[4,2])}
    """
    if not methods:
        raise ValueError("chain: expected at least one method")
    penalties = [m.penalty for m in methods if m.penalty]
    updates = [m.update for m in methods if m.update]

    def start(key: jax.Array, params: Any, roles: Roles | None) -> Any:
        return functools.reduce(lambda tree, m: m.init(key, tree, roles), methods, params)

    def update(tuned: Any, grads: Any, step: Any) -> Any:
        return functools.reduce(lambda tree, u: u(tree, grads, step), updates, tuned)

    return Method(
        name="",
        options={},
        start=start,
        identity_at_init=all(m.identity_at_init for m in methods),
        penalty=(lambda tuned: sum(p(tuned) for p in penalties)) if penalties else None,
        update=update if updates else None,
    )
