"""Entries of a peft configuration that name nothing: peft passes over them, and here each is a fault."""

import re
from typing import Any, Iterable, Mapping

from peftjax.interop.base import Base
from peftjax.interop.config import ALPHAS, RANKS, Option
from peftjax.interop.match import layer_of, layers_of, named, of_end, targeted

# Lists that peft itself writes where none was said, for models that have only some of these modules.
DEFAULTS = (
    {"q", "k", "v", "o", "wi", "wo"},  # T5; the gated one has wi_0 and wi_1
    {"q", "v", "q_proj", "v_proj"},  # BLIP-2, around a T5 or an OPT
    {"layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"},  # its norms
)


def strays(options: Mapping[str, Any], known: Mapping[str, Option], base: Base) -> list[str]:
    """A line for each entry that names nothing in a model of which the options adapt something.

    `exclude_modules` and `modules_to_save` may name what is not there: the first also names modules without parameters,
    such as a tied head, and peft adds to the second the heads that other models have.
    """
    if not options.get("target_modules"):
        return []
    tuned = [module for module in base.modules if targeted(module, options)]
    if not tuned:
        return []
    ends = [key for key, option in known.items() if option in (RANKS, ALPHAS)]
    return [
        *_targets(options["target_modules"], base),
        *_layers(options, base),
        *(line for key in ends for line in _unmatched(base, key, options[key] or (), tuned)),
        *_feedforward(base, options.get("feedforward_modules"), tuned),
    ]


def _targets(wanted: str | list[str], base: Base) -> list[str]:
    if isinstance(wanted, str) or set(wanted) in DEFAULTS:
        return []
    lost = [entry for entry in wanted if not any(named(module, [entry]) for module in base.modules)]
    return [_stray(base, "target_modules", entry, "names no module of this model", base.modules) for entry in lost]


def _layers(options: Mapping[str, Any], base: Base) -> list[str]:
    if isinstance(options["target_modules"], str):
        return []
    there = {layer_of(module, options) for module in base.modules if named(module, options["target_modules"])}
    said = ", ".join(map(str, sorted(n for n in there if n is not None)))
    return [
        f"layers_to_transform has {n}, and target_modules names modules of the layers {said}"
        for n in layers_of(options)
        if n not in there
    ]


def _unmatched(base: Base, key: str, entries: Iterable[str], tuned: list[str]) -> list[str]:
    lost = [entry for entry in entries if not any(re.match(of_end(entry), module) for module in tuned)]
    return [_stray(base, key, entry, "matches no module that is adapted", tuned) for entry in lost]


def _feedforward(base: Base, names: str | list[str] | None, tuned: list[str]) -> list[str]:
    if names is None or isinstance(names, str):
        return []
    lost = [name for name in names if not any(module.endswith(name) for module in tuned)]
    return [_stray(base, "feedforward_modules", name, "names no module that is adapted", tuned) for name in lost]


def _stray(base: Base, key: str, entry: str, what: str, modules: list[str]) -> str:
    return f"{key} has {entry!r}, which {what} (nearest: {base.nearest(entry, modules)}): mend it, or take it out"
