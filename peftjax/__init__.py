"""Fine-tunes a small part of any pretrained JAX model: functions of parameter pytrees, unchanged."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftjax.attach import attach as attach
from peftjax.check import check as check
from peftjax.evaluate import explain as explain, wrap as wrap
from peftjax.flat import extract as extract, insert as insert
from peftjax.gradient import value_and_grad as value_and_grad
from peftjax.grafting import graft as graft
from peftjax.merging import merge as merge
from peftjax.method import Method as Method, chain as chain
from peftjax.methods.lora import lora as lora
from peftjax.methods.unfreeze import bitfit as bitfit, full as full, head as head
from peftjax.methods.unfreeze import last_layers as last_layers, layer_norm as layer_norm, unfreeze as unfreeze
from peftjax.overlay import Overlay as Overlay, Ref as Ref
from peftjax.roles import Role as Role, Roles as Roles, roles as roles
from peftjax.summary import count as count, describe as describe
from peftjax.switches import disable as disable, lock as lock, scale as scale, with_key as with_key
from peftjax.tree import combine as combine, labels as labels, mask as mask, partition as partition, strip as strip

if TYPE_CHECKING:
    from peftjax.checkpoint import load as load, save as save
    from peftjax.optim import groups as groups, layerwise as layerwise, lora_plus as lora_plus, train_only as train_only

__version__ = "0.1.0"

# These import optax and safetensors; the rest imports jax alone.
_ON_USE = {
    **dict.fromkeys(("save", "load"), "peftjax.checkpoint"),
    **dict.fromkeys(("train_only", "groups", "lora_plus", "layerwise"), "peftjax.optim"),
}


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(import_module(_ON_USE[name]), name)
    raise AttributeError(f"module 'peftjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_USE})
