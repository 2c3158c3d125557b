"""Adapters of Hugging Face peft: `adapter_config.json` and `adapter_model.safetensors`, in and out. Nothing needs torch."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from peftjax import method as methods
from peftjax.copies import Full
from peftjax.flat import near, not_finite
from peftjax.folders import replacing
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
from peftjax.interop.config import CONFIG, about, read_options, read_page, write_page
from peftjax.interop.formats import (
    Format,
    Options,
    adapted_modules,
    full_parts,
    full_plain,
    saved_page,
    tables,
    untouched,
)
from peftjax.interop.layout import is_conv1d
from peftjax.interop.names import Names, spots
from peftjax.interop.slots import Slot, fill, read_slots, slots
from peftjax.interop.tensors import read_folder, write_tensors
from peftjax.interop.turning import Rope
from peftjax.method import Method
from peftjax.overlay import layers
from peftjax.paths import flatten
from peftjax.roles import Roles
from peftjax.tree import entries, map_layers, strip

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
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


def method(path: str | os.PathLike[str], params: Any, roles: Roles, names: Names = None) -> Method:
    """The method that an adapter's configuration describes, to train with, or to save with `peftjax.save`.

    Args:
      path: a folder with `adapter_config.json`.
      params: the model's parameters.
      roles: what `peftjax.roles` says of them.
      names: from paths to torch names, as `peftjax.interop.names.spots` reads them.

    Returns:
      A chain of methods whose targets are the leaves' paths.

    Raises:
      ValueError: an unknown method, options that are of a wrong type or not supported, or that name no module.
    """
    return _read(Path(path), params, roles, names).method


def load(
    path: str | os.PathLike[str],
    params: Any,
    roles: Roles,
    names: Names = None,
    *,
    pickles: bool = False,
    rope: Rope = None,
) -> Any:
    """Lays an adapter of Hugging Face peft on a model's parameters.

    Args:
      path: a folder with `adapter_config.json` and `adapter_model.safetensors`, as `save_pretrained` writes it.
      params: the model's parameters, of any framework.
      roles: what `peftjax.roles` says of them; they tell which axes of a kernel are torch's inputs and outputs.
      names: from paths to torch names, where the default (`a/b/kernel` is `a.b.weight`) is not right; see
        `peftjax.interop.names.spots`.
      pickles: whether an `adapter_model.bin` is read where there is no safetensors file. It is not run: only tensors
        are admitted.
      rope: for a prefix of a model with rotary positions (the roles tell): their base, such as 10000.0, where entry i of
        a head pairs with entry i + size / 2; or the model's own function of keys (n, heads, size) and positions (n,).
        Peft stores keys as attention reads them, so they are turned back by the virtual tokens' positions, 0 to n - 1.

    Returns:
      The tuned tree, on the buffers of `params`. With virtual tokens it runs through `peftjax.wrap_tokens`. Peft puts
      prompts first in every model: `side="first"`; of BERT, whose pooler then reads the first of them, `check=False`.
      With a prefix, real positions begin at n: `shift=True`, and the model's positions given where virtual tokens come
      last, as they do in encoders. Of P-tuning, files hold what the network put out: it is read as a prompt, and cannot train on as P-tuning.

    Raises:
      ValueError: lists everything in the folder that is damaged, unknown, not supported, or does not fit the model.
    """
    folder = Path(path)
    found = _read(folder, params, roles, names, rope)
    file, tensors = read_folder(folder, TENSORS, PICKLE, pickles)
    with about(folder / CONFIG):
        tuned = found.format.begun(found.method.init(jax.random.key(0), params, roles), found.options, found.base)
    wanted = _slots(tuned, found.format, found.base, found.options)
    beside = found.format.beside(found.options, found.base, params)
    prefixed = {found.format.prefix + name: value for name, value in beside.items()}
    filled = fill(tuned, wanted, tensors, prefixed, str(file))
    with about(folder / CONFIG):
        return found.format.restored(filled, found.base, found.options)


def _read(folder: Path, params: Any, roles: Roles, names: Names, rope: Rope = None) -> Read:
    page = read_page(folder)
    kind = page.get("peft_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ValueError(
            f"{folder / CONFIG}: peft_type is {kind!r}, expected one of {', '.join(FORMATS)} "
            f"(nearest: {near(str(kind), FORMATS)})"
        )
    format = FORMATS[kind]
    options = read_options(page, format.options, str(folder / CONFIG))
    base = Base(spots(params, roles, names), rope)
    with about(folder / CONFIG):
        if rope is not None and format is not peft_prefix.FORMAT:
            raise ValueError(
                f"rope={rope!r} says nothing of {kind}; it is for a prefix of a model with rotary positions"
            )
        return Read(format, options, base, methods.chain(*format.method(options, base)))


def _slots(tuned: Any, format: Format, base: Base, options: Options) -> list[Slot]:
    whole = full_parts(adapted_modules(tuned, base, format), format.inside)
    parts = {**format.parts, **format.extra.parts, Full: whole}
    return format.placed(slots(tuned, base, parts, format.prefix), base, options)


def save(
    path: str | os.PathLike[str],
    tuned: Any,
    roles: Roles,
    names: Names = None,
    *,
    task_type: str | None = None,
    rope: Rope = None,
    heads: int | None = None,
) -> None:
    """Writes an adapter that Hugging Face peft loads.

    The folder appears when it is complete; one that was there before is replaced then, and not a moment earlier.

    Args:
      path: where to; it becomes a folder of two files.
      tuned: a tree whose overlays are of one method of peft, beside leaves that are trained themselves.
      roles: what `peftjax.roles` says of its leaves.
      names: from paths to torch names, as for `load`.
      task_type: peft's name of the task ("CAUSAL_LM", "SEQ_CLS", ...), which chooses the class peft loads it with.
      rope: for a prefix of a model with rotary positions, as for `load`.
      heads: into how many heads a prefix's keys are cut, where their kernels do not show it. Without rotary positions
        None leaves it to peft, which reads it off its model.

    Raises:
      ValueError: overlays that peft has no file for, of several methods, or not finite; names that are not one-to-one.
    """
    base = Base(spots(strip(tuned), roles, names), rope, heads)
    format = _format(tuned)
    tuned = format.stored(tuned, base)
    plain = {Full: full_plain, **format.plain, **format.extra.plain}
    tuned = map_layers(lambda _, x: plain.get(type(x), lambda same: same)(x), tuned)
    if broken := not_finite((e.key, e.value) for e in entries(tuned) if e.trains):
        raise ValueError(f"not saved, for these hold a NaN or an infinity: {', '.join(broken)}. Did training diverge?")
    of = lambda kinds: [(p, x, base.at(p)) for p, leaf in flatten(tuned) for x in layers(leaf) if type(x) in kinds]
    adapted = adapted_modules(tuned, base, format)
    inside = adapted if Full in format.parts else set()
    saved, held = saved_page(
        [t for t in of([Full]) if t[2][0].module not in inside], adapted, base, task_type, format.only
    )
    held += [spot for spot in base.spots.values() if spot.module in inside]
    if lost := [f"{k}={v!r}" for k, v in saved.items() if k not in format.options and v not in (None, "none")]:
        raise ValueError(
            f"peft's files of this method cannot say {', '.join(lost)}: leaves that are trained themselves"
        )
    saved = {key: value for key, value in saved.items() if key in format.options}
    if besides := of(format.extra.parts):
        saved |= format.extra.page(besides, base)
    page = {**format.page(of(format.parts), base), **saved, "task_type": task_type, "inference_mode": True}
    if any(is_conv1d(spot) for spot in base.spots.values() if spot.module in adapted):
        page["fan_in_fan_out"] = True
    tensors = read_slots(tuned, _slots(tuned, format, base, {}))
    leaves = dict(flatten(strip(tuned)))
    parts = full_parts(adapted, format.inside)
    for spot in held:
        for part in parts(None, spot):
            tensors.setdefault(format.prefix + part.name, untouched(spot, leaves))
    for spot in [] if besides else tables(base, adapted):  # with trained tokens, peft saves no table
        tensors[format.prefix + spot.of_module("base_layer.weight")] = untouched(spot, leaves)
    with replacing(Path(os.path.realpath(path)), {TENSORS, CONFIG}) as new:
        write_tensors(new / TENSORS, tensors)
        write_page(new / CONFIG, page)


def _holds(format: Format, kinds: set[type]) -> bool:
    return bool(kinds & set(format.parts)) and kinds <= set(format.parts) | set(format.extra.parts)


def _format(tuned: Any) -> Format:
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
