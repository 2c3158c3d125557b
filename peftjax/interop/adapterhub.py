"""Bottleneck adapters of AdapterHub's `adapters` library: `adapter_config.json` and its tensors. Nothing needs torch."""

import os
import re
from pathlib import Path
from typing import Any, Iterator, Mapping

import jax

from peftjax.flat import near
from peftjax.interop.base import Base, regex
from peftjax.interop.config import CONFIG, about, is_number, is_whole, read_page
from peftjax.interop.names import Names, Spot, spots
from peftjax.interop.slots import Part, Parts, fill, slots
from peftjax.interop.tensors import read_folder
from peftjax.method import Method
from peftjax.methods.adapter import Adapter, adapter
from peftjax.roles import Roles

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
ACTIVATIONS = {
    **{name: name for name in ("relu", "gelu", "swish", "tanh", "sigmoid")},
    **{"leakyrelu": "leaky_relu", "gelu_new": "gelu_tanh", "silu": "swish"},
}
# What each kind of adapter says, (mh_adapter, is_parallel, original_ln_before), beside a trained scale.
KINDS = {
    (True, False, False): "houlsby",
    (False, False, True): "pfeiffer",
    (False, True, False): "parallel",
}
# The one value that is supported, of all that would change what an adapter computes.
FIXED: dict[str, Any] = {
    "output_adapter": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    **dict.fromkeys(
        ("adapter_residual_before_ln", "cross_adapter", "ln_after", "ln_before", "phm_layer", "use_gating"), False
    ),
    "inv_adapter": None,
    "stochastic_depth": 0.0,
}
READ = {"mh_adapter", "is_parallel", "original_ln_before", "non_linearity", "reduction_factor", "scaling", "leave_out"}
# Of training, of how it starts, and of Compacter's and invertible layers, which FIXED refuses.
REMARKS = {
    *(
        "dropout",
        "init_weights",
        "init_weights_seed",
        "inv_adapter_reduction_factor",
        "learn_phm",
        "phm_bias",
        "phm_c_init",
    ),
    *("phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule", "factorized_phm_W"),
    *("factorized_phm_rule", "hypercomplex_nonlinearity"),
}


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
      The tuned tree, on the buffers of `params`.

    Raises:
      ValueError: lists everything in the folder that is damaged, unknown, not supported, or does not fit the model.
    """
    folder = Path(path)
    page, where = read_page(folder), str(folder / CONFIG)
    config, label = _config(page, where), page["name"]
    base = Base(spots(params, roles, names))
    with about(folder / CONFIG):
        tuned = _method(config, base).init(jax.random.key(0), params, roles)
    file, tensors = read_folder(folder, TENSORS, PICKLE, pickles)
    kind = f"{page.get('model_type')}."
    short = lambda name: name.removeprefix(kind)
    if twice := [name for name in tensors if name != short(name) and short(name) in tensors]:
        raise ValueError(f"{file} holds {', '.join(twice)} with and without {kind!r} before the name; expected one")
    parts = _parts(roles, label, any("output_adapters." in name for name in tensors), short)
    return fill(
        tuned, slots(tuned, base, {Adapter: parts}, ""), {short(k): x for k, x in tensors.items()}, {}, str(file)
    )


def _config(page: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The adapter's settings, each of which is supported."""
    config = page.get("config")
    if not isinstance(config, dict) or not isinstance(page.get("name"), str):
        raise ValueError(f"{where} is no adapter's of AdapterHub: expected `config`, an object, and `name`")
    faults = [f"{k} is {config.get(k)!r}, expected {v!r}" for k, v in FIXED.items() if config.get(k, v) != v]
    known = {*FIXED, *READ, *REMARKS}
    faults += [
        f"{k}={v!r} is not supported (nearest that is: {near(k, known)})" for k, v in config.items() if k not in known
    ]
    if _shape(config) not in KINDS:
        faults.append(
            f"(mh_adapter, is_parallel, original_ln_before) is {_shape(config)}, expected one of {list(KINDS)}"
        )
    activation, reduction, scaling = (config.get(k) for k in ("non_linearity", "reduction_factor", "scaling"))
    if activation not in ACTIVATIONS:
        faults.append(f"non_linearity is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if reduction is None or not is_number(reduction) or reduction <= 0:
        faults.append(f"reduction_factor is {reduction!r}, expected a positive number for all layers")
    if not is_number(scaling) and not (scaling == "learned" and config.get("is_parallel") is True):
        faults.append(f"scaling is {scaling!r}, expected a number, or 'learned' for a parallel adapter")
    left = config.get("leave_out", [])
    if not isinstance(left, list) or not all(map(is_whole, left)):
        faults.append(f"leave_out is {left!r}, expected numbers of layers")
    if faults:
        raise ValueError(f"{where} cannot be read:\n  " + "\n  ".join(faults))
    return config


def _shape(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(config.get(key) is True for key in ("mh_adapter", "is_parallel", "original_ln_before"))


def _method(config: Mapping[str, Any], base: Base) -> Method:
    learned = config["scaling"] == "learned"
    out = [
        s.path
        for s in base.spots.values()
        if set(map(int, re.findall(r"\.(\d+)\.", s.name))) & set(config.get("leave_out", []))
    ]
    return adapter(
        "scaled_parallel" if learned else KINDS[_shape(config)],
        reduction=config["reduction_factor"],
        activation=ACTIVATIONS[config["non_linearity"]],
        scale=None if learned else config["scaling"],
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
