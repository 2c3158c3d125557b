"""OFT as Hugging Face peft saves it."""

import math
from typing import Any, Iterator, Mapping, Sequence

from peftjax.interop import config
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Format, Options, Tuned, copies, trained_whole
from peftjax.interop.layout import inputs, is_conv1d, outputs, window
from peftjax.interop.match import targets_of
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part, constant
from peftjax.method import Method
from peftjax.methods.oft import OFT, oft

# Since then, peft sums the series as it is here; it warns of files that do not say their version.
SERIES_SINCE, VERSION = (0, 18), "0.21.2"
OPTIONS = {
    **config.TARGETS,
    "r": config.whole(0),
    "oft_block_size": config.Option(None, config.is_whole, "an integer: files without it are of peft 0.13 or older"),
    "bias": config.one_of("none", "none", "all", "oft_only"),
    "module_dropout": config.number(0.0),  # stored, and applied nowhere in peft
    "coft": config.flag(False),
    "eps": config.number(6e-5),
    "block_share": config.flag(False),
    "use_cayley_neumann": config.flag(True),
    "num_cayley_neumann_terms": config.whole(5, least=1),
    "peft_version": config.Option(None, lambda x: x is None or isinstance(x, str), "a version"),
}


def method(options: Options, base: Base) -> list[Method]:
    """OFT on the target modules, and training of the modules and biases to save."""
    kernels = base.kernels(options)
    settings = {"share": options["block_share"], "neumann_terms": series(options)}
    settings["eps"] = options["eps"] if options["coft"] else None
    groups: dict[int, list[str]] = {}
    for path in base.leaves(kernels, "target_modules"):
        size = constant((block_size(width(s), options) for s in kernels if s.path == path), f"the blocks of {path}")
        groups.setdefault(size, []).append(path)
    made = [oft(block_size=size, targets=regex(paths), **settings) for size, paths in groups.items()]
    return [*made, *trained_whole(options, base, kernels)]


def series(options: Options) -> int | None:
    """How many terms of the series are summed; peft sums as many for 3 as for 4. None for the inverse.

    Raises:
      ValueError: fewer than 3 terms, or a version of peft that summed them otherwise.
    """
    if not options["use_cayley_neumann"]:
        return None
    terms, version = options["num_cayley_neumann_terms"], options["peft_version"]
    if terms < 3:
        raise ValueError(f"num_cayley_neumann_terms is {terms}, expected at least 3")
    if _numbers(version) < SERIES_SINCE:
        raise ValueError(
            f"use_cayley_neumann with peft_version={version!r}: peft summed the series otherwise before 0.18. If the "
            "adapter was trained with the inverse, say use_cayley_neumann false"
        )
    return max(terms, 4)


def _numbers(version: str | None) -> tuple[int, ...]:
    parts = (version or "0").partition("@")[0].split(".")[:2]
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)


def width(spot: Spot) -> int:
    """The number of features that are turned.

    Raises:
      ValueError: peft has no OFT of such a layer, or one that no weight stands for.
    """
    if spot.role.groups > 1 or len(window(spot)) not in (0, 2):
        raise ValueError(
            f"{spot.module} is a convolution over one or three axes, or a grouped one, which peft's OFT lacks"
        )
    if any(spot.shape[k] > 1 for k in window(spot)):
        raise ValueError(
            f"{spot.module} is a convolution with a window; peft adds up turned patches where they overlap, which is "
            "another function than what it merges, and no weight. 1 x 1 convolutions and linear layers are read"
        )
    if spot.is_tied:
        raise ValueError(f"{spot.module} is table and head in one; peft's OFT acts on the table alone")
    if is_conv1d(spot):
        raise ValueError(
            f"{spot.module} is a Conv1D, (in, out) in torch; peft has OFT for Linear, Conv2d and Embedding"
        )
    return math.prod(spot.shape[k] for k in (outputs(spot) if spot.role.op == "embedding" else inputs(spot)))


def block_size(features: int, options: Mapping[str, Any]) -> int:
    """The size of a module's blocks: what the options ask for, or the divisor near it that peft takes in its place.

    Raises:
      ValueError: both of r and oft_block_size are given, or neither.
    """
    rank, size = options["r"], options["oft_block_size"]
    if (rank == 0) == (size == 0):
        raise ValueError(f"r is {rank} and oft_block_size {size}; expected one of them, and 0 for the other")
    return adjusted(features, size) if size else features // adjusted(features, rank)


def adjusted(features: int, wanted: int) -> int:
    """The divisor nearest to a number, of two the smaller; the whole where the number is too large."""
    divisors = [n for n in range(1, features + 1) if features % n == 0]
    return features if wanted >= features else min(divisors, key=lambda n: (abs(n - wanted), n))


def parts(x: OFT, spot: Spot) -> Iterator[Part]:
    """The triangles are (blocks, size (size - 1) / 2); a table's have a name of their own."""
    width(spot)
    name = "oft_embedding_R.weight" if spot.role.op == "embedding" else "oft_R.weight"
    yield Part("upper", spot.of_module(name), ("block", "entry"))


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these turns."""
    if scaled := [path for path, x, _ in tuned if not (x.scale == 1).all()]:
        raise ValueError(f"{', '.join(scaled)}: peft's OFT has no scale, and these are not at scale 1")
    terms = constant((x.series for _, x, _ in tuned), "numbers of terms of the series")
    if terms is not None and terms < 4:
        raise ValueError(f"{terms} terms of the series, of which peft sums 4 or more")
    eps = constant((x.eps for _, x, _ in tuned), "norms that constrain")
    several = [x for _, x, spots in tuned if width(spots[0]) > x.size]
    found = {spot.module: (width(spot), x.size) for _, x, spots in tuned for spot in spots}
    return {
        **_asked(list(found.values())),
        "target_modules": targets_of(found, base.modules),
        "block_share": bool(several) and constant((x.shares for x in several), "whether blocks are shared: they"),
        "coft": eps is not None,
        "eps": 6e-5 if eps is None else eps,
        "use_cayley_neumann": terms is not None,
        "num_cayley_neumann_terms": 5 if terms is None else terms,
        "peft_version": VERSION,
        "peft_type": "OFT",
    }


def _asked(found: Sequence[tuple[int, int]]) -> dict[str, int]:
    """The one size, or number, of blocks that gives each module, of so many features, blocks of its size."""
    most = max(features for features, _ in found)
    for key, other in (("oft_block_size", "r"), ("r", "oft_block_size")):
        for number in sorted(range(1, most + 1), key=lambda n: n not in {size for _, size in found}):
            options = {key: number, other: 0}
            if all(block_size(features, options) == size for features, size in found):
                return options
    raise ValueError(
        f"blocks of {', '.join(f'{size} of {features}' for features, size in sorted(set(found)))} features: peft's files "
        "have one size, or one number, of blocks for all modules"
    )


FORMAT = Format(options=OPTIONS, method=method, parts={OFT: parts}, page=page, beside=copies, only="oft_only")
