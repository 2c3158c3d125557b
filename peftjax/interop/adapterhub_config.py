"""What AdapterHub's `adapter_config.json` says of a bottleneck adapter: every setting is of its type, and supported."""

from typing import Any, Mapping, NamedTuple

from peftjax.flat import near
from peftjax.interop.config import Option, flag, is_number, is_whole, whole

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


def _fixed(value: Any) -> Option:
    return Option(value, lambda x: x == value and isinstance(x, bool) == isinstance(value, bool), repr(value))


OTHERS = {key: _fixed(value) for key, value in FIXED.items()}
OPTIONS = {
    "mh_adapter": Option(None, lambda x: isinstance(x, bool), "true or false"),
    "is_parallel": flag(False),
    "original_ln_before": flag(False),
    "non_linearity": Option(
        None, lambda x: isinstance(x, str) and x in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"
    ),
    "reduction_factor": Option(None, lambda x: is_number(x) and x >= 1e-3, "a positive number for all layers, at least 0.001"),
    "scaling": Option(None, lambda x: is_number(x) or x == "learned", "a number, or 'learned' for a parallel adapter"),
    "leave_out": Option([], lambda x: isinstance(x, list) and all(map(is_whole, x)), "numbers of layers"),
}
MODEL = {
    "hidden_size": whole(None, least=1),
    "model_type": Option(None, lambda x: x is None or isinstance(x, str), "a text"),
}


class Page(NamedTuple):
    """An adapter's settings, kind and name, and of the model it was made for, what the page says."""

    settings: Mapping[str, Any]
    kind: str
    name: str
    hidden_size: int | None
    model_type: str | None


def read_config(page: Mapping[str, Any], where: str) -> tuple[Page | None, list[str]]:
    """A page, or None where it does not say which adapter it is of; and every fault.

    Raises:
      ValueError: it is no adapter's of AdapterHub.
    """
    config, name = page.get("config"), page.get("name")
    if not isinstance(config, dict) or not isinstance(name, str):
        raise ValueError(f"{where} is no adapter's of AdapterHub: expected `config`, an object, and `name`")
    settings = {key: config.get(key, option.default) for key, option in OPTIONS.items()}
    wrong = [fault for key, option in OPTIONS.items() for fault in option.faults(key, settings[key])] or _odd(settings)
    known = {*OPTIONS, *OTHERS, *REMARKS}
    more = [f for key, option in OTHERS.items() for f in option.faults(key, config.get(key, option.default))]
    more += [
        f"{k}={v!r} is not supported (nearest that is: {near(k, known)})" for k, v in config.items() if k not in known
    ]
    model = {key: page.get(key) for key in MODEL}
    more += [fault for key, option in MODEL.items() for fault in option.faults(key, model[key])]
    made = {key: None if MODEL[key].faults(key, value) else value for key, value in model.items()}
    return None if wrong else Page(settings, _kind(settings), name, **made), wrong + more


def _odd(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with settings that are each of their type."""
    faults = []
    if _shape(settings) not in KINDS:
        faults.append(
            f"(mh_adapter, is_parallel, original_ln_before) is {_shape(settings)}, expected one of {list(KINDS)}"
        )
    if settings["scaling"] == "learned" and not settings["is_parallel"]:
        faults.append("scaling is 'learned', expected a number, or 'learned' for a parallel adapter")
    return faults


def _shape(settings: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    return settings["mh_adapter"], settings["is_parallel"], settings["original_ln_before"]


def _kind(settings: Mapping[str, Any]) -> str:
    return "scaled_parallel" if settings["scaling"] == "learned" else KINDS[_shape(settings)]
