"""Sentences over `unfreeze`: biases, everything, norms, the head, the last layers."""

from typing import Any

from peftjax.copies import trained_leaves
from peftjax.method import Method, method
from peftjax.parts import last, norms, statistics
from peftjax.paths import flatten
from peftjax.roles import Roles
from peftjax.targets import Targets


@method
def bitfit() -> Method:
    """Trains the biases alone: `b' = b + db` for every leaf whose own name ends in "bias".

    Returns:
      The method, that of `peftjax.unfreeze` on these leaves. Biases that the model never uses stay out. It needs no roles.

    Raises:
      ValueError: no leaf has such a name; in Haiku they are called b, and `unfreeze(".*/b")` trains them.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2), "bias_table": {"embedding": jnp.ones((3, 2))}}
      >>> list(pj.extract(pj.bitfit().init(jax.random.key(0), params)))
      ['bias/value']

    Reference: Ben Zaken et al. 2021, arXiv 2106.10199.
    """

    def find(params: Any, roles: Roles | None) -> list[str]:
        found = [path for path, _ in flatten(params) if path.endswith("bias")]
        if not found:
            added = [path for path, role in roles.items() if role.op == "bias"] if roles is not None else []
            said = f"; by their roles, {', '.join(added[:3])} are added: name them with `unfreeze`" if added else ""
            raise ValueError(f"bitfit: the model has no leaf whose name ends in 'bias'{said}")
        return found

    return trained_leaves("bitfit", find)


@method
def full(*, exclude: Targets = ()) -> Method:
    """Trains every parameter: ordinary fine-tuning, `W' = W + dW`, to compare with.

    Args:
      exclude: leaves to leave out, such as what a model keeps of the data.

    Returns:
      The method, that of `peftjax.unfreeze` on all leaves of floating point. Integers and random keys stay as they are,
      and with roles also leaves that the model never uses, and statistics beside a norm's scale (a running mean).

    Raises:
      ValueError: no leaf is left; a leaf that already holds another overlay.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {"w": jnp.ones((4, 2)), "steps": jnp.zeros((), jnp.int32)}
      >>> pj.full().init(jax.random.key(0), params)
      {'steps': Array(0, dtype=int32), 'w': Full(float32[4,2])}
    """

    def find(params: Any, roles: Roles | None) -> list[str]:
        kept = set(statistics(roles)) if roles is not None else set()
        return [path for path, _ in flatten(params) if path not in kept]

    return trained_leaves("full", find, exclude)


@method
def layer_norm() -> Method:
    """Trains the normalisations alone: the scale g and the bias b of every `g (x - mean) / deviation + b`.

    Returns:
      The method, that of `peftjax.unfreeze` on these leaves: of every module that holds a scale and no kernel, its scales
      and biases, never the statistics of a batch norm. Where a tree has no modules, those that `Role.norm` names.

    Raises:
      ValueError: no roles, or no norm.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda p, x: jnp.tanh(x) * p["norm"]["scale"] @ p["down"]["kernel"]
      >>> params = {"norm": {"scale": jnp.ones((1, 2))}, "down": {"kernel": jnp.ones((2, 3))}}
      >>> tuned = pj.layer_norm().init(jax.random.key(0), params, pj.roles(fn, params, jnp.ones((1, 2))))
      >>> list(pj.extract(tuned))
      ['norm/scale/value']

    Reference: Zhao et al. 2023, arXiv 2312.11420.
    """

    def find(params: Any, roles: Roles | None) -> list[str]:
        if not (found := norms(_needed(roles, "layer_norm"))):
            raise ValueError(
                "layer_norm: the model has no norm that roles can tell, a module with a scale and no kernel; train its "
                "leaves by name with `unfreeze`"
            )
        return found

    return trained_leaves("layer_norm", find)


@method
def head() -> Method:
    """Trains the output head alone, `y = h W + b`: the last linear kernel, which `roles` marks, and its bias.

    Returns:
      The method, that of `peftjax.unfreeze` on these leaves.

    Raises:
      ValueError: no roles, or no head: a last kernel that adds to a residual stream is none, nor the only one there is.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
      >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}
      >>> tuned = pj.head().init(jax.random.key(0), params, pj.roles(fn, params, jnp.ones((1, 2))))
      >>> list(pj.extract(tuned))
      ['down/value']

    Reference: linear probing, Kumar et al. 2022, arXiv 2202.10054.
    """

    def find(params: Any, roles: Roles | None) -> list[str]:
        known = _needed(roles, "head")
        heads = [path for path, role in known.items() if role.head]
        if not heads:
            raise ValueError(
                "head: the model has no output head that roles can tell, a kernel that makes its output and is not the "
                "only one; train its leaves by name with `unfreeze`"
            )
        return [*heads, *(path for path, role in known.items() if role.op == "bias" and role.kernel in heads)]

    return trained_leaves("head", find)


@method
def last_layers(n: int) -> Method:
    """Trains the last n layers that hold a kernel, in the order in which the model runs, and prints which these are.

    A layer is a kernel's module and all in it (of a tree without modules, a kernel and its bias), and the norms that run
    after it: their scales and biases, not the statistics that a batch norm keeps.

    Args:
      n: how many; at least 1.

    Returns:
      The method, that of `peftjax.unfreeze` on these leaves.

    Raises:
      ValueError: n below 1, more layers than the model has, or no roles.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]["kernel"]) * p["norm"]["scale"] @ p["down"]["kernel"]
      >>> params = {k: {"kernel": jnp.ones((2, 2))} for k in ("down", "up")} | {"norm": {"scale": jnp.ones((1, 2))}}
      >>> tuned = pj.last_layers(2).init(jax.random.key(0), params, pj.roles(fn, params, jnp.ones((1, 2))))
      last_layers(2): up, norm, down
      >>> deeper = pj.last_layers(1).init(jax.random.key(0), params, pj.roles(fn, params, jnp.ones((1, 2))))
      last_layers(1): down

    Reference: Yosinski et al. 2014, arXiv 1411.1792.
    """
    if n < 1:
        raise ValueError(f"last_layers: expected at least 1 layer, found n={n}")

    def find(params: Any, roles: Roles | None) -> list[str]:
        found = last(_needed(roles, "last_layers"), n)
        print(f"last_layers({n}): {', '.join(found)}")
        return sum(found.values(), [])

    return trained_leaves("last_layers", find)


def _needed(roles: Roles | None, name: str) -> Roles:
    if roles is None:
        raise ValueError(
            f"{name} counts on what the model does with its leaves: pass `roles=peftjax.roles(fn, params, batch)`"
        )
    return roles
