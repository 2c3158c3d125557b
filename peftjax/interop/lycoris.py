"""What Hugging Face peft's LoHa and LoKr share: ranks and alphas by module, and convolutions."""

from collections import Counter
from typing import Any, Callable, Iterable, Sequence

from peftjax.interop import config
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Options, neat
from peftjax.interop.layout import window
from peftjax.interop.match import pattern_value, patterns_of, targets_of
from peftjax.interop.names import Spot
from peftjax.interop.slots import constant
from peftjax.method import Method


def _no_dropout(name: str) -> config.Option:
    said = f"0: {name} acts in training alone, and is not in peftjax; set it to 0 to use the adapter"
    return config.Option(0.0, lambda x: config.is_number(x) and x == 0, said)


OPTIONS = {
    **config.TARGETS,
    "r": config.whole(8, least=1),
    "alpha": config.number(8),
    "rank_pattern": config.RANKS,
    "alpha_pattern": config.ALPHAS,
    "rank_dropout": _no_dropout("rank_dropout"),
    "module_dropout": _no_dropout("module_dropout"),
    "use_effective_conv2d": config.flag(False),
}


def grouped(
    options: Options,
    spots: Sequence[Spot],
    base: Base,
    make: Callable[..., Method],
    outer: Callable[[Spot, int], dict[str, str]] = lambda spot, rank: {},
) -> list[Method]:
    """A method for each group of leaves with the same settings: `make(rank=, alpha=, targets=)`, and what `outer` adds.

    Raises:
      ValueError: the layers of a stacked leaf have different ranks or alphas, or only some of them are chosen.
    """
    value = lambda spot, name, key: pattern_value(options[f"{name}_pattern"] or {}, spot.module, options[key])
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path in base.leaves(spots, "target_modules"):
        found = [spot for spot in spots if spot.path == path]
        pairs = [(value(spot, "rank", "r"), value(spot, "alpha", "alpha")) for spot in found]
        rank, alpha = constant(pairs, f"the layers that {path} stacks have a rank and an alpha: they")
        more = outer(found[0], rank)
        groups.setdefault((rank, alpha, *more.items()), []).append(path)
    return [
        make(rank=rank, alpha=alpha, targets=regex(paths), **dict(more))
        for (rank, alpha, *more), paths in groups.items()
    ]


def check(spot: Spot, name: str) -> None:
    """Raises where peft has no such layer."""
    if spot.role.op == "embedding":
        raise ValueError(f"{spot.module} is a table; peft has {name} for linear layers and convolutions")
    if len(window(spot)) > 2:
        raise ValueError(
            f"{spot.module} is a convolution over {len(window(spot))} axes; peft has {name} for one and two"
        )


def wide(spot: Spot) -> bool:
    """Whether this is a convolution whose window has more than one tap."""
    return any(spot.shape[k] > 1 for k in window(spot))


def page(found: Iterable[tuple[str, int, float]], base: Base) -> dict[str, Any]:
    """The modules, ranks and alphas of updates, from each module's name, rank and scale: usual ones, others by name."""
    ranks, alphas = {}, {}
    for module, rank, scale in found:
        ranks[module], alphas[module] = rank, neat(scale * rank)
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": patterns_of(ranks, r),
        "alpha_pattern": patterns_of(alphas, alpha),
        "target_modules": targets_of(ranks, base.modules),
    }
