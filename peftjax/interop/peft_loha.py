"""LoHa as Hugging Face peft saves it."""

import functools
from typing import Any, Iterator, Sequence

from peftjax.interop import lycoris
from peftjax.interop.base import Base
from peftjax.interop.formats import Format, Options, Tuned, copies, scale_at, trained_whole
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part
from peftjax.method import Method
from peftjax.methods.loha import LoHa, loha


def method(options: Options, base: Base) -> list[Method]:
    """LoHa on the target modules, and training of the modules to save."""
    kernels = base.kernels(options)
    for spot in kernels:
        lycoris.check(spot, "LoHa")
        if options["use_effective_conv2d"] and lycoris.wide(spot):
            raise ValueError(
                f"use_effective_conv2d factors the window of {spot.module} by itself (hada_t1, hada_t2), which is not "
                "in peftjax; linear layers and 1 x 1 convolutions are read either way"
            )
    return [
        *lycoris.grouped(options, kernels, base, functools.partial(loha, any_rank=True)),
        *trained_whole(options, base, kernels),
    ]


def parts(x: LoHa, spot: Spot) -> Iterator[Part]:
    """w1_a and w2_a are (out, r), w1_b and w2_b (r, in); a convolution's inputs are its channels and its window."""
    lycoris.check(spot, "LoHa")
    for k in "12":
        yield Part(f"w{k}a", spot.of_module(f"hada_w{k}_a"), ("o", "rank"))
        yield Part(f"w{k}b", spot.of_module(f"hada_w{k}_b"), ("rank", "i"))


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these updates."""
    rank = lambda x: x.w1a.shape[x.labels()["w1a"].index("rank")]
    found = [(spot.module, rank(x), scale_at(x, spot)) for _, x, spots in tuned for spot in spots]
    return {**lycoris.page(found, base), "peft_type": "LOHA"}


FORMAT = Format(options=lycoris.OPTIONS, method=method, parts={LoHa: parts}, page=page, beside=copies)
