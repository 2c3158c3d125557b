"""AdaLoRA as Hugging Face peft saves it."""

import dataclasses
from typing import Any, Iterator, Sequence

import jax
import numpy as np

from peftjax.interop import config, peft_tokens
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Format, Options, Tuned, copies, scale_at, trained_whole
from peftjax.interop.match import targets_of
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part, constant
from peftjax.method import Method
from peftjax.methods.adalora import AdaLoRA, adalora
from peftjax.tree import map_leaves

EPSILON = 1e-5  # peft divides by the rank and this
TARGET = 8  # the target that peft writes where none was said, also where the start is lower
PATTERN = "a table from tensors' names to lists of true and false"
OPTIONS = {
    **config.TARGETS,
    "init_r": config.whole(12, least=1),
    "target_r": config.whole(TARGET, least=1),
    "lora_alpha": config.Option(8, lambda x: config.is_number(x) and x > 0, "a positive number"),
    "lora_dropout": config.number(0.0),
    "tinit": config.whole(0),
    "tfinal": config.whole(0),
    "deltaT": config.whole(1, least=1),
    "beta1": config.number(0.85),
    "beta2": config.number(0.85),
    "orth_reg_weight": config.number(0.5),
    "total_step": config.Option(None, lambda x: config.is_whole(x) and x > 0, "a positive integer"),
    "rank_pattern": config.Option(None, lambda x: x is None or _is_pattern(x), PATTERN),
    "bias": config.one_of("none", "none", "all", "lora_only"),
    "trainable_token_indices": peft_tokens.INDICES,
    "init_lora_weights": config.one_of(True, True, False),
    "r": config.whole(8),  # of LoRA, whose options these are too: it says nothing here
}


def _is_pattern(x: Any) -> bool:
    flags = lambda row: isinstance(row, list) and all(isinstance(flag, bool) for flag in row)
    return isinstance(x, dict) and all(map(flags, x.values()))


def method(options: Options, base: Base) -> list[Method]:
    """AdaLoRA on the target modules, and training of the modules and biases to save."""
    kernels = base.kernels(options)
    for spot in kernels:
        _check(spot)
    made = adalora(
        rank=options["init_r"],
        target_rank=_target(options),
        alpha=options["lora_alpha"],
        total_steps=options["total_step"],
        tinit=options["tinit"],
        tfinal=options["tfinal"],
        delta_t=options["deltaT"],
        beta1=options["beta1"],
        beta2=options["beta2"],
        orth_weight=options["orth_reg_weight"],
        dropout=options["lora_dropout"],
        targets=regex(base.leaves(kernels, "target_modules")),
        any_rank=True,
    )
    return [made, *trained_whole(options, base, kernels), *peft_tokens.beside(options, base, kernels)]


def _target(options: Options) -> int:
    """The mean rank in the end; peft's default is no wish of anyone's where the start is lower, and never prunes."""
    start, target = options["init_r"], options["target_r"]
    return start if target == TARGET and start < TARGET else target


def _check(spot: Spot) -> None:
    if spot.role.op == "embedding" or spot.role.groups > 1 or len(spot.role.window) not in (0, 2):
        raise ValueError(
            f"{spot.module} is a table, or a convolution of groups or of other than two axes; peft's AdaLoRA takes linear "
            "layers and plain convolutions over two axes"
        )


def begun(tuned: Any, options: Options, base: Base) -> Any:
    """The tree without the ranks that `rank_pattern` leaves out: a file does not hold them.

    Raises:
      ValueError: the pattern names what is not adapted, or has other than `init_r` entries.
    """
    pattern = options["rank_pattern"]
    if pattern is None:
        return tuned
    known = {_pattern_name(spot) for spot in base.kernels(options)}
    faults = [f"{name} is not adapted" for name in pattern if name not in known]
    faults += [f"{name} has {len(v)} entries" for name, v in pattern.items() if len(v) != options["init_r"]]
    if faults:
        raise ValueError(f"rank_pattern does not fit, with init_r={options['init_r']}: {'; '.join(faults)}")

    def cut(path: str, x: Any) -> Any:
        if not isinstance(x, AdaLoRA):
            return x
        kept = np.array(x.kept)
        for spot in base.at(path):
            kept[spot.index] = pattern.get(_pattern_name(spot), kept[spot.index])
        stays = lambda name: np.where(_along(x, name, kept), np.asarray(getattr(x, name)), np.float32(0))
        return x.replace(a=stays("a"), b=stays("b"), kept=jax.device_put(kept, x.kept.sharding))

    return map_leaves(cut, tuned)


def _along(x: AdaLoRA, name: str, kept: np.ndarray) -> np.ndarray:
    """`kept` with axes of size 1 where only the field has an axis."""
    own, axes = x.labels()["kept"], x.labels()[name]
    turned = kept.transpose([own.index(label) for label in axes if label in own])
    sizes = iter(turned.shape)
    return turned.reshape([next(sizes) if label in own else 1 for label in axes])


def _pattern_name(spot: Spot) -> str:
    return spot.of_module("lora_E")


def _ranks(x: AdaLoRA, spot: Spot) -> list[bool]:
    """Which ranks a file holds: those that are kept, and those that came back since."""
    return (np.asarray(x.kept)[spot.index] | (np.asarray(x.e)[spot.index] != 0)).tolist()


def parts(x: AdaLoRA, spot: Spot) -> Iterator[Part]:
    """A is (r, in), E (r, 1) and B (out, r), of the ranks that are kept."""
    _check(spot)
    held = np.flatnonzero(_ranks(x, spot)).tolist()
    yield Part("a", spot.of_module("lora_A"), ("rank", "i"), ranks=held)
    yield Part("e", spot.of_module("lora_E"), ("rank", 1), ranks=held)
    yield Part("b", spot.of_module("lora_B"), ("o", "rank"), ranks=held)


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these products."""
    held = [(x, spot) for _, x, spots in tuned if isinstance(x, AdaLoRA) for spot in spots]
    rank = constant((x.e.shape[-1] for x, _ in held), "ranks at the start")
    plan = constant((dataclasses.replace(x.plan, owner=None) for x, _ in held), "plans of pruning")
    scale = constant((scale_at(x, spot) for x, spot in held), "scales")
    if not scale > 0:
        raise ValueError(f"the update's scale is {scale}; peft's AdaLoRA has positive ones alone")
    pattern = {_pattern_name(spot): _ranks(x, spot) for x, spot in held}
    return {
        "init_r": rank,
        "target_r": plan.target_rank,
        "lora_alpha": _alpha(scale, rank),
        "lora_dropout": constant((x.dropout for x, _ in held), "dropout rates"),
        "total_step": plan.total_steps,
        "tinit": plan.tinit,
        "tfinal": plan.tfinal,
        "deltaT": plan.delta_t,
        "beta1": plan.beta1,
        "beta2": plan.beta2,
        "orth_reg_weight": constant((x.orth_weight for x, _ in held), "weights of the penalty"),
        "rank_pattern": None if all(all(flags) for flags in pattern.values()) else pattern,
        "target_modules": targets_of([spot.module for _, spot in held], base.modules),
        "init_lora_weights": True,
        "peft_type": "ADALORA",
    }


def _alpha(scale: float, rank: int) -> int | float:
    """The shortest alpha that makes this scale, to the bit."""
    makes = lambda alpha: np.float32(alpha / (rank + EPSILON)) == np.float32(scale)
    exact = scale * (rank + EPSILON)
    found = next((alpha for k in range(12) if makes(alpha := round(exact, k))), exact)
    return int(found) if found == int(found) else found


FORMAT = Format(
    options=OPTIONS,
    method=method,
    parts={AdaLoRA: parts},
    page=page,
    beside=copies,
    begun=begun,
    extra=peft_tokens.EXTRA,
)
