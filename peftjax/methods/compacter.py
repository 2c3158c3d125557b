"""Compacter: adapters whose projections are sums of Kronecker products with one shared set of rules."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from peftjax.blocks import SUBLAYERS, endings
from peftjax.bottleneck import ACTIVATIONS, Bottleneck, features, placed, row
from peftjax.method import Leaf, Method, check_known, method, per_leaf
from peftjax.overlay import Ref, overlay, trained
from peftjax.paths import flatten
from peftjax.targets import Targets


@overlay
class Compacter(Bottleneck):
    """`A(z) = f(z D + d) U + u`, with D and U each `sum_i P_i (x) (L_i R_i)`; the rule P is one for all layers."""

    rule: Any = trained()
    down_left: Any = trained()
    down_right: Any = trained()
    down_bias: Any = trained()
    up_left: Any = trained()
    up_right: Any = trained()
    up_bias: Any = trained()

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """Every array has the stacked axes but the rule; the others are the overlay's own."""
        left, right = ("term", "block", "rank"), ("term", "rank", "block")
        own = {"down_left": left, "down_right": right, "up_left": left, "up_right": right}
        vectors = {"down_bias": ("bottleneck",), "up_bias": ("features",)}
        made = {name: (*self.stacked, *axes) for name, axes in (*own.items(), *vectors.items())}
        return {**super().labels(), **made, "rule": ("term", "row", "column")}

    def change(self, z: Any, site: Any) -> Any:
        """A(z)."""
        down, up = (kronecker(self.rule, *pair) for pair in self._pairs())
        inner = ACTIVATIONS[self.activation](features(z, down, site) + row(self.down_bias, z))
        return features(inner, up, site) + row(self.up_bias, z)

    def _pairs(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        return (self.down_left, self.down_right), (self.up_left, self.up_right)

    def summary(self) -> str:
        """Its place and its width."""
        return (
            f"{self.place}, bottleneck={self.down_bias.shape[-1]}" if hasattr(self.down_bias, "shape") else self.place
        )


def kronecker(rule: Any, left: Any, right: Any) -> Any:
    """`sum_i rule_i (x) (left_i right_i)`, from (n, n, n), (n, a, k) and (n, k, b): a matrix (n a, n b)."""
    n, _, columns = right.shape
    return jnp.einsum("ipq,iak,ikb->paqb", rule, left, right).reshape(n * left.shape[1], n * columns)


# Where the two sit, and after which sublayers.
KINDS = {"compacter": ("inserted", SUBLAYERS), "compacter++": ("sequential", ("feed-forward",))}


@method
def compacter(
    kind: str = "compacter",
    *,
    bottleneck: int | None = None,
    reduction: float = 32,
    terms: int = 4,
    rank: int = 1,
    activation: str = "gelu",
    targets: Targets | None = None,
    exclude: Targets = (),
    init_range: float = 1e-4,
    scale: float = 1.0,
) -> Method:
    """Adds adapters of few parameters at the end of sublayers: `A(z) = c (f(z D + d) U + u)`, with D and U each
    `sum_i P_i (x) (L_i R_i)`, i = 1..n.

    Args:
      kind: "compacter" after attention and feed-forward layers, just before the residual add, `h + A(h)`;
        "compacter++" after feed-forward layers alone, `s + A(norm(s))` of the residual sum s, as a "pfeiffer" adapter.
      bottleneck: the width m of the adapter, a multiple of n; None means F / reduction, rounded down to one, at least n.
      reduction: how much narrower than the layer's F features; 32 in the paper.
      terms: n, the number of Kronecker products, and of rows and columns of each rule; it divides F and m. 4 in the paper.
      rank: the inner size k of L_i (F/n or m/n, k) and R_i; 1 in the paper. All arrays are float32.
      activation: f, as in `peftjax.adapter`; "gelu" as in AdapterHub.
      targets: the layers, by their kernels; None means those that end the kind's sublayers.
      exclude: layers to leave out; wins over `targets`.
      init_range: the deviation of P (n, n, n) at the start, 1e-4 as in AdapterHub. L and R are drawn by Glorot's rule,
        d = u = 0: A starts near 0.
      scale: c, 1 as in the paper. `peftjax.scale` multiplies it.

    Returns:
      The method; it needs roles, and does not merge. P is one array for all layers and both projections: the first
      overlay in tree order holds it, the others refer to it.

    Raises:
      ValueError: an unknown kind or activation; terms or a rank below 1, a reduction not above 0; sizes that n does not
        divide; no roles; targets as in `peftjax.adapter`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]
      >>> params = {"up": jnp.ones((8, 8)), "down": jnp.ones((8, 8))}
      >>> apply, tuned = pj.attach(pj.compacter(bottleneck=4), fn, params, jnp.ones((1, 8)), key=jax.random.key(0))
      >>> tuned["down"], tuned["down"].rule.shape, tuned["down"].down_left.shape
      (Compacter(float32[8,8], inserted, bottleneck=4), (4, 4, 4), (4, 2, 1))

    Reference: Mahabadi et al. 2021, arXiv 2106.04647. Where we differ: as in AdapterHub, D and U share P, and
    "compacter++" reads and changes the residual sum.
    """
    check_known("compacter", kind=(kind, KINDS), activation=(activation, ACTIVATIONS))
    if terms < 1 or rank < 1 or reduction <= 0:
        raise ValueError(f"compacter: expected terms, rank >= 1 and reduction > 0, found {terms}, {rank}, {reduction}")
    place, sublayers = KINDS[kind]

    def start(key: Any, params: Any, roles: Any) -> Any:
        found = endings("compacter", params, roles, targets, exclude, sublayers, place != "inserted")
        first = next(path for path, _ in flatten(params) if path in found)
        there = Ref.above(first, dict(flatten(params))[first], "rule")

        def make(leaf: Leaf) -> Compacter:
            lead, outer = leaf.sizes("sb"), math.prod(leaf.sizes("o"))
            inner = _inner(leaf.path, outer, bottleneck, reduction, terms)
            keys = jax.random.split(leaf.key, 5)
            draw = lambda k, rows, columns: _glorot(keys[k], (*lead, terms, rows, columns))
            rule = jax.random.normal(keys[4], (terms,) * 3, jnp.float32) * init_range
            return Compacter(
                **placed("compacter", leaf, found[leaf.path], roles, place, scale),
                activation=activation,
                rule=rule if leaf.path == first else there,
                down_left=draw(0, outer // terms, rank),
                down_right=draw(1, rank, inner // terms),
                down_bias=jnp.zeros((*lead, inner), jnp.float32),
                up_left=draw(2, inner // terms, rank),
                up_right=draw(3, rank, outer // terms),
                up_bias=jnp.zeros((*lead, outer), jnp.float32),
            )

        return per_leaf(make, lambda path, _: path in found).init(key, params, roles)

    return Method(name="", options={}, start=start, identity_at_init=False)


def _inner(path: str, outer: int, bottleneck: int | None, reduction: float, terms: int) -> int:
    inner = max(1, int(outer / reduction / terms)) * terms if bottleneck is None else bottleneck
    if inner < 1 or outer % terms or inner % terms:
        raise ValueError(
            f"compacter: {terms} terms at {path}, of {outer} features and a bottleneck of {inner}; expected multiples of {terms}"
        )
    return inner


def _glorot(key: Any, shape: tuple[int, ...]) -> Any:
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
