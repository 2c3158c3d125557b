"""How views of an array move its axes: transposes, reshapes, slices, seen from the axes of the original.

An axis of the original array is an _atom_, `(0,)`, `(1,)`, ...; a reshape that splits axis 1 makes `(1, 0)` and `(1, 1)`.
A dimension of a view is a sequence of atoms (several where a reshape has joined axes, none where its size is 1).
"""

import dataclasses
import math
from typing import Any, Callable, Mapping, NamedTuple, Sequence

Atom = tuple | str
Dims = tuple[tuple[Atom, ...], ...]


class Split(NamedTuple):
    """Axis `atom` becomes the axes `parts`, of these sizes."""

    atom: Atom
    parts: tuple[Atom, ...]
    sizes: tuple[int, ...]


class Cut(NamedTuple):
    """Axis `atom` keeps the entries start:limit:stride."""

    atom: Atom
    start: int
    limit: int
    stride: int


class DynamicCut(NamedTuple):
    """Axis `atom` keeps `size` entries from a start that is operand number `operand` of the equation."""

    atom: Atom
    operand: int
    size: int


class Reverse(NamedTuple):
    """Axis `atom` is reversed."""

    atom: Atom


class Drop(NamedTuple):
    """Axis `atom`, of size 1, is gone."""

    atom: Atom


Edit = Split | Cut | DynamicCut | Reverse | Drop


@dataclasses.dataclass(frozen=True)
class Layout:
    """The dimensions of a view in atoms of the original, and the atoms' sizes."""

    dims: Dims
    sizes: tuple[tuple[Atom, int], ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Layout":
        """The layout of an array that nothing has viewed yet."""
        return cls(tuple(((k,),) for k in range(len(shape))), tuple(((k,), n) for k, n in enumerate(shape)))

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """Every atom, in the order of the view."""
        return tuple(a for dim in self.dims for a in dim)

    def size(self, atom: Atom) -> int:
        """The atom's size."""
        return dict(self.sizes)[atom]

    @property
    def shape(self) -> tuple[int, ...]:
        """The view's shape."""
        sizes = dict(self.sizes)
        return tuple(math.prod(sizes[a] for a in dim) for dim in self.dims)

    def having(self, dims: Sequence[tuple[Atom, ...]]) -> "Layout":
        """The same atoms in other dimensions."""
        kept = {a for dim in dims for a in dim}
        return Layout(tuple(dims), tuple((a, n) for a, n in self.sizes if a in kept))

    def resized(self, atom: Atom, size: int) -> "Layout":
        """The same dimensions, one atom of another size."""
        return Layout(self.dims, tuple((a, size if a == atom else n) for a, n in self.sizes))

    def added(self, atom: Atom, size: int) -> "Layout":
        """One more atom, in no dimension yet."""
        return Layout(self.dims, (*self.sizes, (atom, size)))

    def split(self, edit: Split) -> "Layout":
        """The same dimensions, one atom in parts."""
        parts = lambda a: edit.parts if a == edit.atom else (a,)
        sizes = {**dict(self.sizes), **dict(zip(edit.parts, edit.sizes))}
        dims = tuple(tuple(p for a in dim for p in parts(a)) for dim in self.dims)
        return Layout(dims, tuple((p, sizes[p]) for a, _ in self.sizes for p in parts(a)))


View = tuple[Layout, tuple[Edit, ...]]


def transpose(layout: Layout, permutation: Sequence[int]) -> View:
    """The view after a transpose."""
    return layout.having([layout.dims[k] for k in permutation]), ()


def squeeze(layout: Layout, dimensions: Sequence[int]) -> View:
    """The view with dimensions of size 1 removed."""
    dropped = tuple(Drop(a) for k in dimensions for a in layout.dims[k])
    return layout.having([d for k, d in enumerate(layout.dims) if k not in dimensions]), dropped


def broadcast(layout: Layout, shape: Sequence[int], dimensions: Sequence[int]) -> View | None:
    """The view after `broadcast_in_dim`: a new dimension is an atom that no array of the original holds."""
    source, out, edits = dict(zip(dimensions, range(len(layout.dims)))), layout, []
    dims: list[tuple[Atom, ...]] = []
    for k, size in enumerate(shape):
        dim = layout.dims[source[k]] if k in source else ()
        if k in source and layout.shape[source[k]] == size:
            dims.append(dim)
            continue
        edits += [Drop(a) for a in dim]
        atom = ("broadcast", k, 1 + max((int(a[2]) for a, _ in out.sizes if a[0] == "broadcast"), default=0))
        out = out.added(atom, size)
        dims.append((atom,))
    return out.having(dims), tuple(edits)


def reshape(layout: Layout, shape: Sequence[int]) -> View | None:
    """The view after a reshape, or None where an axis would be cut unevenly."""
    if 0 in shape:
        return None
    sizes, edits = dict(layout.sizes), []
    todo = list(layout.atoms)
    dims: list[tuple[Atom, ...]] = []
    for target in shape:
        dim: list[Atom] = []
        while target > 1:
            while sizes[todo[0]] == 1:
                dim.append(todo.pop(0))
            atom = todo.pop(0)
            size = sizes[atom]
            if target % size == 0:
                dim.append(atom)
                target //= size
            elif size % target == 0 and isinstance(atom, tuple):
                first, rest = (*atom, 0), (*atom, 1)
                sizes[first], sizes[rest] = target, size // target
                edits.append(Split(atom, (first, rest), (target, size // target)))
                dim.append(first)
                todo.insert(0, rest)
                target = 1
            else:
                return None
        dims.append(tuple(dim))
    if todo and not dims:
        return Layout((), ()), (*edits, *map(Drop, todo))
    if todo:
        dims[-1] = (*dims[-1], *todo)
    kept = {a for dim in dims for a in dim}
    return Layout(tuple(dims), tuple((a, n) for a, n in sizes.items() if a in kept)), tuple(edits)


class Parts(NamedTuple):
    """Some axes, taken as one, in two: the splits that make them, and each one's atoms with their sizes."""

    splits: tuple[Split, ...]
    outer: tuple[tuple[Atom, int], ...]
    inner: tuple[tuple[Atom, int], ...]


def parts(axes: Mapping[Atom, int], outer: int, inner: int) -> Parts | None:
    """Axes of these sizes, taken as one, as an outer and an inner one; None where one of them would be cut unevenly."""
    view = reshape(Layout(tuple((a,) for a in axes), tuple(axes.items())), (outer, inner))
    if view is None:
        return None
    layout, edits = view
    sized = [tuple((a, layout.size(a)) for a in dim) for dim in layout.dims]
    return Parts(tuple(e for e in edits if isinstance(e, Split)), sized[0], sized[1])


def only(layout: Layout, k: int) -> Atom | None:
    """The one atom of dimension k larger than 1, if it has just one."""
    large = [a for a in layout.dims[k] if layout.size(a) > 1] or list(layout.dims[k][:1])
    return large[0] if len(large) == 1 else None


def cut(layout: Layout, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None) -> View | None:
    """The view after a static slice."""
    edits: list[Edit] = []
    before = layout
    for k, size in enumerate(before.shape):
        start, limit, stride = starts[k], limits[k], strides[k] if strides else 1
        if (start, limit, stride) == (0, size, 1):
            continue
        atom = only(before, k)
        if atom is None:
            return None
        edits.append(Cut(atom, start, limit, stride))
        layout = layout.resized(atom, max(0, -(-(limit - start) // stride)))
    return layout, tuple(edits)


def dynamic_cut(layout: Layout, sizes: Sequence[int]) -> View | None:
    """The view after a dynamic slice, whose starts are operands 1, 2, ..."""
    edits: list[Edit] = []
    before = layout
    for k, size in enumerate(sizes):
        if size == before.shape[k]:
            continue
        atom = only(before, k)
        if atom is None:
            return None
        edits.append(DynamicCut(atom, 1 + k, size))
        layout = layout.resized(atom, size)
    return layout, tuple(edits)


def pieces(layout: Layout, sizes: Sequence[int], axis: int) -> list[View] | None:
    """The views that `split` makes along one axis."""
    views, start = [], 0
    for size in sizes:
        starts = [start if k == axis else 0 for k in range(len(layout.dims))]
        limits = [start + size if k == axis else n for k, n in enumerate(layout.shape)]
        view = cut(layout, starts, limits, None)
        if view is None:
            return None
        views.append(view)
        start += size
    return views


def reverse(layout: Layout, dimensions: Sequence[int]) -> View:
    """The view with dimensions reversed: every atom of such a dimension is."""
    return layout, tuple(Reverse(a) for k in dimensions for a in layout.dims[k])


def same(layout: Layout, params: Any) -> list[View]:
    """A view that leaves every axis in its place."""
    return [(layout, ())]


def _one(view: View | None) -> list[View] | None:
    return None if view is None else [view]


VIEWS: dict[str, Callable[[Layout, dict[str, Any]], list[View] | None]] = {
    **dict.fromkeys(
        ("convert_element_type", "copy", "copy_p", "name", "sharding_constraint", "reshard", "stop_gradient", "pvary"),
        same,
    ),
    "transpose": lambda x, p: [transpose(x, p["permutation"])],
    "reshape": lambda x, p: _one(reshape(x, p["new_sizes"]) if p.get("dimensions") is None else None),
    "squeeze": lambda x, p: [squeeze(x, [d % len(x.dims) for d in p["dimensions"]])],
    "broadcast_in_dim": lambda x, p: _one(broadcast(x, p["shape"], p["broadcast_dimensions"])),
    "slice": lambda x, p: _one(cut(x, p["start_indices"], p["limit_indices"], p["strides"])),
    "dynamic_slice": lambda x, p: _one(dynamic_cut(x, p["slice_sizes"])),
    "split": lambda x, p: pieces(x, p["sizes"], p["axis"]),
    "rev": lambda x, p: [reverse(x, p["dimensions"])],
}


def follow(primitive: str, params: dict[str, Any], layout: Layout) -> list[View] | None:
    """The views of its first operand that an equation makes, one an output; None where it is no view, or mixes axes."""
    rule = VIEWS.get(primitive)
    return rule(layout, params) if rule else None
