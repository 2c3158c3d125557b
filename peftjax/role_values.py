"""What the trace behind `roles` knows of a value: a parameter seen through views, or an activation and its history."""

import dataclasses
from typing import Iterable, Mapping, NamedTuple

from peftjax.views import Atom, Layout

KERNEL, MIXING, UNKNOWN = "kernel", "mixing", "unknown"


@dataclasses.dataclass(eq=False)
class Source:
    """One array of the trace, whatever casts and reshapes show it."""

    escaped: bool = False  # by anything but its own norm
    left: bool = False  # by anything that is not computed from it alone
    normed: bool = False  # its entries met a statistic of it: a norm, known or not
    norm: "Derived | None" = None
    derived: "Derived | None" = None  # what it is to the array that it is computed from alone
    shape: tuple[int, ...] = ()  # of a residual sum, and which of its axes are the layer's outputs: the last by default
    features: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Derived:
    """A value computed from `base` alone, on the way to its norm.

    `level`: "x" base or base less its mean, "e" squares of it, "r" a statistic of it, "n" the normalised base, "u" any
    other function of the base; `mixed` where entries have met each other on the way.
    """

    base: Source
    level: str
    mixed: bool = False
    stat: str = ""  # of "r": "sum", "mean", "squared mean", "squares", "mean square", "centred squares" or "variance"
    axes: tuple[int, ...] = ()  # that the statistic is taken over, of an array of `ndim` axes, `count` entries at once
    ndim: int = 0
    count: int = 0
    eps: float = 0.0
    root: str = ""  # "root" or "inverse", of the statistic and eps
    scale: tuple[str, float] | None = None  # the path of the scale, and what is added to it
    bias: str | None = None
    centred: bool = False


@dataclasses.dataclass(eq=False)
class Product:
    """What a contraction with kernels gives, until something happens to it that is not linear."""

    kernels: tuple[str, ...]
    layouts: tuple[Layout, ...] = ()  # of the kernels, where they are contracted
    reads: frozenset[str] = frozenset()  # the history of what the kernels contracted
    alive: bool = True
    total: Source | None = None  # the residual sum
    stream: Source | None = None  # what it was added to
    turned: bool = False  # its entries are added to each other, as rotary positions add them
    bent: bool = False  # something that is not linear happens to it before the next contraction

    def end(self) -> None:
        """Nothing linear follows."""
        self.alive = False


class Pending(NamedTuple):
    """A value still linear in a product, and which of its axes are the kernel's."""

    product: Product
    layout: Layout | None
    letters: dict[Atom, str]
    places: Mapping[int, int] = {}  # output dimensions and the kernel's
    fresh: bool = True  # only views and parameters have touched it
    biased: bool = False

    def letters_of(self, k: int) -> set[str]:
        """The letters of dimension k: "o" the kernel's outputs, "b" its batch, "x" the data's own."""
        if self.layout is None:
            return {"x"}
        return {self.letters.get(_root(a, self.letters), "x") for a in self.layout.dims[k] if self.layout.size(a) > 1}


def _root(atom: Atom, known: dict[Atom, str]) -> Atom:
    while atom and atom not in known:
        atom = atom[:-1]
    return atom


class Head(NamedTuple):
    """A kernel whose output no later kernel has contracted: when it was made, and its path."""

    time: int
    path: str


@dataclasses.dataclass(frozen=True, eq=False)
class Act:
    """An activation."""

    source: Source = dataclasses.field(default_factory=Source)
    pending: Pending | None = None
    heads: frozenset[Head] = frozenset()
    data: bool = True  # whether it depends on the function's other arguments
    uniform: bool = False  # whether its entries are all the same
    sums: Product | None = None  # the product whose entries these are, or sums of them
    since: frozenset[str] = frozenset()  # what has happened since the last residual sum: KERNEL, MIXING, UNKNOWN

    @property
    def live(self) -> Pending | None:
        """The pending product, if nothing has ended it."""
        return self.pending if self.pending and self.pending.product.alive else None

    def end(self) -> None:
        """Ends the pending product, if there is one."""
        if self.pending:
            self.pending.product.end()

    def touch(self, into: Derived | None = None) -> None:
        """Marks its array as consumed, by its own norm or by something else."""
        if into is None or into.base is not self.source or into.level == "u":
            self.source.escaped = True
        self.source.left |= into is None


@dataclasses.dataclass(frozen=True)
class Track:
    """A leaf in a value made of parameters: where its axes are, and what has happened to it."""

    path: str
    layout: Layout
    ops: frozenset[str] = frozenset()  # what was done to it, besides views
    plus: float | None = None  # a number that was added to it, where nothing else was done
    indexed: frozenset[Atom] = frozenset()  # atoms of which one entry was taken

    @property
    def whole(self) -> bool:
        """Whether there were only views."""
        return not self.ops

    @property
    def coverage(self) -> int:
        """How many of the value's dimensions are the leaf's own."""
        return sum(any(is_own(a) for a in dim) for dim in self.layout.dims)

    @property
    def tiled(self) -> bool:
        """Whether the leaf is repeated along a dimension of the value."""
        return not all(is_own(a) for a in self.layout.atoms)


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """A value made of parameters and constants only."""

    tracks: tuple[Track, ...] = ()
    value: float | None = None  # of a constant whose entries are all the same
    source: Source = dataclasses.field(default_factory=Source)

    @property
    def primary(self) -> tuple[Track, ...]:
        """The tracks with most dimensions: in `w * g`, that of w."""
        most = max((t.coverage for t in self.tracks), default=0)
        return tuple(t for t in self.tracks if t.coverage == most)

    @property
    def whole(self) -> Track | None:
        """The one leaf that this is a view of, if it is one."""
        return self.tracks[0] if len(self.tracks) == 1 and self.tracks[0].whole else None

    @property
    def shifted(self) -> tuple[str, float] | None:
        """The one leaf that this is a view of, and what was added to it: 1 where a norm multiplies by `1 + w`."""
        if self.whole:
            return self.whole.path, 0.0
        track = self.tracks[0] if len(self.tracks) == 1 else None
        return (track.path, track.plus) if track and track.plus is not None else None

    def touch(self, into: Derived | None = None) -> None:
        """Marks its array as consumed."""
        self.source.escaped = self.source.left = True


Value = Act | Fixed


def is_own(atom: Atom) -> bool:
    """Whether an atom is an axis of the leaf, or a part of one; not a repetition."""
    return isinstance(atom[0], int)


def tracked(values: Iterable[Value]) -> list[Fixed]:
    """Those values that hold parameters."""
    return [v for v in values if isinstance(v, Fixed) and v.tracks]


def acts(values: Iterable[Value]) -> list[Act]:
    """Those values that are activations."""
    return [v for v in values if isinstance(v, Act)]


def any_data(values: Iterable[Value]) -> bool:
    """Whether one of these depends on the function's other arguments."""
    return any(v.data for v in values if isinstance(v, Act))


def since(values: Iterable[Value]) -> frozenset[str]:
    """What has happened to any of these values since the last residual sum."""
    return frozenset().union(*(v.since for v in values if isinstance(v, Act)))


def heads(values: Iterable[Value]) -> frozenset[Head]:
    """All heads that reach one of these values."""
    return frozenset().union(*(v.heads for v in values if isinstance(v, Act)))
