"""Fine-tunes a small part of any pretrained JAX model: functions of parameter pytrees, unchanged."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftjax.attach import attach as attach
from peftjax.check import check as check
from peftjax.evaluate import explain as explain
from peftjax.evaluate import wrap as wrap
from peftjax.flat import extract as extract
from peftjax.flat import insert as insert
from peftjax.gradient import value_and_grad as value_and_grad
from peftjax.grafting import graft as graft
from peftjax.merging import merge as merge
from peftjax.method import Method as Method
from peftjax.method import chain as chain
from peftjax.methods.adapter import adapter as adapter
from peftjax.methods.adalora import adalora as adalora
from peftjax.methods.compacter import compacter as compacter
from peftjax.methods.dora import dora as dora
from peftjax.methods.ia3 import ia3 as ia3
from peftjax.methods.loha import loha as loha
from peftjax.methods.lokr import lokr as lokr
from peftjax.methods.lora import lora as lora
from peftjax.methods.oft import oft as oft
from peftjax.methods.p_tuning import p_tuning as p_tuning
from peftjax.methods.prefix import prefix as prefix
from peftjax.methods.prompt import prompt as prompt
from peftjax.methods.reft import reft as reft
from peftjax.methods.trainable_tokens import trainable_tokens as trainable_tokens
from peftjax.methods.selective import bitfit as bitfit
from peftjax.methods.selective import full as full
from peftjax.methods.selective import head as head
from peftjax.methods.selective import last_layers as last_layers
from peftjax.methods.selective import layer_norm as layer_norm
from peftjax.methods.unfreeze import unfreeze as unfreeze
from peftjax.methods.vera import vera as vera
from peftjax.overlay import Overlay as Overlay
from peftjax.overlay import Ref as Ref
from peftjax.roles import Role as Role
from peftjax.roles import Roles as Roles
from peftjax.roles import roles as roles
from peftjax.summary import count as count
from peftjax.summary import describe as describe
from peftjax.switches import disable as disable
from peftjax.switches import lock as lock
from peftjax.switches import scale as scale
from peftjax.switches import with_key as with_key
from peftjax.settling import fold as fold
from peftjax.settling import settle as settle
from peftjax.tokens import wrap_tokens as wrap_tokens
from peftjax.tree import combine as combine
from peftjax.tree import labels as labels
from peftjax.tree import mask as mask
from peftjax.tree import partition as partition
from peftjax.tree import strip as strip

if TYPE_CHECKING:
    from peftjax.checkpoint import load as load
    from peftjax.checkpoint import save as save
    from peftjax.optim import groups as groups
    from peftjax.optim import layerwise as layerwise
    from peftjax.optim import lora_plus as lora_plus
    from peftjax.optim import train_only as train_only
    from peftjax.training import TrainState as TrainState
    from peftjax.training import TrainStep as TrainStep
    from peftjax.training import make_train_step as make_train_step
    from peftjax.training import train_state as train_state

__version__ = "0.1.0"

# These import optax and safetensors; the rest imports jax alone.
_ON_USE = {
    **dict.fromkeys(("save", "load"), "peftjax.checkpoint"),
    **dict.fromkeys(("train_only", "groups", "lora_plus", "layerwise"), "peftjax.optim"),
    **dict.fromkeys(("TrainState", "TrainStep", "make_train_step", "train_state"), "peftjax.training"),
}


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(import_module(_ON_USE[name]), name)
    raise AttributeError(f"module 'peftjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_USE})
