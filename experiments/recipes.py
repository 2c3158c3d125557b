"""The methods that the scripts of texts offer, from a page of settings: the block of a method holds its arguments."""

import inspect
from typing import Any, Mapping

import ml_collections

import peftjax as pj

HEAD = "classifier"
SECOND = r".*/layer/\d+/output/dense"  # the second layer of each feed-forward block

# What a method has to be told of the model beside its block.
FIXED: dict[str, dict[str, Any]] = {
    "ia3": {"targets": rf".*/(key|value)|{SECOND}", "feedforward": SECOND},
    "prompt": {"targets": ("word_embeddings",)},
    "p_tuning": {"targets": ("word_embeddings",)},
}
# The methods, each a function of peftjax, and the argument that says how large it is, where there is one.
METHODS: dict[str, str | None] = {
    "lora": "rank",
    "dora": "rank",
    "adalora": "rank",
    "vera": "rank",
    "loha": "rank",
    "lokr": "rank",
    "oft": "block_size",
    "adapter": "bottleneck",
    "compacter": "bottleneck",
    "reft": "rank",
    "prefix": "length",
    "prompt": "length",
    "p_tuning": "length",
    "ia3": None,
    "layer_norm": None,
}
SCRATCH = "scratch"  # full fine-tuning of a network without pretraining
NAMES = (*METHODS, "bitfit", "head", "full", SCRATCH)


def method(c: ml_collections.ConfigDict, steps: int) -> pj.Method:
    """The method that a page names, and the new head, which every method trains.

    Args:
      c: a page; `c.method` is one of `NAMES`, and its block holds what else there is to say.
      steps: of the whole run.

    Raises:
      ValueError: another name, or an argument that the method does not take.
    """
    if c.method not in NAMES:
        raise ValueError(f"method {c.method!r}; expected one of {', '.join(NAMES)}")
    if c.method in ("full", SCRATCH):
        return pj.full()
    if c.method == "head":
        return pj.unfreeze(HEAD)
    if c.method == "bitfit":
        return pj.chain(pj.bitfit(), pj.unfreeze(f"{HEAD}/kernel"))
    block = c[c.method].to_dict() if c.method in c else {}
    check(c.method, block)
    given = {**FIXED.get(c.method, {}), **block}
    given |= {"total_steps": steps} if c.method == "adalora" else {}
    try:
        return pj.chain(getattr(pj, c.method)(**given), pj.unfreeze(HEAD))
    except TypeError as error:
        raise ValueError(f"method {c.method!r}: {error}") from error


def check(name: str, given: Mapping[str, Any]) -> None:
    """Looks at arguments of a method, which its block may hold beside those of the page.

    Raises:
      ValueError: one that peftjax's function does not take, or that the run itself gives, or a word that is no number.
    """
    taken = {k: x.default for k, x in inspect.signature(getattr(pj, name)).parameters.items() if k != "total_steps"}
    for argument, x in given.items():
        if argument not in taken:
            raise ValueError(f"method {name!r} has no argument {argument!r}, only {', '.join(taken) or 'none'}")
        usual = taken[argument]
        if isinstance(usual, (bool, float, int)) and not _alike(x, usual):
            kind = "True or False" if isinstance(usual, bool) else "a number"
            raise ValueError(f"method {name!r}, {argument} {x!r}: expected {kind}, such as {usual!r}")


def _alike(x: Any, usual: Any) -> bool:
    return isinstance(x, (float, int)) and isinstance(x, bool) == isinstance(usual, bool)
