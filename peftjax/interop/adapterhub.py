"""Bottleneck adapters of AdapterHub's `adapters` library: `adapter_config.json` and its tensors. Nothing needs torch."""

import os
import re
from pathlib import Path
from typing import Any, Iterator

import jax

from peftjax.interop.adapterhub_config import ACTIVATIONS, Page, read_config
from peftjax.interop.base import Base, regex
from peftjax.interop.config import CONFIG, about, read_page
from peftjax.interop.faults import Faults
from peftjax.interop.model_types import unlike
from peftjax.interop.names import Names, Spot, spots
from peftjax.interop.slots import Part, Parts, fill, slots, unfit_anywhere
from peftjax.interop.tensors import Tensors, read_folder
from peftjax.method import Method
from peftjax.methods.adapter import Adapter, adapter
from peftjax.overlay import layers
from peftjax.paths import flatten
from peftjax.roles import Roles

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"


def load(path: str | os.PathLike[str], params: Any, roles: Roles, names: Names = None, *, pickles: bool = False) -> Any:
    """Lays a bottleneck adapter of AdapterHub on a model's parameters.

    Args:
      path: a folder with `adapter_config.json` and `adapter.safetensors`, as `save_adapter` writes it: of the kinds
        double_seq_bn (Houlsby), seq_bn (Pfeiffer), par_bn and scaled_par_bn (He et al.).
      params: the model's parameters, of any framework.
      roles: what `peftjax.roles` says of them; they tell where its attention and feed-forward layers end.
      names: from paths to torch names, where the default (`a/b/kernel` is `a.b.weight`) is not right; see
        `peftjax.interop.names.spots`.
      pickles: whether a `pytorch_adapter.bin` is read where there is no safetensors file. It is not run: only tensors
        are admitted.

    Returns:
      The tuned tree, on the buffers of `params`. It runs through `peftjax.wrap`, and does not merge.

    Raises:
      ValueError: lists everything in the folder that is missing, damaged, unknown, not supported, or does not fit the
        model; `names` that are not one-to-one.

    Example, a folder of the settings that have no default:
      >>> import jax.numpy as jnp, json, numpy as np, pathlib, peftjax as pj, safetensors.numpy, tempfile
      >>> from peftjax.interop import adapterhub
      >>> fn = lambda p, x: x + jnp.tanh(x @ p["mlp"]["up"]["kernel"]) @ p["mlp"]["down"]["kernel"]
      >>> params = {"mlp": {"up": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((8, 4))}}}
      >>> said = {"mh_adapter": False, "original_ln_before": True, "scaling": 1.0}
      >>> page = {"name": "task", "config": said | {"non_linearity": "relu", "reduction_factor": 2}}
      >>> shapes = {"down.0.weight": (2, 4), "down.0.bias": 2, "up.weight": (4, 2), "up.bias": 4}
      >>> tensors = {f"mlp.adapters.task.adapter_{k}": np.zeros(n, np.float32) for k, n in shapes.items()}
      >>> with tempfile.TemporaryDirectory() as place:
      ...     safetensors.numpy.save_file(tensors, place + "/adapter.safetensors")
      ...     written = pathlib.Path(place, "adapter_config.json").write_text(json.dumps(page))
      ...     tuned = adapterhub.load(place, params, pj.roles(fn, params, jnp.ones((1, 4))))
      >>> tuned["mlp"]["down"]["kernel"]
      Adapter(float32[8,4], sequential, bottleneck=2)

    Reference: Poth et al. 2023, arXiv 2311.11077 (AdapterHub's `adapters`).
    """
    folder, faults = Path(path), Faults()
    base = Base(spots(params, roles, names))
    page = faults.of(_page, folder, base, faults)
    held = faults.of(read_folder, folder, TENSORS, PICKLE, pickles)
    fresh = None if page is None else faults.of(_fresh, page, folder, params, roles, base)
    filled = None
    if page is not None and fresh is not None:
        faults.add(f"{folder / CONFIG} is of another model", _widths(page, fresh))
    if page is not None and fresh is not None and held is not None:
        filled = faults.of(_filled, fresh, page, roles, base, held)
    elif held is not None:
        faults.add(f"{held.file} fits no model", unfit_anywhere(held))
    return faults.none(filled)


def _page(folder: Path, base: Base, faults: Faults) -> Page | None:
    where = str(folder / CONFIG)
    page, wrong = read_config(read_page(folder), where)
    faults.add(f"{where} cannot be read", wrong)
    faults.add(f"{where} is of another model", unlike(page and page.model_type, base))
    return page


def _fresh(page: Page, folder: Path, params: Any, roles: Roles, base: Base) -> Any:
    with about(folder / CONFIG):
        return _method(page, base).init(jax.random.key(0), params, roles)


def _widths(page: Page, tuned: Any) -> list[str]:
    """A line where the adapters stand in a model of another width than the page says."""
    found = [x for _, leaf in flatten(tuned) for x in layers(leaf) if isinstance(x, Adapter)]
    widths = sorted({x.down.shape[x.labels()["down"].index("features")] for x in found})
    if page.hidden_size is None or widths == [page.hidden_size]:
        return []
    return [f"hidden_size is {page.hidden_size}, expected {' and '.join(map(str, widths))}, the model's features"]


def _filled(fresh: Any, page: Page, roles: Roles, base: Base, held: Tensors) -> Any:
    """The tree with the file's tensors, whose names may have the model's type before them, or not."""
    kind = f"{page.model_type}."
    short = lambda name: name.removeprefix(kind)
    twice = [name for name in held.found if name != short(name) and short(name) in held.found]
    odd = {short(name): fault for name, fault in held.faults.items()}
    odd |= {short(name): f"twice: {short(name)} stands with and without {kind!r} before the name" for name in twice}
    parts = _parts(roles, page.name, any("output_adapters." in name for name in held.found), short)
    short_held = Tensors(held.file, {short(name): x for name, x in held.found.items()}, odd)
    return fill(fresh, slots(fresh, base, {Adapter: parts}, ""), short_held, {})


def _method(page: Page, base: Base) -> Method:
    left, settings = set(page.settings["leave_out"]), page.settings
    out = [s.path for s in base.spots.values() if set(map(int, re.findall(r"\.(\d+)\.", s.name))) & left]
    return adapter(
        page.kind,
        reduction=settings["reduction_factor"],
        activation=ACTIVATIONS[settings["non_linearity"]],
        scale=None if settings["scaling"] == "learned" else settings["scaling"],
        exclude=regex(out) if out else (),
    )


def _parts(roles: Roles, label: str, by_layer: bool, short: Any) -> Parts:
    """The tensors of one adapter; they lie in the module around the layer, or (`by_layer`) in that of the whole block."""

    def parts(x: Adapter, spot: Spot) -> Iterator[Part]:
        around = spot.module.rpartition(".")[0]
        if by_layer:
            end = {"attention": "attention_adapters", "feed-forward": "output_adapters"}[
                str(roles[x.kernel or spot.path].sublayer)
            ]
            around = f"{around.rpartition('.')[0]}.{end}"
        at = f"{short(around)}.adapters.{label}"
        yield Part("down", f"{at}.adapter_down.0.weight", ("bottleneck", "features"))
        yield Part("down_bias", f"{at}.adapter_down.0.bias", ("bottleneck",))
        yield Part("up", f"{at}.adapter_up.weight", ("features", "bottleneck"))
        yield Part("up_bias", f"{at}.adapter_up.bias", ("features",))
        if x.gate is not None:
            yield Part("gate", f"{at}.scaling", (1,))

    return parts
