"""The methods of Hugging Face peft that have a file here: which one a configuration is of, and which one a tree."""

from pathlib import Path
from typing import Any, NamedTuple

from peftjax import method as methods
from peftjax.copies import Full
from peftjax.flat import near
from peftjax.interop import (
    peft_adalora,
    peft_ia3,
    peft_ln,
    peft_loha,
    peft_lokr,
    peft_lora,
    peft_oft,
    peft_prefix,
    peft_prompt,
    peft_tokens,
    peft_vera,
)
from peftjax.interop.base import Base
from peftjax.interop.config import CONFIG, about, read_options, read_page
from peftjax.interop.faults import Faults
from peftjax.interop.formats import Format, Options, adapted_modules, full_parts
from peftjax.interop.names import Names, spots
from peftjax.interop.slots import Slot, slots
from peftjax.interop.strays import strays
from peftjax.interop.turning import Rope
from peftjax.method import Method
from peftjax.overlay import layers
from peftjax.paths import flatten
from peftjax.roles import Roles

FORMATS: dict[str, Format] = {
    "LORA": peft_lora.FORMAT,
    "ADALORA": peft_adalora.FORMAT,
    "IA3": peft_ia3.FORMAT,
    "PROMPT_TUNING": peft_prompt.FORMAT,
    "P_TUNING": peft_prompt.OF_NETWORKS,
    "LOHA": peft_loha.FORMAT,
    "LOKR": peft_lokr.FORMAT,
    "VERA": peft_vera.FORMAT,
    "OFT": peft_oft.FORMAT,
    "PREFIX_TUNING": peft_prefix.FORMAT,
    "LN_TUNING": peft_ln.FORMAT,
    "TRAINABLE_TOKENS": peft_tokens.FORMAT,
}


class Read(NamedTuple):
    """An adapter's configuration, read: how the method is stored, its options, the model, and the method itself."""

    format: Format
    options: dict[str, Any]
    base: Base
    method: Method


def read(folder: Path, params: Any, roles: Roles, names: Names, faults: Faults, rope: Rope = None) -> Read | None:
    """What the configuration in a folder says of a model; None where an option cannot be used.

    Options that are of a wrong type or not supported, and entries that name nothing, are added to the faults.

    Raises:
      ValueError: there is no configuration, of a method of peft; or it names no module, or what cannot be adapted.
    """
    page, where = read_page(folder), folder / CONFIG
    kind = page.get("peft_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ValueError(
            f"{where}: peft_type is {kind!r}, expected one of {', '.join(FORMATS)} (nearest: {near(str(kind), FORMATS)})"
        )
    format = FORMATS[kind]
    options, wrong = read_options(page, format.options)
    faults.add(f"{where} cannot be read", wrong)
    base = Base(spots(params, roles, names), rope)
    if options is None:
        return None
    faults.add(f"{where} cannot be read", strays(options, format.options, base))
    with about(where):
        if rope is not None and format is not peft_prefix.FORMAT:
            raise ValueError(
                f"rope={rope!r} says nothing of {kind}; it is for a prefix of a model with rotary positions"
            )
        return Read(format, options, base, methods.chain(*format.method(options, base)))


def slots_of(tuned: Any, format: Format, base: Base, options: Options) -> list[Slot]:
    """The tensors that hold a tree whose overlays are of this method."""
    whole = full_parts(adapted_modules(tuned, base, format), format.inside)
    parts = {**format.parts, **format.extra.parts, Full: whole}
    return format.placed(slots(tuned, base, parts, format.prefix), base, options)


def _holds(format: Format, kinds: set[type]) -> bool:
    return bool(kinds & set(format.parts)) and kinds <= set(format.parts) | set(format.extra.parts)


def format_of(tuned: Any) -> Format:
    """The method of a tree's overlays.

    Raises:
      ValueError: peft has none for them.
    """
    kinds = {type(x) for _, leaf in flatten(tuned) for x in layers(leaf)}
    kinds = kinds - {Full} or kinds
    fits = [format for format in FORMATS.values() if _holds(format, kinds)]
    if not fits:
        known = sorted({kind.__name__ for format in FORMATS.values() for kind in format.parts} - {Full.__name__})
        raise ValueError(
            f"peft has no file for {', '.join(sorted(kind.__name__ for kind in kinds)) or 'this tree'}; expected "
            f"overlays of one of its methods: {', '.join(known)}"
        )
    return fits[0]
