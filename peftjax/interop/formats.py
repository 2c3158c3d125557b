"""What a method of Hugging Face peft is to the reader and the writer, and what all of them share."""

import dataclasses
import math
from typing import Any, Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from peftjax.copies import Full
from peftjax.factored import Factor, chain
from peftjax.interop.base import Base, regex
from peftjax.interop.config import Option
from peftjax.interop.layout import layout, whole
from peftjax.interop.match import targets_of
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part, Parts, Slot
from peftjax.method import Method
from peftjax.methods.unfreeze import unfreeze
from peftjax.overlay import Overlay, layers
from peftjax.paths import flatten
from peftjax.weight import materialise

HEADS = ("classifier", "score")
# Peft saves these with their updates, lest the vocabulary was extended.
TABLES = ("embed_tokens", "lm_head")
Options = Mapping[str, Any]
# A leaf with an overlay on it: its path, the overlay, and the torch parameters it holds.
Tuned = tuple[str, Overlay, list[Spot]]


@dataclasses.dataclass(frozen=True)
class Extra:
    """What the files of some methods hold besides: overlays of other types, on modules that keep their names.

    Attributes:
      parts, page, plain: as of a `Format`.
    """

    parts: Mapping[type, Parts] = dataclasses.field(default_factory=dict)
    page: Callable[[Sequence[Tuned], Base], dict[str, Any]] = lambda tuned, base: {}
    plain: Mapping[type, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Format:
    """One method of peft.

    Attributes:
      options: what its configuration may say.
      method: what adapts the model, from the options.
      parts: the tensors of its overlays.
      page: the configuration that says what its overlays do.
      prefix: what stands before the tensors' names.
      beside: further tensors that a file holds, with the values they must have.
      plain: by type of overlay, the same overlay as peft's files can hold it.
      wraps: whether peft wraps the modules that it adapts, and then names their own tensors as in `base_layer`.
      placed: the slots under the names, and in the parts of tensors, that the files have.
      inside: where the tensors of an adapted module lie that are trained themselves.
      only: what `bias` is where the biases of adapted modules train, and no others.
      extra: what its files hold besides.
      begun: a tree that the method has just initialised, as the options have it before tensors fill it.
      restored: the tree as the model needs it, from one that holds a file's tensors.
      stored: the tree that holds what a file's tensors do.
    """

    options: Mapping[str, Option]
    method: Callable[[Options, Base], list[Method]]
    parts: Mapping[type, Parts]
    page: Callable[[Sequence[Tuned], Base], dict[str, Any]]
    prefix: str = "base_model.model."
    beside: Callable[[Options, Base, Any], dict[str, Any]] = lambda options, base, params: {}
    plain: Mapping[type, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    wraps: bool = True
    placed: Callable[[list[Slot], Base, Options], list[Slot]] = lambda slots, base, options: slots
    inside: str = "base_layer"
    only: str = "lora_only"
    extra: Extra = Extra()
    begun: Callable[[Any, Options, Base], Any] = lambda tuned, options, base: tuned
    restored: Callable[[Any, Base, Options], Any] = lambda tuned, base, options: tuned
    stored: Callable[[Any, Base], Any] = lambda tuned, base: tuned


def trained_whole(options: Options, base: Base, kernels: Sequence[Spot]) -> list[Method]:
    """`modules_to_save` and `bias`: the leaves that are trained themselves."""
    saved = base.saved(options.get("modules_to_save"))
    for spot in saved:
        if spot.is_tied:
            raise ValueError(
                f"modules_to_save names {spot.module}, which this model uses twice, as a table and as its head; peft "
                "trains a copy for the table alone, and a leaf of a tree is one array for both"
            )
    bias, adapted = options.get("bias", "none"), {spot.module for spot in kernels}
    biases = [spot for spot in base.spots.values() if is_bias(spot) and (bias == "all" or spot.module in adapted)]
    chosen = [*saved, *(biases if bias != "none" else [])]
    paths = base.leaves(chosen, "modules_to_save or bias")
    return [unfreeze(regex(paths))] if paths else []


def is_bias(spot: Spot) -> bool:
    """Whether torch calls a parameter a bias."""
    return spot.name.rpartition(".")[2] == "bias"


def full_parts(adapted: set[str], inside: str) -> Parts:
    """The tensor of a leaf that is trained itself; in an adapted module, it lies under a name of the format's."""

    def parts(x: Any, spot: Spot) -> list[Part]:
        last = spot.name.rpartition(".")[2]
        name = spot.of_module(f"{inside}.{last}") if spot.module in adapted else spot.name
        return [Part("value", name, whole(spot))]

    return parts


def adapted_modules(tuned: Any, base: Base, format: Format) -> set[str]:
    """The modules whose parameters hold an overlay of the method, which peft wraps."""
    if not format.wraps:
        return set()
    held = {path for path, leaf in flatten(tuned) if any(type(x) in format.parts for x in layers(leaf))}
    able = base.norms if Full in format.parts else {spot.module for spot in base.spots.values() if spot.is_kernel}
    return {spot.module for spot in base.spots.values() if spot.path in held} & able


def tables(base: Base, adapted: Iterable[str]) -> list[Spot]:
    """The tables of a vocabulary, and heads over it, in these modules."""
    kernels = [spot for spot in base.spots.values() if spot.is_kernel and spot.module in set(adapted)]
    return [spot for spot in kernels if spot.module.rpartition(".")[2] in TABLES]


def copies(options: Options, base: Base, params: Any) -> dict[str, Any]:
    """What peft saves beside its updates: the base's tables, and the biases that it lists a second time."""
    leaves = dict(flatten(params))
    kernels = base.kernels(options)
    copied = [*tables(base, [spot.module for spot in kernels]), *(s for s in kernels if s.role.op == "embedding")]
    found: dict[str, Any] = {spot.of_module("base_layer.weight"): untouched(spot, leaves) for spot in copied}
    if options.get("bias") == "all":
        for spot in base.saved(options["modules_to_save"]):
            found |= {spot.of_module(f"{copy}.bias"): None for copy in ("original_module", "modules_to_save")}
    return found


def scale_at(x: Any, spot: Spot) -> float:
    """The scale of an overlay at one place of its leaf's stacked axes."""
    return float(x.scale[spot.index] if x.scale.ndim else x.scale)


def times_scale(x: Any, field: str) -> Any:
    """A field of an overlay times its scale, which lies along some of the field's axes."""
    labels = x.labels()
    factors = (Factor(x.scale, labels["scale"]),)
    return chain(Factor(getattr(x, field), labels[field]), factors, labels[field], {})


def at_full_scale(x: Any, field: str, start: Any) -> Any:
    """The overlay at scale 1 that does what x does, whose scale moves a field between where it started and its value."""
    if (x.scale == 1).all():
        return x
    moved = start + times_scale(x.replace(**{field: getattr(x, field) - start}), field)
    return x.replace(**{field: moved}, scale=jnp.ones_like(x.scale))


def full_plain(x: Full) -> Full:
    """The leaf that is trained itself, at scale 1."""
    return at_full_scale(x, "value", materialise(x.base).astype(x.value.dtype))


def neat(x: float) -> int | float:
    """A number that is whole to rounding, as an integer."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-6) else x


def untouched(spot: Spot, params: Mapping[str, Any]) -> np.ndarray:
    """The tensor of a parameter as the base has it."""
    value = np.asarray(materialise(params[spot.path])).astype(np.float32)
    return layout(spot, [(k,) for k in range(value.ndim)], value.shape, whole(spot)).read(value)


def saved_page(
    full: Sequence[Tuned], adapted: set[str], base: Base, task_type: str | None, only: str
) -> tuple[dict[str, Any], list[Spot]]:
    """What the configuration says of leaves that are trained themselves, and the parameters that a file then holds.

    Peft trains all biases, those of the adapted modules, or none, and other parameters by whole modules: where a tree
    trains fewer, the file holds the base's values for the rest.

    Raises:
      ValueError: a trained leaf lies in an adapted module, and is no bias.
    """
    spots = [spot for _, _, held in full for spot in held]
    inside = [spot for spot in spots if spot.module in adapted]
    if wrong := [spot.name for spot in inside if not is_bias(spot)]:
        raise ValueError(f"{', '.join(wrong)} are trained themselves and adapted too, which peft has no tensor for")
    biases = [spot for spot in base.spots.values() if is_bias(spot)]
    names = {spot.name for spot in spots}
    if inside and names >= {spot.name for spot in biases}:
        rest = {spot.module for spot in spots if not is_bias(spot)}
        held = [spot for spot in base.spots.values() if spot.module in rest or is_bias(spot)]
        return _page("all", rest, base), held
    modules = {spot.module for spot in spots if spot.module not in adapted}
    if task_type in ("SEQ_CLS", "TOKEN_CLS"):
        modules |= {spot.module for spot in base.saved(HEADS)}
    held = [s for s in base.spots.values() if s.module in modules or (inside and is_bias(s) and s.module in adapted)]
    return _page(only if inside else "none", modules, base), held


def _page(bias: str, modules: set[str], base: Base) -> dict[str, Any]:
    found = {_head_of(module, modules, base) or module for module in modules}
    return {"bias": bias, "modules_to_save": targets_of(found, base.modules) if found else None}


def _head_of(module: str, modules: set[str], base: Base) -> str | None:
    """The head that a module is a part of, where all of its parts are among the modules: peft saves it as one."""
    parts = module.split(".")
    above = [".".join(parts[:k]) for k in range(1, len(parts) + 1) if parts[k - 1] in HEADS]
    inside = lambda head: {m for m in base.modules if m == head or m.startswith(f"{head}.")}
    return next((head for head in above if inside(head) <= modules), None)
