"""Runs a function whose parameters are overlays: traces it on the logical types, then evaluates what was traced."""

import dataclasses
import functools
import warnings
from collections import Counter
from typing import Any, Callable, ParamSpec, Sequence, TypeVar

import jax

from peftjax import compat
from peftjax.call import Call
from peftjax.evaluator import LIVE, Evaluator, Event
from peftjax.hooked import carried
from peftjax.overlay import Output, Table, is_overlay, layers, type_of
from peftjax.streams import streams
from peftjax.weight import expand

P = ParamSpec("P")
R = TypeVar("R")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Passed:
    """Stands, in a program's outputs, for the dynamic argument that came through untouched."""

    index: int


def wrap(fn: Callable[P, R]) -> Callable[P, R]:
    """Returns `fn` for trees with overlays: it runs as if each overlay were the array that it stands for.

    `wrap(fn)(tuned, x)` equals `fn(merge(tuned), x)`, without the merged weights: where an equation of `fn` uses an
    overlay, the overlay's own rule runs, `x W + s (x A) B` for LoRA. Where no rule fits, the overlay is merged at that
    equation; `peftjax.explain` lists it.

    Dropout in overlays draws from keys that the tree holds, `wrap(fn)(peftjax.with_key(tuned, key), x)`, and not from an
    argument: one called `key` is fn's own. A tree without keys is deterministic.

    Args:
      fn: any function that `jax.jit` could trace, `fn(params, *args, **kwargs)`. Every array among its arguments is
        traced; everything else (Python numbers, strings, None) is static and reaches it untouched.

    Returns:
      The function. Its outputs have fn's types; an overlay that fn returns untouched comes back as the same overlay.
      Outside `jax.jit` it is compiled once per tree, types and static arguments.

    Raises:
      Exception: whatever `fn` raises when it is traced.
      ValueError: an overlay of outputs or of a table's rows does not meet what it acts on; one that acts on tokens, for
        which there is `peftjax.wrap_tokens`; one part of `partition` in the place of the tree; an overlay with a dropout
        key where it would have to be merged.

    Warns:
      UserWarning: an overlay of a weight stands on a leaf that `fn` never uses.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: x @ params["w"]
      >>> params = {"w": jnp.ones((3, 2))}
      >>> tuned = pj.lora(rank=1).init(jax.random.key(0), params)
      >>> pj.wrap(fn)(tuned, jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """
    return runner(fn, functools.partial(_evaluate, fn))


Evaluate = Callable[[Call, Sequence[Any]], tuple[Any, Evaluator]]


def runner(fn: Callable[P, R], evaluate: Evaluate, before: Callable[[Call], None] | None = None) -> Callable[P, R]:
    """The function of a tree with overlays that `evaluate` runs; without an overlay, `fn` itself.

    `before(call)` sees the arguments of every call, with their values where they have any.
    """
    programs: dict[Any, Any] = {}

    @functools.wraps(fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        call = Call.of(params, args, kwargs)
        if not any(map(is_overlay, call.leaves)):
            return fn(params, *args, **kwargs)  # type: ignore[call-arg]
        if before is not None:
            before(call)
        given = [call.leaves[k] for k in call.dynamic]
        if any(map(compat.is_traced, jax.tree.leaves(given))):
            out = _warning(evaluate, call, given)
        else:
            out = _program(programs, evaluate, call)(*given)
        came = lambda x: call.given[call.dynamic[x.index]] if isinstance(x, Passed) else x
        return jax.tree.map(came, out, is_leaf=_is_passed)

    wrapped.evaluate = evaluate  # type: ignore[attr-defined]
    return wrapped  # type: ignore[return-value]


def _is_passed(x: Any) -> bool:
    return isinstance(x, Passed)


def _program(programs: dict[Any, Any], evaluate: Evaluate, call: Call) -> Any:
    # A program serves calls of other shapes too: what it traces has the types of each, not those of the first.
    make = lambda: jax.jit(lambda *given: _warning(evaluate, call.having(given), given))
    try:
        key = call.static
        if key not in programs:
            programs[key] = make()
        return programs[key]
    except TypeError:  # an unhashable static argument: traced anew each time, as jit could not cache it either
        return make()


def _warning(evaluate: Evaluate, call: Call, given: Sequence[Any]) -> Any:
    out, evaluator = evaluate(call, given)
    if evaluator.idle:
        warnings.warn(f"the overlays at {', '.join(evaluator.idle)} do nothing: this function never uses these leaves")
    return out


def _evaluate(fn: Any, call: Call, given: Sequence[Any]) -> tuple[Any, Evaluator]:
    for k, x in zip(call.dynamic, given):
        if needs := [o for o in layers(x) if o.virtual or o.sequential]:
            raise ValueError(
                f"{call.paths.get(k)} holds {needs[0]!r}, which acts on the tokens of a sequence, and `wrap` does not know "
                "them; expected `peftjax.wrap_tokens(fn, ids=..., mask=...)(tuned, ...)`, which names the arguments"
            )
    closed, shape = traced(fn, call, [type_of(x) for x in given])
    return evaluated(closed, shape, call, given)


def traced(fn: Any, call: Call, types: Sequence[Any]) -> tuple[Any, Any]:
    """The function's jaxpr on arguments of these types, and the tree of its outputs' types."""

    def flat(*arrays: Any) -> Any:
        params, args, kwargs = call.filled(arrays)
        return fn(params, *args, **kwargs)

    return jax.make_jaxpr(flat, return_shape=True)(*types)


def evaluated(closed: Any, shape: Any, call: Call, given: Sequence[Any], sequence: Any = None) -> tuple[Any, Evaluator]:
    """The outputs of a traced function on arguments with overlays; `sequence` says where its equations have tokens."""
    paths = [call.paths.get(k, f"argument {k}") for k in call.dynamic]
    names = {p: _named(x) for p, x in zip(paths, given) if is_overlay(x)}
    stacks = [o for x in given for o in layers(x)]
    waits = any(isinstance(o, Output) and o.where == "residual" for o in stacks)
    sums = streams(closed, [k in call.paths for k in call.dynamic]) if waits else None
    evaluator = Evaluator(names, any(isinstance(o, Table) for o in stacks), sequence, sums)
    tails = [p for p, x in zip(paths, given) if any(isinstance(o, (Output, Table)) for o in layers(x))]
    if tails:
        values = [carried(x, p) if k in call.paths else x for k, x, p in zip(call.dynamic, given, paths)]
    else:
        values = [expand(x, p) if is_overlay(x) else x for x, p in zip(given, paths)]
    outs = evaluator.run(closed, values)
    at = {id(v): k for k, v in enumerate(values) if isinstance(v, LIVE)}
    outs = [Passed(at[id(x)]) if id(x) in at else evaluator.merged(x) for x in outs]
    evaluator.finish(tails, [paths[x.index] for x in outs if _is_passed(x)])
    return jax.tree.unflatten(jax.tree.structure(shape), outs), evaluator


def _named(x: Any) -> str:
    """What acts as one operator, from the outside in; overlays of outputs and rows act, and are named, by themselves."""
    weights = [o for o in layers(x) if not isinstance(o, (Output, Table))]
    return " over ".join(type(o).__name__ for o in weights or layers(x))


class Explanation(tuple[Event, ...]):
    """The events of one trace, in order; printed as a table, one row an overlay and use."""

    @property
    def merged(self) -> "Explanation":
        """The events where an overlay was merged."""
        return Explanation(e for e in self if e.how == "merged")

    def __repr__(self) -> str:
        rows = Counter((e.path, e.overlay, e.how, e.primitive, e.where) for e in self)
        lines = [("path", "overlay", "what", "at", "under", "times"), *((*row, str(n)) for row, n in rows.items())]
        widths = [max(len(line[k]) for line in lines) for k in range(6)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def explain(fn: Callable[..., Any], tuned: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Where each overlay of a tuned tree acts when `fn(tuned, ...)` runs, and where it is merged instead.

    Args:
      fn: the model's function, not wrapped; or what `wrap_tokens` made of it, where the tree has virtual tokens.
      tuned: a tree with overlays; abstract leaves (`jax.ShapeDtypeStruct`) serve as well.
      *args, **kwargs: its further arguments.

    Returns:
      The events in the order of the trace; `.merged` are those where a rule was missing. Overlays of one weight act
      together, and are named together: "DoRA over LoRA". Those that fn never uses are listed with the word "unused",
      and where an overlay has `uses`, the others are "left alone".

    Raises:
      Exception: what the wrapped function itself raises for these arguments.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: x @ params["w"]
      >>> tuned = pj.lora(rank=1).init(jax.random.key(0), {"w": jnp.ones((3, 2))})
      >>> pj.explain(fn, tuned, jnp.ones((1, 3)))
      path  overlay  what   at           under  times
      w     LoRA     acted  dot_general         1
    """
    call = Call.of(tuned, args, kwargs)
    evaluate = getattr(fn, "evaluate", functools.partial(_evaluate, fn))
    found: list[Evaluator] = []

    def run(*given: Any) -> Any:
        out, evaluator = evaluate(call, given)
        found.append(evaluator)
        return out

    jax.eval_shape(run, *(call.leaves[k] for k in call.dynamic))
    events, names = found[0].events, found[0].names
    seen = {e.path for e in events}
    return Explanation((*events, *(Event(p, n, "unused", "-", "") for p, n in names.items() if p not in seen)))
