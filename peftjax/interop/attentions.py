"""The attentions of a model, by the torch names of their projections: where keys and values are made, layer by layer."""

import math
import re
from typing import NamedTuple

from peftjax.interop.base import Base
from peftjax.interop.layout import outputs
from peftjax.interop.names import Spot

PAIRS = dict(
    [
        ("key", "value"),
        ("k_proj", "v_proj"),
        ("k", "v"),
        ("key_proj", "value_proj"),
        ("k_lin", "v_lin"),
        ("to_k", "to_v"),
    ]
)
FUSED = "c_attn"  # GPT-2's queries, keys and values, one after the other
CROSS = ("EncDecAttention", "encoder_attn", "crossattention")


class Layer(NamedTuple):
    """One attention: its key and value kernels, or the one kernel of queries, keys and values."""

    kernels: tuple[Spot, ...]

    @property
    def fused(self) -> bool:
        """Whether one kernel makes all."""
        return len(self.kernels) == 1

    @property
    def width(self) -> int:
        """The features of its keys."""
        spot = self.kernels[0]
        return math.prod(spot.shape[k] for k in outputs(spot)) // (3 if self.fused else 1)

    @property
    def heads(self) -> int | None:
        """How many heads its keys have, where the kernel has an axis for them."""
        spot, axes = self.kernels[0], outputs(self.kernels[0])
        return spot.shape[axes[0]] if len(axes) > 1 else None

    @property
    def homes(self) -> tuple[tuple[str, ...], ...]:
        """Of each kernel, the paths where a prefix of it may stand: its bias, and itself."""
        return tuple(tuple(p for p in (spot.role.bias, spot.path) if p is not None) for spot in self.kernels)


def attentions(base: Base) -> tuple[list[Layer], bool]:
    """The attentions that peft's prefixes act on, in the order of layers; and whether the model has an encoder beside.

    Raises:
      ValueError: none has a usual name, or their numbers do not tell which layer each is.
    """
    found = {}
    kernels = {spot.module: spot for spot in base.spots.values() if spot.is_kernel and spot.role.op == "linear"}
    for module, spot in kernels.items():
        around, _, last = module.rpartition(".")
        if last == FUSED:
            found[around] = Layer((spot,))
        elif last in PAIRS and (value := kernels.get(f"{around}.{PAIRS[last]}" if around else PAIRS[last])):
            found[around] = Layer((spot, value))
    if not found:
        raise ValueError(
            f"no projections are called {', '.join(f'{k} and {v}' for k, v in PAIRS.items())}, or {FUSED}: does `names` "
            "map this model's leaves to the torch names?"
        )
    sides = {around: [w for w in around.split(".") if w in ("encoder", "decoder")][-1:] for around in found}
    both = {"encoder", "decoder"} == {w for side in sides.values() for w in side}
    if both:
        crosses = lambda around: any(word in CROSS for word in around.split("."))
        found = {a: x for a, x in found.items() if sides[a] == ["decoder"] and not crosses(a)}
    numbers = {around: tuple(map(int, re.findall(r"\d+", around))) for around in found}
    if len(set(numbers.values())) < len(found):
        raise ValueError(f"which layers are {', '.join(found)}? Expected a number of its own in the name of each")
    return [found[around] for around in sorted(found, key=lambda a: numbers[a])], both
