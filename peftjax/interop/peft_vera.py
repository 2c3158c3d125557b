"""VeRA as Hugging Face peft saves it."""

from typing import Any, Iterator, Sequence

import jax.numpy as jnp

from peftjax.interop import config
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Format, Options, Tuned, copies, times_scale, trained_whole
from peftjax.interop.match import targets_of
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part, constant
from peftjax.method import Method
from peftjax.methods.vera import VeRA, vera
from peftjax.overlay import Ref

OPTIONS = {
    **config.TARGETS,
    "r": config.whole(256, least=1),
    "vera_dropout": config.number(0.0),
    "d_initial": config.number(0.1),
    "bias": config.one_of("none", "none", "all", "vera_only"),
    "projection_prng_key": config.whole(0),
    "save_projection": config.Option(
        True,
        lambda x: x is True,
        "true: vera_A and vera_B are drawn by torch's generator where the file lacks them; save the adapter again, in "
        "peft, with save_projection=True",
    ),
}


def method(options: Options, base: Base) -> list[Method]:
    """VeRA on the target modules, and training of the modules and biases to save."""
    kernels = base.kernels(options)
    for spot in kernels:
        _check(spot)
    made = vera(
        options["r"],
        targets=regex(base.leaves(kernels, "target_modules")),
        d_init=options["d_initial"],
        dropout=options["vera_dropout"],
    )
    return [made, *trained_whole(options, base, kernels)]


def _check(spot: Spot) -> None:
    if spot.role.op != "linear":
        kind = "a table" if spot.role.op == "embedding" else "a convolution"
        raise ValueError(f"{spot.module} is {kind}; peft has VeRA for linear layers alone")


def parts(x: VeRA, spot: Spot) -> Iterator[Part]:
    """The vectors of a module; and the shared A (r, in) and B (out, r), which belong to none, from whoever holds them."""
    _check(spot)
    yield Part("d", spot.of_module("vera_lambda_d"), ("rank",))
    yield Part("b", spot.of_module("vera_lambda_b"), ("o",))
    if not isinstance(x.shared_a, Ref) and not any(spot.index):
        yield Part("shared_a", "vera_A", ("rank", "inputs"), "base_model.")
        yield Part("shared_b", "vera_B", ("outputs", "rank"), "base_model.")


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these vectors."""
    holders = [path for path, x, _ in tuned if not isinstance(x.shared_a, Ref)]
    if len(holders) > 1:
        raise ValueError(
            f"{' and '.join(holders)} hold random matrices of their own; peft's files hold one pair for all"
        )
    return {
        "r": tuned[0][1].d.shape[-1],
        "target_modules": targets_of({spot.module for _, _, spots in tuned for spot in spots}, base.modules),
        "vera_dropout": constant((x.dropout for _, x, _ in tuned), "dropout rates"),
        "save_projection": True,
        "peft_type": "VERA",
    }


def plain(x: VeRA) -> VeRA:
    """The same update with a scale of 1, which is all that peft's files can say."""
    return x.replace(b=times_scale(x, "b"), scale=jnp.ones_like(x.scale))


FORMAT = Format(
    options=OPTIONS,
    method=method,
    parts={VeRA: parts},
    page=page,
    beside=copies,
    plain={VeRA: plain},
    only="vera_only",
)
