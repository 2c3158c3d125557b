"""Runs a function whose parameters are overlays: traces it on the logical types, then evaluates what was traced."""

import dataclasses
import functools
from collections import Counter
from typing import Any, Callable, ParamSpec, Sequence, TypeVar

import jax
import numpy as np
from jax.extend import core as jex

from peftjax import compat, hooks, regions, rules, tables
from peftjax.factored import Weight, dense, expand
from peftjax.hooked import HOOKED, Hook, Pending, Rows, carried, inner, is_marked
from peftjax.overlay import Output, Table, is_overlay, layers, type_of
from peftjax.paths import flatten
from peftjax.tree import resolve

P = ParamSpec("P")
R = TypeVar("R")
LIVE = (Weight, *HOOKED)


@dataclasses.dataclass(frozen=True)
class Event:
    """What one equation did with one overlay: `how` is "acted", "merged", "left alone", "met the residual" or "unused"."""

    path: str
    overlay: str
    how: str
    primitive: str
    where: str


class Evaluator:
    """Evaluates jaxprs whose values may be operators or carry overlays, and notes what each overlay did."""

    def __init__(self, names: dict[str, str], tables: bool = False) -> None:
        self.names = names
        self.tables = tables
        self.events: list[Event] = []
        self.waiting: list[str] = []
        self.stacks: list[str] = []
        self.layer: dict[str, Any] = {}

    def run(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        """The outputs of a closed jaxpr; those that are more than arrays come back as what they are."""
        jaxpr = closed.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts)) | dict(zip(jaxpr.invars, args))
        read = lambda v: v.val if isinstance(v, jex.Literal) else env[v]
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            inside = self.tables and regions.runs_once(eqn)  # ids are clipped, and coded, in regions of their own
            if inside or any(isinstance(x, LIVE) for x in operands):
                with compat.scope(eqn):
                    outs = self.step(eqn, operands, jaxpr.debug_info)
            else:
                outs = compat.single(eqn, operands, jaxpr.debug_info)
            if self.tables and eqn.primitive.name not in regions.REGIONS:
                outs = tables.notice(eqn, operands, outs)
            env.update(zip(eqn.outvars, outs))
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, operands: Sequence[Any], debug_info: Any) -> Sequence[Any]:
        """The outputs of one equation, some of whose operands are more than arrays."""
        region = regions.REGIONS.get(eqn.primitive.name)
        if region is not None:
            self.stacks.append(str(eqn.source_info.name_stack))
            outs = region(self, eqn, operands)
            self.stacks.pop()
            return outs
        plain = functools.partial(self.plain, eqn, debug_info)
        return hooks.act(self, eqn, operands, plain) if is_marked(operands) else plain(operands)

    def plain(self, eqn: Any, debug_info: Any, operands: Sequence[Any]) -> Sequence[Any]:
        """The outputs of an equation on arrays and operators: by a rule, or with the operators merged."""
        run = lambda eqn, operands: compat.single(eqn, operands, debug_info, named=False)
        if not any(isinstance(x, Weight) for x in operands):
            return run(eqn, operands)
        outs = rules.act(eqn, operands, run)
        if outs is None:
            return run(eqn, [self.merged(x, eqn) for x in operands])
        if eqn.primitive.name in rules.CONTRACTIONS:
            self.note([x for x in operands if isinstance(x, Weight)], eqn, "acted")
        return outs

    def merged(self, x: Any, eqn: Any = None) -> Any:
        """The array that a value stands for; merging an operator is noted, and an overlay of outputs refuses."""
        x = inner(x)
        if isinstance(x, (Hook, Rows, Pending)):
            where = eqn.primitive.name if eqn is not None else "the function's output"
            raise ValueError(f"the overlay at {x.path} reached {where} before it could act on its layer's output")
        if not isinstance(x, Weight):
            return x
        x = x if eqn is None else x.only_for(eqn.primitive.name)
        if x.plain is None:
            self.note([x], eqn, "merged")
        return dense(x)

    def note(self, weights: Sequence[Weight], eqn: Any, how: str) -> None:
        """Remembers what an equation did with these operators."""
        self.events += [self.event(w.path, how, eqn) for w in weights]

    def event(self, path: str, how: str, eqn: Any, overlay: str | None = None) -> Event:
        """What an equation (None: the function's output) did with the overlay at a path."""
        name = eqn.primitive.name if eqn is not None else "output"
        return Event(path, overlay or self.names[path], how, name, self.scope_of(eqn) if eqn is not None else "")

    def scope_of(self, eqn: Any) -> str:
        """The name stack of an equation, with those of the regions around it."""
        return "/".join(filter(None, (*self.stacks, str(eqn.source_info.name_stack))))

    def fire(self, path: str, owner: Any, eqn: Any) -> None:
        """Remembers that an overlay of outputs or rows met its equation."""
        self.events.append(self.event(path, "acted", eqn, type(owner).__name__))
        if getattr(owner, "where", "output") == "residual":
            self.waiting.append(path)

    def met(self, path: str, eqn: Any) -> None:
        """Remembers that a waiting output met its residual add."""
        self.waiting.remove(path)
        self.events.append(self.event(path, "met the residual", eqn))

    def refuse_inner_gradient(self, eqn: Any, path: str) -> None:
        """Overlays of outputs do not act in a derivative that the function itself takes."""
        stack = self.scope_of(eqn)
        if "jvp(" in stack or "transpose(" in stack:
            raise ValueError(
                f"the overlay at {path} lies inside a derivative that the function takes itself ({stack}): its equations "
                "are those of the bare layer. Overlays of weights, such as lora, are exact there"
            )

    def finish(self, expected: Sequence[str]) -> None:
        """Raises if an overlay of outputs or rows never acted."""
        acted = {e.path for e in self.events}
        if missed := [p for p in expected if p not in acted]:
            raise ValueError(f"never reached by the model, so their overlays did nothing: {', '.join(missed)}")
        if self.waiting:
            raise ValueError(f"the outputs of {', '.join(self.waiting)} never met a residual add, which their overlays wait for")


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, flattened: arrays and overlays apart from what is static."""

    leaves: list[Any]
    tree: Any
    paths: dict[int, str]

    @classmethod
    def of(cls, params: Any, args: Any, kwargs: Any) -> "Call":
        leaves, tree = jax.tree.flatten((resolve(params), args, kwargs), is_leaf=is_overlay)
        return cls(leaves, tree, {k: path for k, (path, _) in enumerate(flatten(params))})

    @property
    def dynamic(self) -> list[int]:
        """The positions of the leaves that are traced."""
        return [k for k, x in enumerate(self.leaves) if is_overlay(x) or is_array(x)]

    @property
    def static(self) -> Any:
        """What a cached program depends on, beside the types of its arrays."""
        dynamic = set(self.dynamic)
        overlays = tuple(jax.tree.structure(x) for x in self.leaves if is_overlay(x))
        return self.tree, overlays, tuple((k, x) for k, x in enumerate(self.leaves) if k not in dynamic)

    def filled(self, values: Sequence[Any]) -> Any:
        """The call's `(params, args, kwargs)` with these values at the dynamic positions."""
        leaves = list(self.leaves)
        for k, value in zip(self.dynamic, values):
            leaves[k] = value
        return jax.tree.unflatten(self.tree, leaves)


def is_array(x: Any) -> bool:
    """Whether x is traced: arrays are; Python numbers, strings and functions are static."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


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

    Args:
      fn: any function that `jax.jit` could trace, `fn(params, *args, **kwargs)`. Every array among its arguments is
        traced; everything else (Python numbers, strings, None) is static and reaches it untouched.

    Returns:
      The function. Its outputs have fn's types; an overlay that fn returns untouched comes back as the same overlay.
      Outside `jax.jit` it is compiled once per tree, types and static arguments.

    Raises:
      TypeError: what tracing `fn` raises.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: x @ params["w"]
      >>> params = {"w": jnp.ones((3, 2))}
      >>> tuned = pj.lora(rank=1).init(jax.random.key(0), params)
      >>> pj.wrap(fn)(tuned, jnp.ones((1, 3)))
      Array([[3., 3.]], dtype=float32)
    """
    programs: dict[Any, Any] = {}

    @functools.wraps(fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        call = Call.of(params, args, kwargs)
        if not any(map(is_overlay, call.leaves)):
            return fn(params, *args, **kwargs)  # type: ignore[call-arg]
        given = [call.leaves[k] for k in call.dynamic]
        if any(map(compat.is_traced, jax.tree.leaves(given))):
            out, _ = _evaluate(fn, call, given)
        else:
            out = _program(programs, fn, call)(*given)
        return jax.tree.map(lambda x: given[x.index] if isinstance(x, Passed) else x, out, is_leaf=_is_passed)

    return wrapped  # type: ignore[return-value]


def _is_passed(x: Any) -> bool:
    return isinstance(x, Passed)


def _program(programs: dict[Any, Any], fn: Any, call: Call) -> Any:
    make = lambda: jax.jit(lambda *given: _evaluate(fn, call, given)[0])
    try:
        key = call.static
        if key not in programs:
            programs[key] = make()
        return programs[key]
    except TypeError:  # an unhashable static argument: traced anew each time, as jit could not cache it either
        return make()


def _evaluate(fn: Any, call: Call, given: Sequence[Any]) -> tuple[Any, Evaluator]:
    def flat(*arrays: Any) -> Any:
        params, args, kwargs = call.filled(arrays)
        return fn(params, *args, **kwargs)

    closed, shape = jax.make_jaxpr(flat, return_shape=True)(*map(type_of, given))
    paths = [call.paths.get(k, f"argument {k}") for k in call.dynamic]
    names = {p: type(x).__name__ for p, x in zip(paths, given) if is_overlay(x)}
    evaluator = Evaluator(names, tables=any(isinstance(o, Table) for x in given for o in layers(x)))
    tails = [p for p, x in zip(paths, given) if any(isinstance(o, (Output, Table)) for o in layers(x))]
    if tails:
        values = [carried(x, p) if k in call.paths else x for k, x, p in zip(call.dynamic, given, paths)]
    else:
        values = [expand(x, p) if is_overlay(x) else x for x, p in zip(given, paths)]
    outs = evaluator.run(closed, values)
    at = {id(v): k for k, v in enumerate(values) if isinstance(v, LIVE)}
    outs = [Passed(at[id(x)]) if id(x) in at else evaluator.merged(x) for x in outs]
    evaluator.finish(tails)
    return jax.tree.unflatten(jax.tree.structure(shape), outs), evaluator


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
      fn: the model's function, not wrapped.
      tuned: a tree with overlays; abstract leaves (`jax.ShapeDtypeStruct`) serve as well.
      *args, **kwargs: its further arguments.

    Returns:
      The events in the order of the trace; `.merged` are those where a rule was missing. Overlays that fn never uses
      are listed with the word "unused".

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: x @ params["w"]
      >>> tuned = pj.lora(rank=1).init(jax.random.key(0), {"w": jnp.ones((3, 2))})
      >>> pj.explain(fn, tuned, jnp.ones((1, 3)))
      path  overlay  what   at           under  times
      w     LoRA     acted  dot_general         1
    """
    call = Call.of(tuned, args, kwargs)
    found: list[Evaluator] = []

    def traced(*given: Any) -> Any:
        out, evaluator = _evaluate(fn, call, given)
        found.append(evaluator)
        return out

    jax.eval_shape(traced, *(call.leaves[k] for k in call.dynamic))
    events, names = found[0].events, found[0].names
    seen = {e.path for e in events}
    return Explanation((*events, *(Event(p, n, "unused", "-", "") for p, n in names.items() if p not in seen)))
