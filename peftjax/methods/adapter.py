"""Bottleneck adapters: a small network beside the end of each sublayer."""

import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from peftjax.blocks import SUBLAYERS, endings
from peftjax.bottleneck import ACTIVATIONS, Bottleneck, features, placed, row, width
from peftjax.method import Leaf, Method, check_known, method, per_leaf
from peftjax.overlay import overlay, trained
from peftjax.targets import Targets


@overlay
class Adapter(Bottleneck):
    """`A(z) = f(z D + d) U + u`, times the gate where it has one; D is (F, m), U (m, F), for F features and m of its own."""

    down: Any = trained()
    down_bias: Any = trained()
    up: Any = trained()
    up_bias: Any = trained()
    gate: Any = trained(default=None)

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """Every array has the stacked axes; the others are the adapter's own."""
        own = {
            "down": ("features", "bottleneck"),
            "down_bias": ("bottleneck",),
            "up": ("bottleneck", "features"),
            "up_bias": ("features",),
            "gate": (),
        }
        return {**super().labels(), **{name: (*self.stacked, *axes) for name, axes in own.items()}}

    def change(self, z: Any, site: Any) -> Any:
        """A(z)."""
        inner = ACTIVATIONS[self.activation](features(z, self.down, site) + row(self.down_bias, z))
        a = features(inner, self.up, site) + row(self.up_bias, z)
        return a if self.gate is None else a * self.gate.astype(a.dtype)

    def summary(self) -> str:
        """Its place and its width."""
        return (
            f"{self.place}, bottleneck={self.down_bias.shape[-1]}" if hasattr(self.down_bias, "shape") else self.place
        )


class Kind(NamedTuple):
    """Where a kind of adapter sits, after which sublayers, its scale, and whether that is trained too."""

    place: str
    sublayers: tuple[str, ...]
    scale: float = 1.0
    gated: bool = False


KINDS = {
    "houlsby": Kind("inserted", SUBLAYERS),
    "pfeiffer": Kind("sequential", ("feed-forward",)),
    "parallel": Kind("parallel", ("feed-forward",), 4.0),
    "scaled_parallel": Kind("parallel", ("feed-forward",), gated=True),
}


def _exact(key: Any, down: tuple[int, ...], up: tuple[int, ...]) -> tuple[Any, Any]:
    bound = 1 / math.sqrt(down[-2])
    return jax.random.uniform(key, down, jnp.float32, -bound, bound), jnp.zeros(up, jnp.float32)


def _drawn(draw: Callable[..., Any], deviation: float) -> Callable[..., tuple[Any, Any]]:
    def init(key: Any, down: tuple[int, ...], up: tuple[int, ...]) -> tuple[Any, Any]:
        keys = jax.random.split(key)
        return draw(keys[0], down) * deviation, draw(keys[1], up) * deviation

    return init


INITS: dict[str, Callable[[Any, tuple[int, ...], tuple[int, ...]], tuple[Any, Any]]] = {
    "exact": _exact,
    "near": _drawn(lambda key, shape: jax.random.truncated_normal(key, -2, 2, shape, jnp.float32), 1e-2),
    "bert": _drawn(lambda key, shape: jax.random.normal(key, shape, jnp.float32), 2e-2),
}


@method
def adapter(
    kind: str = "pfeiffer",
    *,
    bottleneck: int | None = None,
    reduction: float = 16,
    activation: str = "relu",
    targets: Targets | None = None,
    exclude: Targets = (),
    init: str = "exact",
    scale: float | None = None,
) -> Method:
    """Adds a small network at the end of sublayers: `A(z) = c (f(z D + d) U + u)`, with h the sublayer's output, r the
    residual stream, s = h + r: "houlsby" `h + A(h)`, "pfeiffer" `s + A(norm(s))`, both "parallel" kinds `s + A(r)`.

    Args:
      kind: "houlsby" after attention and feed-forward layers, just before the residual add; "pfeiffer" after
        feed-forward layers alone, half the parameters for about the same quality, reading the sum, through the norm that
        follows it in a post-LN block (its arrays are those of the tree, trained or not); "parallel" and
        "scaled_parallel" beside feed-forward layers, reading the stream that enters the sum. "scaled_parallel" trains
        its scale, one number an adapter, from 1.
      bottleneck: the width m of D (F, m) and U (m, F), both float32; None means F / reduction, at least 1.
      reduction: how much narrower than the layer's F features; 16, AdapterHub's for the serial kinds. Its parallel kinds
        take 2, which is not the default here.
      activation: f: "relu", "gelu", "gelu_tanh", "swish", "tanh", "leaky_relu", "sigmoid" or "identity". "relu" as in
        AdapterHub, but for its Houlsby adapters, which take "swish".
      targets: the layers, by their kernels; None means those that end the kind's sublayers. Layers whose outputs meet no
        residual add can have a "houlsby" adapter, which then acts on the output itself.
      exclude: layers to leave out; wins over `targets`.
      init: "exact" (D uniform in +-1/sqrt(F), U = 0: nothing changes at first, He et al.), "near" (D and U of deviation
        0.01, cut at two deviations: nearly nothing, Houlsby et al.) or "bert" (of deviation 0.02, AdapterHub). d, u = 0.
      scale: c, beside the one that "scaled_parallel" trains; None means 4 for "parallel" (He et al.), else 1.
        `peftjax.scale` multiplies it.

    Returns:
      The method; it needs roles. It does not merge: keep `wrap`, or set it aside by `peftjax.disable`. To train the
      norms too, as Houlsby et al. do: `chain(adapter("houlsby"), layer_norm())`.

    Raises:
      ValueError: an unknown kind, activation or init; a bottleneck below 1 or a reduction not above 0; no roles; a target
        that is no kernel, or whose output never meets the residual stream; no sublayer of the kind; for "pfeiffer", a
        norm after the sum that roles could not read.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]
      >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> apply, tuned = pj.attach(pj.adapter(bottleneck=2), fn, params, jnp.ones((1, 4)), key=jax.random.key(0))
      >>> tuned["down"], tuned["down"].down.shape
      (Adapter(float32[8,4], sequential, bottleneck=2), (4, 2))

    Reference: Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, 2005.00247; He et al. 2021, 2110.04366.
    Where we differ: as in AdapterHub, the parallel kinds of a pre-LN block read the stream before its norm.
    """
    check_known("adapter", kind=(kind, KINDS), activation=(activation, ACTIVATIONS), init=(init, INITS))
    if reduction <= 0 or bottleneck is not None and bottleneck < 1:
        raise ValueError(f"adapter: expected bottleneck >= 1 and reduction > 0, found {bottleneck} and {reduction}")
    made = KINDS[kind]

    def start(key: Any, params: Any, roles: Any) -> Any:
        found = endings("adapter", params, roles, targets, exclude, made.sublayers, made.place != "inserted")

        def make(leaf: Leaf) -> Adapter:
            inner = width(leaf, bottleneck, reduction)
            lead = leaf.sizes("sb")
            outer = math.prod(leaf.sizes("o"))
            down, up = INITS[init](leaf.key, (*lead, outer, inner), (*lead, inner, outer))
            return Adapter(
                **placed("adapter", leaf, found[leaf.path], roles, made.place, made.scale if scale is None else scale),
                activation=activation,
                down=down,
                down_bias=jnp.zeros((*lead, inner), jnp.float32),
                up=up,
                up_bias=jnp.zeros((*lead, outer), jnp.float32),
                gate=jnp.ones(lead, jnp.float32) if made.gated else None,
            )

        return per_leaf(make, lambda path, _: path in found).init(key, params, roles)

    return Method(name="", options={}, start=start, identity_at_init=init == "exact")
