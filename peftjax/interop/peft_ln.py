"""Norms that are trained themselves, as Hugging Face peft saves them."""

from typing import Any, Sequence

from peftjax.copies import Full
from peftjax.interop import config
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Format, Options, Tuned, full_parts, trained_whole
from peftjax.interop.match import targets_of
from peftjax.method import Method
from peftjax.methods.unfreeze import unfreeze

INSIDE = "ln_tuning_layers"
OPTIONS = {
    "target_modules": config.names(needed=True),
    "exclude_modules": config.names(),
    "modules_to_save": config.listed(),
}


def method(options: Options, base: Base) -> list[Method]:
    """Training of all that the target modules hold, and of the modules to save.

    Raises:
      ValueError: a target module is no norm, or a norm is among the modules to save.
    """
    hit = base.targeted(options)
    if others := [module for module in hit if module not in base.norms]:
        raise ValueError(
            f"target_modules names {', '.join(others[:5])}, which are no norms: modules_to_save trains those"
        )
    if also := sorted({spot.module for spot in base.saved(options["modules_to_save"])} & base.norms):
        raise ValueError(f"modules_to_save names {', '.join(also[:5])}, which are norms: target_modules trains those")
    spots = [spot for spot in base.spots.values() if spot.module in set(hit)]
    return [unfreeze(regex(base.leaves(spots, "target_modules"))), *trained_whole(options, base, ())]


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these norms.

    Raises:
      ValueError: no norm is trained.
    """
    found = {spot.module for _, _, spots in tuned for spot in spots} & base.norms
    if not found:
        raise ValueError(
            f"peft has no file for leaves that are trained themselves, and nothing beside, but norms: found {tuned[0][0]}"
        )
    return {"target_modules": targets_of(found, base.modules), "peft_type": "LN_TUNING"}


FORMAT = Format(options=OPTIONS, method=method, parts={Full: full_parts(set(), INSIDE)}, page=page, inside=INSIDE)
