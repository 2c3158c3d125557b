"""IA3 as Hugging Face peft saves it."""

import re
from typing import Any, Iterator, Sequence

from peftjax.interop import config
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Format, Options, Tuned, at_full_scale, trained_whole
from peftjax.interop.layout import window
from peftjax.interop.match import targets_of
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part
from peftjax.method import Method
from peftjax.methods.ia3 import IA3, ia3
from peftjax.overlay import Ref

OPTIONS = {
    "target_modules": config.names(needed=True),
    "exclude_modules": config.names(),
    "feedforward_modules": config.names(),
    "modules_to_save": config.listed(),
    "init_ia3_weights": config.flag(True),
}


def method(options: Options, base: Base) -> list[Method]:
    """IA3 on the target modules: on what the feed-forward ones read, and on what the others put out."""
    kernels = base.kernels(options)
    feedforward = [spot for spot in kernels if _is_feedforward(spot.module, options["feedforward_modules"] or ())]
    paths = {"targets": base.leaves([s for s in kernels if s not in feedforward], "target_modules")}
    paths["feedforward"] = base.leaves(feedforward, "feedforward_modules")
    made = ia3(**{which: regex(found) if found else () for which, found in paths.items()})
    return [made, *trained_whole(options, base, kernels)]


def _is_feedforward(module: str, names: str | Sequence[str]) -> bool:
    """By peft's rule: a regex for the whole name, or any ending of it, also within a word."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)


def parts(x: IA3, spot: Spot) -> Iterator[Part]:
    """A vector (out, 1) of outputs, (1, in) of inputs, (1, channels, 1...) of a convolution; a bias refers to it."""
    if isinstance(x.vector, Ref):
        return
    reads, size = _reads(x, spot), [1] * len(window(spot)) if spot.role.op == "conv" else []
    order: tuple[Any, ...] = (1, "i") if reads else ("o", 1)
    if spot.role.op == "conv":
        order = (1, "c" if reads else "o", *size)
    yield Part("vector", spot.of_module("ia3_l"), order)


def plain(x: IA3) -> IA3:
    """The same vector at scale 1; a bias refers to its kernel's."""
    return x if isinstance(x.vector, Ref) else at_full_scale(x, "vector", 1.0)


def _reads(x: IA3, spot: Spot) -> bool:
    """Whether the vector scales inputs."""
    return any(along and letter == "i" for along, letter in zip(x.lies, spot.role.axes))


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these vectors."""
    held = [(x, s) for _, x, spots in tuned if isinstance(x, IA3) and not isinstance(x.vector, Ref) for s in spots]
    modules = [spot.module for _, spot in held]
    reading = [spot.module for x, spot in held if _reads(x, spot)]
    names = targets_of(modules, base.modules)
    # Peft wants the feed-forward names to be among the others.
    inner = [name for name in names if any(_is_feedforward(module, [name]) for module in reading)]
    if any(_is_feedforward(module, inner) != (module in reading) for module in modules):
        names, inner = sorted(modules), sorted(reading)
    return {
        "target_modules": names,
        "feedforward_modules": inner,
        "init_ia3_weights": True,
        "peft_type": "IA3",
    }


FORMAT = Format(options=OPTIONS, method=method, parts={IA3: parts}, page=page, plain={IA3: plain})
