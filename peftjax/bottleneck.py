"""Bottlenecks beside a layer's output: where their input is read, where their output is added, and with what norm."""

import math
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp

from peftjax.blocks import Ending
from peftjax.factored import product, wide_dtype
from peftjax.method import Leaf
from peftjax.overlay import Output, Ref, atoms, frozen, overlay, static
from peftjax.roles import Roles

ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


@overlay
class Bottleneck(Output):
    """What bottlenecks share. With h the layer's output, r the residual stream that it is added to, and s = h + r:

    "inserted" is `h + A(h)` before the add, "sequential" `s + A(s)`, or `s + A(norm(s))` where a norm follows the sum,
    and "parallel" `s + A(r)`. A is `change`, scaled. Under a second one, h is what the first one made of it: two
    sequential ones give `s1 = s + A1(norm(s))`, then `s1 + A2(norm(s1))`.
    """

    base: Any = frozen()
    scale: Any = frozen()
    norm_scale: Any = frozen(default=None)
    norm_bias: Any = frozen(default=None)
    place: str = static()
    activation: str = static(default="relu")
    eps: float | None = static(default=None)
    centred: bool = static(default=True)
    offset: float = static(default=0.0)
    axes: str = static()
    norm_axes: tuple[Any, ...] = static(default=())
    kernel: str | None = static(default=None)
    where: str = static(default="output")
    locked: tuple[str, ...] = static(default=())

    @property
    def stacked(self) -> tuple[tuple[int, ...], ...]:
        """The axes of the base along which layers or experts lie, each with its own bottleneck."""
        return atoms(self.axes, "sb")

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The scale has the stacked axes, and the norm's arrays the norm's own."""
        return {"scale": self.stacked, "norm_scale": self.norm_axes, "norm_bias": self.norm_axes}

    def change(self, z: Any, site: Any) -> Any:
        """A(z), unscaled, of what the bottleneck reads."""
        raise NotImplementedError(f"{type(self).__name__}.change")

    def on_output(self, y: Any, site: Any) -> Any:
        """The layer's output and the change made of it."""
        return y + self._scaled(y, site)

    def on_residual(self, h: Any, r: Any, site: Any) -> Any:
        """The layer's output and the change, made of what `place` says."""
        if self.place == "inserted":
            return self.on_output(h, site)
        return h + self._scaled(r if self.place == "parallel" else self._normalised(h + r), site)

    def _scaled(self, z: Any, site: Any) -> Any:
        return self.change(z, site) * self.scale.astype(z.dtype)

    def _normalised(self, s: Any) -> Any:
        """What the norm that follows makes of the sum; the sum where none does."""
        if self.eps is None:
            return s
        x = s.astype(wide_dtype(s.dtype))
        x = x - x.mean(-1, keepdims=True) if self.centred else x
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        x = x if self.norm_scale is None else x * (self.offset + row(self.norm_scale, x))
        x = x if self.norm_bias is None else x + row(self.norm_bias, x)
        return x.astype(s.dtype)


def row(vector: Any, like: Any) -> Any:
    """A vector of features, to meet an array whose last axis they are."""
    return jnp.expand_dims(vector.astype(like.dtype), tuple(range(like.ndim - 1)))


def features(x: Any, w: Any, site: Any) -> Any:
    """`x w` over the last axis of x, in x's dtype; at a site of experts, that of one of them."""
    rest = tuple(("x", k) for k in range(x.ndim - 1))
    return product(x, w, (*rest, "in"), ("in", "out"), (*rest, "out"), batched=bool(site.batch))


def width(leaf: Leaf, bottleneck: int | None, reduction: float) -> int:
    """How many features the bottleneck at a layer's end has."""
    return max(1, int(math.prod(leaf.sizes("o")) / reduction)) if bottleneck is None else bottleneck


def placed(method: str, leaf: Leaf, ending: Ending, roles: Roles, place: str, scale: float) -> dict[str, Any]:
    """The fields that every bottleneck has, at one layer's end.

    Raises:
      ValueError: what follows the sum is a norm that roles could not read, or whose arrays are not the layer's, layer
        for layer.
    """
    if place == "sequential" and ending.role.unread:
        raise ValueError(
            f"{method}: all that reads the residual sum after {ending.kernel} looks like a norm, but none that is known: a "
            "layer norm or an RMS norm over the layer's features, with or without a bias, that multiplies by its scale w "
            'or by 1 + w. What would the adapter read? Expected such a norm, a kind that acts before the sum ("houlsby" '
            'or "parallel"), or the layer among `exclude`'
        )
    norm = ending.role.norm if place == "sequential" else None
    fields: dict[str, Any] = {}
    if norm is not None:
        paths = [path for path in (norm.scale, norm.bias) if path is not None]
        fields["norm_axes"] = _norm_axes(method, leaf, paths, roles)
        fields |= {"norm_scale": norm.scale and Ref(norm.scale), "norm_bias": norm.bias and Ref(norm.bias)}
        fields |= {"eps": norm.eps, "centred": norm.centred, "offset": norm.offset}
    return dict(
        base=leaf.value,
        scale=jnp.full(leaf.sizes("sb"), scale, jnp.float32),
        place=place,
        axes=leaf.axes,
        kernel=ending.of,
        where="residual" if ending.role.residual else "output",
        **fields,
    )


def _norm_axes(method: str, leaf: Leaf, paths: list[str], roles: Roles) -> tuple[Any, ...]:
    """The axes of a norm's arrays: those of stacked layers are the base's, the other one is the features."""
    found = {path: roles[path].axes for path in paths}
    if not found:
        return ()
    axes = next(iter(found.values()))
    same = all(a == axes for a in found.values())
    stacked = {letter: [k for k, x in enumerate(leaf.axes) if x == letter] for letter in "sb"}
    if not same or axes.count("o") != 1 or any(axes.count(x) > len(at) for x, at in stacked.items()):
        raise ValueError(
            f"{method}: the norm after {leaf.path} (axes {leaf.axes!r}) has {found}; expected one axis of features, and "
            "else the axes along which the layer itself is stacked"
        )
    places = {letter: iter(at) for letter, at in stacked.items()}
    return tuple("features" if x == "o" else (next(places[x]),) for x in axes)
