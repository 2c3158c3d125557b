"""Which additions of a trace are residual: a layer's output and an array that the layer was computed from."""

import dataclasses
from typing import Any, NamedTuple, Sequence

from jax.extend import core as jex

from peftjax import compat, views
from peftjax.regions import ONCE

Key = tuple[tuple[int, ...], int]  # the equations of the regions around an equation, and its own: their identities

PARTS = frozenset({"slice", "dynamic_slice", "split", "rev"})  # views that are another array
PASSED = frozenset({"optimization_barrier", "mesh_cast"})  # each output is an operand
ADDS = ("add", "add_any")
# Linear in their first operand alone.
FIRST_ONLY = frozenset({"div", "gather", "dynamic_slice", "dynamic_update_slice"})
KERNELS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"})
LINEAR = frozenset(
    "add add_any sub neg mul select_n div reduce_sum concatenate stack tile pad dynamic_update_slice gather cumsum real "
    "reduce_window_sum dot_general slice dynamic_slice split rev psum psum_invariant all_gather all_gather_invariant "
    "reduce_scatter all_to_all ppermute reduce_precision scatter-add scatter_add".split()
)
CALLS = ONCE | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin", "shard_map"}


@dataclasses.dataclass(eq=False)
class Branch:
    """What a layer makes, as long as all that happens to it is linear; `past` holds what the layer was computed from."""

    past: int
    alive: bool = True
    met: tuple[int, Key, int] | None = None  # the stream's number, the addition, and which operand the stream is


class Value(NamedTuple):
    """An array: its number, in the order in which arrays are made, and, a bit each, those that it is computed from."""

    number: int
    past: int = 0
    fixed: bool = False  # made of parameters and constants alone
    branches: tuple[Branch, ...] = ()

    @property
    def whole(self) -> int:
        """What it is computed from, and itself."""
        return self.past | 1 << self.number

    @property
    def live(self) -> tuple[Branch, ...]:
        """The branches that nothing has ended."""
        return tuple(b for b in self.branches if b.alive)


def streams(closed: Any, fixed: Sequence[bool]) -> dict[Key, int]:
    """The residual additions of a trace, and which operand of each is the stream.

    Of the arrays that are added to what a layer puts out, the stream is one that the layer was computed from: the last
    one made, where there are several. Another array, such as a second branch or a term of positions, is a part of the
    layer's output.

    Args:
      closed: the jaxpr of the model.
      fixed: for each of its inputs, whether it is a parameter.

    Returns:
      {(the identities of the regions' equations around the addition, that of its equation): 0 or 1}.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> fn = lambda w, x, term: (x @ w + term) + x
      >>> list(streams(jax.make_jaxpr(fn)(*[jnp.ones((2, 2))] * 3), (True, False, False)).values())
      [1]
    """
    return _Reader().read(closed, fixed)


class _Reader:
    def __init__(self) -> None:
        self.count = 0
        self.branches: list[Branch] = []
        self.parts: dict[Any, Value] = {}

    def read(self, closed: Any, fixed: Sequence[bool]) -> dict[Key, int]:
        self.walk(closed, [self.value(fixed=f) for f in fixed], ())
        return {b.met[1]: b.met[2] for b in self.branches if b.met}

    def value(self, sources: Sequence[Value] = (), fixed: bool = True, branches: tuple[Branch, ...] = ()) -> Value:
        """A new array, computed from others."""
        past = 0
        for v in sources:
            past |= v.whole
        self.count += 1
        return Value(self.count, past, fixed and all(v.fixed for v in sources), branches)

    def walk(self, closed: Any, operands: Sequence[Value], around: tuple[int, ...]) -> list[Value]:
        """The values of a jaxpr's outputs; a value is forgotten after its last use."""
        jaxpr = closed.jaxpr if isinstance(closed, jex.ClosedJaxpr) else closed
        env = dict(zip(jaxpr.invars, operands, strict=True)) | {v: self.value() for v in jaxpr.constvars}
        read = lambda v: Value(0, fixed=True) if isinstance(v, jex.Literal) else env[v]
        last = {v: n for n, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, jex.Literal)}
        last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
        for n, eqn in enumerate(jaxpr.eqns):
            found = [read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self.step(eqn, found, around), strict=True))
            for v in {v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, jex.Literal)}:
                if last.get(v, -1) <= n:
                    env.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, operands: Sequence[Value], around: tuple[int, ...]) -> Sequence[Value]:
        """The values of an equation's outputs."""
        name = eqn.primitive.name
        if name in CALLS or name in ("scan", "while", "cond"):
            return self.region(eqn, operands, (*around, id(eqn)))
        if name in PASSED:
            return operands
        if name in views.VIEWS and name not in PARTS or _is_scaled(eqn, operands):
            same = next((v for v in operands if v.number), None) or self.value()
            return [same] * len(eqn.outvars)
        branches = self.linear(eqn, operands, around)
        return [self.made(eqn, k, operands, branches) for k in range(len(eqn.outvars))]

    def made(self, eqn: Any, k: int, operands: Sequence[Value], branches: tuple[Branch, ...]) -> Value:
        """A new array; the same part of an array, taken twice, is one."""
        if eqn.primitive.name not in PARTS:
            return self.value(operands, branches=branches)
        which = (eqn.primitive.name, k, tuple(v.number for v in operands), str(eqn.params))
        if which not in self.parts:
            self.parts[which] = self.value(operands)
        return self.parts[which]._replace(branches=branches)

    def linear(self, eqn: Any, operands: Sequence[Value], around: tuple[int, ...]) -> tuple[Branch, ...]:
        """The branches that an equation's output belongs to; those that it ends, end."""
        name, live = eqn.primitive.name, [v.live for v in operands]
        data = [v for v in operands if not v.fixed]
        if name in ADDS and all(v.number for v in operands):
            return self.added((around, id(eqn)), operands, live)
        kept = name in LINEAR and sum(map(bool, live)) == 1 and not (name in FIRST_ONLY and any(live[1:]))
        if name in KERNELS and len(data) < len(operands):  # a kernel's product; what it reads ends there
            kept = False
        found = tuple(b for x in live for b in x)
        for branch in found if not kept else ():
            branch.alive = False
        started = [Branch(self.value(operands).past)] if name in KERNELS else []
        self.branches += started
        return (*(found if kept else ()), *started)

    def added(self, key: Key, operands: Sequence[Value], live: Sequence[tuple[Branch, ...]]) -> tuple[Branch, ...]:
        """The branches of a sum; each remembers the last made of the arrays that it read and now meets."""
        for k, stream in enumerate(operands):
            for branch in live[1 - k]:
                if branch.past >> stream.number & 1 and (branch.met is None or branch.met[0] < stream.number):
                    branch.met = (stream.number, key, k)
        return tuple(dict.fromkeys(b for x in live for b in x))

    def region(self, eqn: Any, operands: Sequence[Value], inside: tuple[int, ...]) -> list[Value]:
        """What comes out of a region. One that runs once is transparent; no branch enters or leaves a loop."""
        name, p = eqn.primitive.name, eqn.params
        if name in CALLS:
            return self.walk(next(p[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in p), operands, inside)
        for branch in (b for v in operands for b in v.branches):
            branch.alive = False
        operands = [v._replace(branches=()) for v in operands]
        if name == "scan":
            start = sum(compat.scan_sizes(p))
            slices = [self.value([v]) for v in operands[start:]]
            found = [self.walk(p["jaxpr"], [*operands[:start], *slices], inside)]
        elif name == "while":
            first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
            self.walk(p["cond_jaxpr"], [*operands[:first], *operands[second:]], inside)
            found = [self.walk(p["body_jaxpr"], operands[first:], inside)]
        else:
            found = [self.walk(branch, operands[1:], inside) for branch in p["branches"]]
        return [self.value([*each, *operands]) for each in zip(*found)]


def _is_scaled(eqn: Any, operands: Sequence[Value]) -> bool:
    """Whether an equation multiplies an array by a number."""
    name, numbers = eqn.primitive.name, [v.number == 0 for v in operands]
    return name == "neg" or name == "mul" and any(numbers) or name == "div" and numbers[1]
