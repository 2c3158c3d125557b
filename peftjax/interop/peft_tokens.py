"""Trained tokens as Hugging Face peft saves them: TrainableTokens, and those beside LoRA and its kin."""

from typing import Any, Iterator, Sequence

from peftjax.interop import config
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Extra, Format, Options, Tuned
from peftjax.interop.match import targets_of
from peftjax.interop.names import Spot
from peftjax.interop.slots import Part, Parts, constant
from peftjax.method import Method
from peftjax.methods.trainable_tokens import Tokens, trainable_tokens

DELTA = "trainable_tokens_delta"  # values, whatever peft calls them
HEAD = "lm_head"  # what torch calls a head that shares the table's weight
Ids = Sequence[int]


def _is_ids(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(config.is_whole(i) for i in x)


OPTIONS = {
    "token_indices": config.Option(None, _is_ids, "a list of integers"),
    "target_modules": config.names(),
}
INDICES = config.Option(
    None,
    lambda x: x is None or _is_ids(x) or (isinstance(x, dict) and bool(x) and all(map(_is_ids, x.values()))),
    "a list of integers, or a table from names to such lists",
)


def method(options: Options, base: Base) -> list[Method]:
    """The tokens of the target modules; by default, of the table of words."""
    chosen = base.kernels(options) if options["target_modules"] else [base.words("trained tokens")]
    return [trainable_tokens(options["token_indices"], targets=regex(base.leaves(chosen, "target_modules")))]


def beside(options: Options, base: Base, adapted: Sequence[Spot]) -> list[Method]:
    """The tokens that `trainable_token_indices` says, beside what else the options adapt.

    Raises:
      ValueError: it names no module, or one that is adapted or saved as a whole.
    """
    found: dict[tuple[int, ...], list[Spot]] = {}
    for spot, ids in _indices(options.get("trainable_token_indices"), base):
        if spot.module in {s.module for s in (*adapted, *base.saved(options.get("modules_to_save")))}:
            raise ValueError(f"trainable_token_indices names {spot.module}, which is adapted or saved as a whole too")
        found.setdefault(tuple(ids), []).append(spot)
    paths = lambda spots: regex(base.leaves(spots, "trainable_token_indices"))
    return [trainable_tokens(ids, targets=paths(spots)) for ids, spots in found.items()]


def _indices(said: Any, base: Base) -> list[tuple[Spot, Ids]]:
    if not said:
        return []
    if not isinstance(said, dict):
        return [(base.words("trained tokens"), said)]
    kernels = [spot for spot in base.spots.values() if spot.is_kernel]
    named = {name: [spot for spot in kernels if spot.module.endswith(name)] for name in said}
    made = [(spot, said[name]) for name, spots in named.items() for spot in spots]
    for name in (name for name, spots in named.items() if not spots):
        # A head that is the table has no weight of its own: the same tokens are the same rows.
        if not (HEAD.endswith(name) and any(s.is_tied and ids == said[name] for s, ids in made)):
            raise ValueError(
                f"trainable_token_indices names {name!r}, for which this model has no weight of its own, or other tokens "
                f"(nearest: {base.nearest(name)})"
            )
    return made


def _parts(last: str, of_head: bool) -> Parts:
    """The rows are (n, D); where a table is the head too, peft's own format holds them twice."""

    def parts(x: Tokens, spot: Spot) -> Iterator[Part]:
        order = ("token", "i" if spot.role.axes[x.axis] == "o" else "o")
        yield Part("rows", spot.of_module(last), order)
        if of_head and spot.is_tied:
            yield Part("rows", f"{HEAD}.{last}", order)

    return parts


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of these rows; of one module, its whole name as a regex, as peft names the table of words."""
    modules = [spot.module for _, _, spots in tuned for spot in spots]
    return {
        "token_indices": constant((list(x.ids) for _, x, _ in tuned), "tokens"),
        "target_modules": modules[0] if len(modules) == 1 else targets_of(modules, base.modules),
        "peft_type": "TRAINABLE_TOKENS",
    }


def _indices_page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The option that says these rows: by the shortest ending of each module's name that no other has."""
    found = {spot.module: list(x.ids) for _, x, spots in tuned for spot in spots}
    return {"trainable_token_indices": {_ending(module, base): ids for module, ids in found.items()}}


def _ending(module: str, base: Base) -> str:
    words = module.split(".")
    endings = [".".join(words[k:]) for k in reversed(range(len(words)))]
    alone = (e for e in endings if [m for m in base.modules if m.endswith(e)] == [module])
    return next(alone, module)


def plain(x: Tokens) -> Tokens:
    """The same rows at scale 1."""
    return x.folded() if (x.scale != 1).any() else x


FORMAT = Format(
    options=OPTIONS,
    method=method,
    parts={Tokens: _parts(DELTA, True)},
    page=page,
    plain={Tokens: plain},
    wraps=False,
)
EXTRA = Extra(parts={Tokens: _parts(f"token_adapter.{DELTA}", False)}, page=_indices_page, plain={Tokens: plain})
