"""Prefix tuning: trained keys and values at virtual positions."""

import math
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from peftjax.method import Leaf, Method, chosen_leaves, laid, method
from peftjax.overlay import Ref, layers
from peftjax.prefixes import DeepPrefix, Prefix, Ranges
from peftjax.roles import Roles
from peftjax.targets import Targets, choose, closest
from peftjax.token_table import check_length

SHARED = ("embedding", "w1", "b1")
KEYS_AND_VALUES = ("key", "value", "k_proj", "v_proj", "key_proj", "value_proj", "k_lin", "v_lin", "to_k", "to_v")


@method
def prefix(
    length: int = 20,
    *,
    hidden: int | None = None,
    std: float = 0.02,
    targets: Targets = KEYS_AND_VALUES,
    exclude: Targets = (),
    features: Sequence[Sequence[int]] | None = None,
) -> Method:
    """Trains keys and values at virtual positions of every attention: `softmax(q [Pk; k]^T) [Pv; v]`.

    The model runs through `peftjax.wrap_tokens`, which inserts the virtual positions and takes their rows out again. A
    prefix acts on what a projection puts out, so a rotary embedding turns trained keys like any others.

    Args:
      length: how many virtual tokens n; P of a projection is (n, its output axes), float32. 20 serves classification;
        in P-tuning v2 sequence labelling wants up to 100.
      hidden: the width h of a network that makes the prefixes, `P = tanh(E W1 + b1) W2 + b2`, with E (n, F), W1 and b1
        one for all layers and W2 and b2 a layer's own. It steadies training; `peftjax.fold` keeps P alone afterwards.
        None trains P itself: P-tuning v2 finds that it depends on the task whether the network helps.
      std: the deviation that P starts from (with `hidden`, that W2 starts from), small: attention then starts near that
        of the model. 0 is refused, for equal rows would stay equal.
      targets: the projections of keys and values, of all self-attentions that see the tokens; by default those called
        key and value, k_proj and v_proj, and some more. Where a projection has a bias, the overlay stands on the bias.
      exclude: kernels to leave out; wins over `targets`.
      features: for a kernel that makes queries too: the ranges of its output features, joined into one axis, that are
        keys and values: `features=((D, 3 * D),)` for a fused (query, key, value).

    Returns:
      The method. It needs roles.

    Raises:
      ValueError: a length or a width below 1, an std not above 0, no roles, no projection of the usual names, a pattern
        that matches nothing, a projection that has a prefix already, ranges that overlap or end too late.

    Example:
      >>> import jax, peftjax as pj
      >>> fn = lambda p, x: jax.nn.softmax(x @ (x @ p["key"]).T) @ (x @ p["value"])
      >>> x, params = jax.numpy.ones((3, 4)), {"key": jax.numpy.ones((4, 4)), "value": jax.numpy.ones((4, 2))}
      >>> tuned = pj.prefix(5).init(jax.random.key(0), params, pj.roles(fn, params, x))
      >>> tuned["value"], tuned["value"].prefix.shape
      (Prefix(float32[4,2], length=5), (5, 2))

    Reference: Li and Liang 2021, arXiv 2101.00190; P-tuning v2, 2110.07602. HF peft stores keys as attention reads them,
    after a rotary embedding, and starts P as N(0, 1).
    """
    check_length("prefix", length)
    if hidden is not None and hidden < 1:
        raise ValueError(f"prefix: expected a hidden width of at least 1, found {hidden}")
    if not std > 0:
        raise ValueError(f"prefix: std={std}; expected more than 0: rows that start equal stay equal")
    ranges = None if features is None else tuple((int(a), int(b)) for a, b in features)
    if ranges is not None and not _apart(ranges):
        raise ValueError(
            f"prefix: features={features!r}; expected ranges (start, stop) in order, apart from each other"
        )

    def start(key: jax.Array, params: Any, roles: Roles | None) -> Any:
        sites = _sites(params, roles, targets, exclude)
        chosen = chosen_leaves(key, params, roles, lambda path, _: path in sites)

        def make(leaf: Leaf) -> Any:
            common = _common(leaf, sites[leaf.path], length, ranges)
            if hidden is None:
                shape = (*leaf.sizes("sb"), length, *_out(leaf, ranges))
                return Prefix(prefix=std * jax.random.normal(leaf.key, shape, jnp.float32), **common)
            return _deep(leaf, hidden, std, length, ranges, chosen[0].path, common)

        return laid(params, {leaf.path: make(leaf) for leaf in chosen})

    return Method(name="", options={}, start=start, identity_at_init=False)


def _apart(ranges: Sequence[tuple[int, int]]) -> bool:
    ends = [end for pair in ranges for end in pair]
    return bool(ends) and ends[0] >= 0 and all(a < b for a, b in ranges) and ends == sorted(ends)


def _sites(params: Any, roles: Roles | None, targets: Targets, exclude: Targets) -> dict[str, str | None]:
    """Where the overlays stand: on a kernel (None), or on the bias that follows it (the kernel's path)."""
    if roles is None:
        raise ValueError("prefix: only roles can tell which bias follows a projection; pass `roles=`")
    if targets == KEYS_AND_VALUES:
        names = [p.rpartition("/")[0].rpartition("/")[2] if "/" in p else p for p in roles]
        present = tuple(name for name in KEYS_AND_VALUES if name in names or name in roles)
        if not present:
            near = ", ".join(dict.fromkeys(k for name in ("key", "value") for k in closest(name, list(roles))))
            raise ValueError(
                f"prefix: no projection is called {', '.join(KEYS_AND_VALUES)}; name those of keys and values with "
                f"`targets=`; closest: {near or 'none'}"
            )
        targets = present
    kernels = choose(targets, params, roles, exclude=exclude, kernels=True)
    return {bias or path: path if bias else None for path in kernels for bias in (roles[path].bias,)}


def _out(leaf: Leaf, ranges: Ranges) -> tuple[int, ...]:
    """The sizes of the features that a prefix overwrites."""
    return leaf.sizes("o") if ranges is None else (sum(b - a for a, b in ranges),)


def _common(leaf: Leaf, kernel: str | None, length: int, ranges: Ranges) -> dict[str, Any]:
    if any(x.virtual for x in layers(leaf.value)):
        raise ValueError(f"prefix: {leaf.path} already holds {leaf.value!r}; a projection takes one prefix")
    width = math.prod(leaf.sizes("o"))
    if ranges is not None and ranges[-1][1] > width:
        raise ValueError(f"prefix: features={ranges} at {leaf.path}, which has {width} features")
    scale = jnp.ones(leaf.sizes("sb"), jnp.float32)
    return dict(base=leaf.value, scale=scale, axes=leaf.axes, length=length, features=ranges, kernel=kernel)


def _deep(leaf: Leaf, hidden: int, std: float, length: int, ranges: Ranges, first: str, common: Any) -> Any:
    """A prefix that a network makes; its shared part lives in the first one."""
    keys, lead, out = jax.random.split(leaf.key, 3), leaf.sizes("sb"), _out(leaf, ranges)
    width = math.prod(out)
    shared: dict[str, Any] = {name: Ref(first, name) for name in SHARED}
    if leaf.path == first:
        shared["embedding"] = jax.random.normal(keys[0], (length, width), jnp.float32)
        shared["w1"] = jax.random.uniform(keys[1], (width, hidden), jnp.float32, -(width**-0.5), width**-0.5)
        shared["b1"] = jnp.zeros(hidden, jnp.float32)
    w2 = std * jax.random.normal(keys[2], (*lead, hidden, *out), jnp.float32)
    return DeepPrefix(**shared, w2=w2, b2=jnp.zeros((*lead, *out), jnp.float32), **common)
