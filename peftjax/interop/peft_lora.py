"""LoRA and DoRA as Hugging Face peft saves them."""

import math
from collections import Counter
from typing import Any, Iterator, Sequence

import jax.numpy as jnp

from peftjax.interop import config, peft_tokens
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import (
    Format,
    Options,
    Tuned,
    at_full_scale,
    copies,
    neat,
    scale_at,
    times_scale,
    trained_whole,
)
from peftjax.interop.layout import whole, window
from peftjax.interop.match import pattern_value, patterns_of, targets_of
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part, constant
from peftjax.method import Method
from peftjax.methods.dora import DoRA, dora
from peftjax.methods.lora import LoRA, Shift, lora

OPTIONS = {
    **config.TARGETS,
    "r": config.whole(8, least=1),
    "lora_alpha": config.number(8),
    "lora_dropout": config.number(0.0),
    "rank_pattern": config.RANKS,
    "alpha_pattern": config.ALPHAS,
    "use_rslora": config.flag(False),
    "use_dora": config.flag(False),
    "bias": config.one_of("none", "none", "all", "lora_only"),
    "lora_bias": config.flag(False),
    "trainable_token_indices": peft_tokens.INDICES,
    # "eva" chooses A from data, and leaves W; "corda", "lora_ga" and "loftq" change W by what no file holds.
    "init_lora_weights": config.one_of(True, True, False, "gaussian", "eva", "orthogonal", "pissa", "olora"),
}


def method(options: Options, base: Base) -> list[Method]:
    """LoRA on the target modules, and training of the modules and biases to save."""
    kernels = base.kernels(options)
    if options["lora_bias"]:
        _check_biases(options, kernels)
    groups: dict[tuple[Any, ...], list[Spot]] = {}
    for spot in kernels:
        if spot.role.groups > 1:
            raise ValueError(f"{spot.module} is a grouped convolution, of which peft reads all channels for each group")
        groups.setdefault((uses(spot), chosen_layers(spot, kernels)), []).append(spot)
    made = [_lora(options, spots, *key) for key, spots in groups.items()]
    return [*made, *trained_whole(options, base, kernels), *peft_tokens.beside(options, base, kernels)]


def _check_biases(options: Options, kernels: Sequence[Spot]) -> None:
    if options["use_dora"] or options["bias"] != "none":
        raise ValueError(
            "lora_bias trains what is added to the biases of adapted modules, which use_dora has no place for, and "
            f"bias={options['bias']!r} may train already; expected use_dora false, and bias 'none'"
        )
    if bare := [spot.module for spot in kernels if spot.role.bias is None]:
        raise ValueError(f"lora_bias is added to the bias of a module; {', '.join(bare[:5])} have none in this model")


def uses(spot: Spot) -> tuple[str, ...] | None:
    """Peft updates a table where it is looked up, and not where it is the head as well."""
    return ("gather",) if spot.is_tied else None


def chosen_layers(spot: Spot, chosen: Sequence[Spot]) -> tuple[int, ...] | None:
    """Of a leaf that stacks layers, those that are chosen; None where all are."""
    if "s" not in spot.role.axes:
        return None
    numbers = tuple(sorted({s.index[0] for s in chosen if s.path == spot.path}))
    return None if len(numbers) == spot.shape[spot.role.axes.index("s")] else numbers


def by_path(spots: Sequence[Spot], patterns: Any, default: Any, what: str) -> dict[str, Any]:
    """The value at each leaf, where it is not the default.

    Raises:
      ValueError: the layers of a stacked leaf have different values.
    """
    values: dict[str, list[Any]] = {}
    for spot in spots:
        values.setdefault(spot.path, []).append(pattern_value(patterns or {}, spot.module, default))
    found = {path: constant(v, f"the layers that {path} stacks have a {what}: they") for path, v in values.items()}
    return {regex([path]): value for path, value in found.items() if value != default}


def _lora(options: Options, spots: Sequence[Spot], uses: Any, layers: Any) -> Method:
    init = options["init_lora_weights"]
    settings = dict(
        rank=options["r"],
        alpha=options["lora_alpha"],
        targets=regex(list(dict.fromkeys(spot.path for spot in spots))),
        rslora=options["use_rslora"],
        dropout=options["lora_dropout"],
        init=init if init in ("pissa", "olora") else "kaiming",
        rank_pattern=by_path(spots, options["rank_pattern"], options["r"], "rank"),
        alpha_pattern=by_path(spots, options["alpha_pattern"], options["lora_alpha"], "alpha"),
        layers=layers,
        any_rank=True,
    )
    if not options["use_dora"]:
        return lora(**settings, uses=uses, bias=options["lora_bias"])
    if uses:
        raise ValueError(
            f"use_dora on {spots[0].module}, which is table and head in one; peft's acts on the table alone"
        )
    return dora(**settings)


def parts(x: Any, spot: Spot) -> Iterator[Part]:
    """A is (r, in) and B is (out, r); a table's have names of their own, a convolution's A has its window."""
    if isinstance(x, Shift):
        yield Part("shift", spot.of_module("lora_B.bias"), whole(spot))
        return
    op, size = spot.role.op, [1] * len(window(spot)) if spot.role.op == "conv" else []
    a, b = ("lora_embedding_A", "lora_embedding_B") if op == "embedding" else ("lora_A.weight", "lora_B.weight")
    yield Part("a", spot.of_module(a), ("rank", "c", "x") if op == "conv" else ("rank", "i"))
    yield Part("b", spot.of_module(b), ("o", "rank", *size))
    if isinstance(x, DoRA):
        yield Part("m", spot.of_module("lora_magnitude_vector"), (1, "o", *size) if op == "conv" else ("o",))


def ranks(tuned: Sequence[Tuned]) -> dict[str, tuple[int, float]]:
    """The rank and the scale of each module."""
    found = {}
    for _, x, spots in tuned:
        rank = x.a.shape[x.labels()["a"].index("rank")]
        ratio = x.ratio if isinstance(x, DoRA) else 1.0
        for spot in spots:
            found[spot.module] = (rank, ratio * scale_at(x, spot))
    return found


def rank_page(found: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Ranks, and alphas that make these scales: the usual ones, and the others by name.

    `alpha / sqrt(r)` is chosen where it alone makes every alpha a whole number.
    """
    plain = {module: neat(scale * rank) for module, (rank, scale) in found.items()}
    rooted = {module: neat(scale * math.sqrt(rank)) for module, (rank, scale) in found.items()}
    whole = lambda alphas: all(isinstance(alpha, int) for alpha in alphas.values())
    rslora = whole(rooted) and not whole(plain)
    alphas = rooted if rslora else plain
    rank, alpha = (Counter(v).most_common(1)[0][0] for v in ([r for r, _ in found.values()], list(alphas.values())))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": patterns_of({module: r for module, (r, _) in found.items()}, rank),
        "alpha_pattern": patterns_of(alphas, alpha),
        "use_rslora": rslora,
    }


def plain(x: LoRA | DoRA) -> LoRA | DoRA:
    """The same update without the product it started from, which peft's files do not hold: as further ranks.

    Of LoRA, alpha says the scale; one of DoRA moves the magnitude too, so it is at 1.
    """
    if isinstance(x, DoRA) and (x.scale != 1).any():
        before, products = x.norms()[0], ["b"] if x.b0 is None else ["b", "b0"]
        scaled = {name: times_scale(x, name) for name in products}
        x = at_full_scale(x, "m", before).replace(**scaled)
    if x.a0 is None:
        return x
    join = lambda name, one, other: jnp.concatenate([one, other], x.labels()[name].index("rank"))
    return x.replace(a=join("a", x.a, x.a0), b=join("b", x.b, -x.b0), a0=None, b0=None)


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these updates."""
    shifts = [each for each in tuned if isinstance(each[1], Shift)]
    tuned = [each for each in tuned if not isinstance(each[1], Shift)]
    found, kinds = ranks(tuned), {type(x) for _, x, _ in tuned}
    _check_shifts(shifts, found)
    if len(kinds) > 1:
        raise ValueError("some overlays are LoRA and others DoRA; peft's files hold one kind")
    return {
        "use_dora": kinds == {DoRA},
        **rank_page(found),
        "target_modules": targets_of(found, base.modules),
        "lora_dropout": constant((x.dropout for _, x, _ in tuned), "dropout rates"),
        "lora_bias": bool(shifts),
        "init_lora_weights": True,
        "peft_type": "LORA",
    }


def _check_shifts(shifts: Sequence[Tuned], found: dict[str, tuple[int, float]]) -> None:
    """A bias of B is in all modules or in none, with their scale."""
    scales = {spot.module: scale_at(x, spot) for _, x, spots in shifts for spot in spots}
    if scales and (bare := sorted(set(found) - set(scales))):
        raise ValueError(
            f"LoRA has a bias in {min(scales)} and others, and none in {', '.join(bare)}; peft's files say one"
        )
    if other := [
        m for m, scale in scales.items() if m not in found or not math.isclose(scale, found[m][1], rel_tol=1e-6)
    ]:
        raise ValueError(
            f"the scale of LoRA's bias is not that of its product in {', '.join(other)}; peft has one for both"
        )


FORMAT = Format(
    options=OPTIONS,
    method=method,
    parts={LoRA: parts, DoRA: parts, Shift: parts},
    page=page,
    beside=copies,
    extra=peft_tokens.EXTRA,
    plain={LoRA: plain, DoRA: plain},
)
