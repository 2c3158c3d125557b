"""Adapters of Hugging Face peft: `adapter_config.json` and `adapter_model.safetensors`, in and out. Nothing needs torch."""

import os
from pathlib import Path
from typing import Any

import jax

from peftjax.copies import Full
from peftjax.flat import not_finite
from peftjax.folders import replacing
from peftjax.interop.base import Base
from peftjax.interop.config import CONFIG, about, write_page
from peftjax.interop.faults import Faults
from peftjax.interop.formats import adapted_modules, full_parts, full_plain, saved_page, tables, untouched
from peftjax.interop.layout import is_conv1d
from peftjax.interop.names import Names, spots
from peftjax.interop.peft_formats import Read, format_of, read, slots_of
from peftjax.interop.slots import fill, read_slots, unfit_anywhere
from peftjax.interop.tensors import Tensors, read_folder, write_tensors
from peftjax.interop.turning import Rope
from peftjax.method import Method
from peftjax.overlay import layers
from peftjax.paths import flatten
from peftjax.roles import Roles
from peftjax.tree import entries, map_layers, strip

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


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
      ValueError: no or a damaged configuration, an unknown method, options that are of a wrong type or not supported, or
        that name no module.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj, tempfile
      >>> from peftjax.interop import hf_peft
      >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
      >>> roles = pj.roles(lambda params, x: x @ params["query"]["kernel"], params, jnp.ones((1, 4)))
      >>> tuned = pj.lora(rank=2, alpha=4, targets=("query",)).init(jax.random.key(0), params, roles)
      >>> with tempfile.TemporaryDirectory() as place:
      ...     hf_peft.save(place + "/adapter", tuned, roles)
      ...     found = hf_peft.method(place + "/adapter", params, roles)
      >>> found.init(jax.random.key(1), params, roles)["query"]["kernel"]
      LoRA(float32[4,3], rank=2)
    """
    faults = Faults()
    return faults.none(faults.of(read, Path(path), params, roles, names, faults)).method


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
      last, as they do in encoders. Of P-tuning, files hold what the network put out: it is read as a prompt, and cannot
      train on as P-tuning.

    Raises:
      ValueError: lists everything in the folder that is missing, damaged, unknown, not supported, or does not fit the
        model; `names` that are not one-to-one.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj, tempfile
      >>> from peftjax.interop import hf_peft
      >>> fn = lambda params, x: x @ params["query"]["kernel"]
      >>> params, x = {"query": {"kernel": jnp.ones((4, 3))}}, jnp.ones((1, 4))
      >>> roles = pj.roles(fn, params, x)
      >>> tuned = pj.lora(rank=2, targets=("query",)).init(jax.random.key(0), params, roles)
      >>> with tempfile.TemporaryDirectory() as place:
      ...     hf_peft.save(place + "/adapter", tuned, roles)
      ...     again = hf_peft.load(place + "/adapter", params, roles)
      >>> pj.wrap(fn)(again, x)
      Array([[4., 4., 4.]], dtype=float32)

    Its tensor `base_model.model.query.lora_A.weight` is A transposed, (2, 4). For a torch model that has this layer in a
    module `encoder`, both take names={"(.*)": r"encoder.\\1"}.
    """
    folder, faults = Path(path), Faults()
    found = faults.of(read, folder, params, roles, names, faults, rope)
    held = faults.of(read_folder, folder, TENSORS, PICKLE, pickles)
    fresh = None if found is None else faults.of(_fresh, found, folder, params, roles)
    filled = None
    if found is not None and fresh is not None and held is not None:
        filled = faults.of(_filled, fresh, found, held, params)
    elif held is not None:
        faults.add(f"{held.file} fits no model", unfit_anywhere(held))
    whole, found = faults.none(filled), faults.none(found)
    with about(folder / CONFIG):
        return found.format.restored(whole, found.base, found.options)


def _fresh(found: Read, folder: Path, params: Any, roles: Roles) -> Any:
    with about(folder / CONFIG):
        return found.format.begun(found.method.init(jax.random.key(0), params, roles), found.options, found.base)


def _filled(fresh: Any, found: Read, held: Tensors, params: Any) -> Any:
    format, base, options = found.format, found.base, found.options
    beside = {format.prefix + name: value for name, value in format.beside(options, base, params).items()}
    return fill(fresh, slots_of(fresh, format, base, options), held, beside)


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
      ValueError: overlays that peft has no file for, of several methods, or not finite; names that are not one-to-one; a
        folder that holds other files.

    Example:
      >>> import jax, jax.numpy as jnp, os, peftjax as pj, tempfile
      >>> from peftjax.interop import hf_peft
      >>> params = {"query": {"kernel": jnp.ones((4, 3))}}
      >>> roles = pj.roles(lambda params, x: x @ params["query"]["kernel"], params, jnp.ones((1, 4)))
      >>> tuned = pj.lora(rank=2, targets=("query",)).init(jax.random.key(0), params, roles)
      >>> with tempfile.TemporaryDirectory() as place:
      ...     hf_peft.save(place + "/adapter", tuned, roles, task_type="FEATURE_EXTRACTION")
      ...     sorted(os.listdir(place + "/adapter"))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    base = Base(spots(strip(tuned), roles, names), rope, heads)
    format = format_of(tuned)
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
    tensors = read_slots(tuned, slots_of(tuned, format, base, {}))
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
