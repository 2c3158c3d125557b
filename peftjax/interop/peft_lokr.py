"""LoKr as Hugging Face peft saves it."""

import functools
import math
from typing import Any, Iterator, Sequence

from peftjax.interop import config, lycoris
from peftjax.interop.base import Base
from peftjax.interop.formats import Format, Options, Tuned, copies, scale_at, trained_whole
from peftjax.interop.layout import window
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part, constant
from peftjax.lowrank import factorization
from peftjax.method import Method
from peftjax.methods.lokr import RANK, RANK1, READ, K, L, LoKr, M, N, lokr

OPTIONS = {
    **lycoris.OPTIONS,
    "decompose_both": config.flag(False),
    "decompose_factor": config.Option(
        -1, lambda x: config.is_whole(x) and (x == -1 or x > 0), "a positive integer, or -1"
    ),
    "rank_dropout_scale": config.flag(False),
}


def method(options: Options, base: Base) -> list[Method]:
    """LoKr on the target modules, and training of the modules to save."""
    kernels = base.kernels(options)
    for spot in kernels:
        lycoris.check(spot, "LoKr")
    factor = options["decompose_factor"]
    make = functools.partial(
        lokr, factor=factor, decompose_both=options["decompose_both"], tucker=options["use_effective_conv2d"]
    )
    made = lycoris.grouped(options, kernels, base, make, lambda spot, rank: {"outer": outer(spot, rank, factor)})
    return [*made, *trained_whole(options, base, kernels)]


def outer(spot: Spot, rank: int, factor: int) -> str:
    """The matrix with the outer index: w2 where it is whole and has a window of one axis, which peft multiplies first."""
    size = lambda letter: math.prod(
        n for k, n in enumerate(spot.shape) if spot.role.axes[k] == letter and k not in window(spot)
    )
    whole = rank >= max(factorization(size(letter), factor)[1] for letter in "io") / 2
    return "w2" if whole and len(window(spot)) == 1 else "w1"


def parts(x: LoKr, spot: Spot) -> Iterator[Part]:
    """w1 (l, m) or w1_a (l, r) and w1_b (r, m); w2 (k, n, window) or w2_a (k, r) and w2_b (r, n and window).

    Around a core t2 (r, r, window), which has two axes for a window of one too, w2_a is (r, k) and w2_b (r, n).
    """
    lycoris.check(spot, "LoKr")
    axis = [1] if len(window(spot)) == 1 else []
    orders: dict[str, Sequence[Any]] = {"w1": (L, M), "w1a": (L, RANK1), "w1b": (RANK1, M), "w2": (K, N, "x")}
    if x.tucker:
        orders |= {"w2a": (RANK, K), "w2b": (READ, N), "t2": (RANK, READ, "x", *axis)}
    else:
        orders |= {"w2a": (K, RANK), "w2b": (RANK, [N, "x"])}
    names = {"w1a": "w1_a", "w1b": "w1_b", "w2a": "w2_a", "w2b": "w2_b"}
    for field, order in orders.items():
        if getattr(x, field) is not None:
            yield Part(field, spot.of_module(f"lokr_{names.get(field, field)}"), order)


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these updates."""
    held = [(x, spot) for _, x, spots in tuned for spot in spots]
    for x, spot in held:
        if x.outer != (wanted := outer(spot, x.rank, x.factor)):
            raise ValueError(
                f"{spot.module} has the outer index of its product in {x.outer}, and peft has it there in {wanted}: "
                f"use peftjax.lokr(outer={wanted!r}) for it"
            )
    factors = [x for x, spot in held if x.w2 is None and lycoris.wide(spot)]
    both = [x.w1 is None for x, _ in held if x.rank < max(_sides(x)) / 2]
    return {
        **lycoris.page([(spot.module, x.rank, scale_at(x, spot)) for x, spot in held], base),
        "decompose_factor": constant((x.factor for x, _ in held), "the factors that axes are cut by"),
        "decompose_both": constant(both or [False], "whole and low-rank w1 of modules where both can be: they"),
        "use_effective_conv2d": constant([x.tucker for x in factors] or [False], "cores of convolutions"),
        "peft_type": "LOKR",
    }


def _sides(x: Any) -> tuple[int, int]:
    """The sizes m and l of w1."""
    return x.w1.shape[-2:] if x.w1 is not None else (x.w1b.shape[-2], x.w1a.shape[-1])


FORMAT = Format(options=OPTIONS, method=method, parts={LoKr: parts}, page=page, beside=copies)
