"""Where the equations of a traced model have tokens: its trace at two lengths of the sequence, side by side."""

import dataclasses
from typing import Any, Collection, Iterator

from jax.extend import core as jex


@dataclasses.dataclass(frozen=True)
class Span:
    """Which tokens of a sequence are virtual: of `length` in all, those from `start`, prompts before prefixes."""

    length: int
    start: int
    prompt: int
    prefix: int

    @property
    def virtual(self) -> int:
        """How many are virtual."""
        return self.prompt + self.prefix

    @property
    def prefix_start(self) -> int:
        """The first virtual position of prefixes."""
        return self.start + self.prompt

    @property
    def real(self) -> slice:
        """The positions of the real tokens."""
        return slice(0, self.start) if self.start else slice(self.virtual, self.length)


class Differ(Exception):
    """The two traces are not the same program."""


Moves = tuple[
    tuple[int, int, int], ...
]  # an axis whose size follows the length: its number, the short size, the long one


def moves(long: Any, short: Any) -> Moves:
    """The axes in which two types of one variable differ."""
    if len(long.shape) != len(short.shape):
        raise Differ(f"an array has {len(long.shape)} axes at one length, and {len(short.shape)} at another")
    return tuple((k, s, n) for k, (n, s) in enumerate(zip(long.shape, short.shape)) if n != s)


def inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs inside an equation."""
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, jex.ClosedJaxpr):
                yield x.jaxpr
            elif isinstance(x, jex.Jaxpr):
                yield x


def pairs(long: Any, short: Any) -> Iterator[tuple[Any, Any]]:
    """The equations of two jaxprs that are the same program, those of inner jaxprs too, in pairs."""
    if len(long.eqns) != len(short.eqns):
        raise Differ(f"{len(long.eqns)} equations at one length, {len(short.eqns)} at another")
    for a, b in zip(long.eqns, short.eqns):
        if a.primitive.name != b.primitive.name:
            raise Differ(f"{a.primitive.name} at one length, {b.primitive.name} at another")
        yield a, b
        bodies, others = list(inner(a)), list(inner(b))
        if len(bodies) != len(others):
            raise Differ(f"{a.primitive.name} has {len(bodies)} bodies at one length, {len(others)} at another")
        for x, y in zip(bodies, others):
            yield from pairs(x, y)


class Sequence:
    """Which axis of each equation's output is that of the tokens.

    Args:
      closed: the trace at the length of `span`. It is kept, for its equations are what is asked about.
      other: the trace at another length.
      size: that length.
      span: which tokens are virtual.
    """

    def __init__(self, closed: Any, other: Any, size: int, span: Span) -> None:
        self.closed, self.other, self.size, self.span = closed, other, size, span
        self.acted: dict[int, list[Any]] = {}  # by equation: the axes of tokens and features, where a prefix acted
        self.looked_up: dict[int, list[Any]] = {}  # by equation: the table with a prompt, and its own number of rows
        self.found = {
            id(a): [moves(v.aval, w.aval) for v, w in zip(a.outvars, b.outvars)]
            for a, b in pairs(closed.jaxpr, other.jaxpr)
        }

    def is_square(self, eqn: Any) -> bool:
        """Whether two axes of an equation's (first) output follow the number of tokens."""
        return len(self.found.get(id(eqn), [()])[0]) > 1

    def axis(self, eqn: Any, others: Collection[int]) -> int | str:
        """The axis of tokens in an equation's (first) output, none of `others`; or what is wrong with it, in words."""
        found = self.found[id(eqn)][0]
        shape = tuple(eqn.outvars[0].aval.shape)
        if not found:
            return f"no axis of its layer's output {shape} follows the number of tokens"
        if len(found) > 1:
            return f"{len(found)} axes of its layer's output {shape} follow the number of tokens; expected one"
        axis, short, long = found[0]
        if (short, long) != (self.size, self.span.length):
            said = "are folded into" if long > self.span.length else "are not all in"
            return f"the {self.span.length} tokens {said} axis {axis} of its layer's output {shape}"
        if axis in others:
            return f"the axis of tokens, {axis} of {shape}, is one of its layer's features or experts"
        return axis
