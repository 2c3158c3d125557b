"""Contractions, convolutions and lookups: which operand is the kernel, and the roles of its axes."""

import math
from typing import Any, Callable, NamedTuple, Sequence

from peftjax import views
from peftjax.role_book import CONTRACTED, Book
from peftjax.role_values import KERNEL, Act, Fixed, Head, Pending, Track, Value, any_data, heads, is_own, since
from peftjax.views import Layout

Outs = list[Value] | None
NAMES = {"ragged_dot_general": "ragged_dot"}


class Letters(NamedTuple):
    """The letters of a contraction: of the kernel's dimensions, and of the output's; which of these are the kernel's."""

    kernel: dict[int, str]
    out: Sequence[str]
    places: dict[int, int]


def finish(book: Book, eqn: Any, kernel: Fixed, data: Sequence[Value], letters: Letters, op: str) -> list[Value]:
    """Notes a contraction, and gives its output."""
    name = NAMES.get(eqn.primitive.name, eqn.primitive.name)
    known = any_data(data)
    product = book.contract(kernel, name, op, letters.kernel, known)
    before = since(data)
    if product:
        product.reads = before
    for value in data:
        value.touch()
        if isinstance(value, Act):
            value.end()
        elif value.tracks:
            book.activation(value, name)
    shape = eqn.outvars[0].aval.shape
    axes: dict[Any, str] = {(k,): letter for k, letter in enumerate(letters.out)}
    pending = Pending(product, Layout.of(shape), axes, letters.places) if product else None
    head = frozenset({Head(book.time, kernel.primary[0].path)} if product else ())
    more = dict(uniform=math.prod(shape) == 1, sums=product, since=before | {KERNEL})
    return [Act(pending=pending, heads=head, data=known, **more)]  # type: ignore[arg-type]


def dot_general(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """A contraction: its batch axes, then the free axes of each side."""
    contracted, batched = eqn.params["dimension_numbers"]
    side = kernel_side(book, operands[:2], contracted)
    if side is None:
        return None
    shapes = [v.aval.shape for v in eqn.invars[:2]]
    free = [len(shapes[k]) - len(contracted[k]) - len(batched[k]) for k in (0, 1)]
    out = ["b"] * len(batched[0]) + ["o" if side == k else "x" for k in (0, 1) for _ in range(free[k])]
    own = [k for k in range(len(shapes[side])) if k not in (*contracted[side], *batched[side])]
    start = len(batched[0]) + (free[0] if side else 0)
    places = {**dict(enumerate(batched[side])), **{start + n: k for n, k in enumerate(own)}}
    letters = Letters(_letters(len(shapes[side]), contracted[side], batched[side]), out, places)
    return finish(book, eqn, _fixed(operands[side]), [operands[1 - side]], letters, "linear")


def _fixed(value: Value) -> Fixed:
    assert isinstance(value, Fixed)
    return value


def _letters(ndim: int, contracted: Sequence[int], batched: Sequence[int]) -> dict[int, str]:
    return {k: "i" if k in contracted else "b" if k in batched else "o" for k in range(ndim)}


def kernel_side(book: Book, operands: Sequence[Value], contracted: Sequence[Sequence[int]]) -> int | None:
    """Which operand is the kernel: the one made of parameters; of two, the one that looks most like a kernel."""
    sides = [k for k in (0, 1) if isinstance(v := operands[k], Fixed) and any(t.coverage for t in v.tracks)]
    if len(sides) < 2:
        return sides[0] if sides else None
    looks = [_looks(book, _fixed(v), dims) for v, dims in zip(operands, contracted)]
    return 0 if looks[0] > looks[1] else 1


def _looks(book: Book, value: Fixed, contracted: Sequence[int]) -> tuple[bool, ...]:
    """How much a value made of parameters looks like a kernel and not like a learned activation."""
    notes = [book.notes[t.path] for t in value.primary]
    return (
        all(n.op in CONTRACTED for n in notes),
        not any(n.op is not None and n.op not in CONTRACTED for n in notes),
        all(t.whole for t in value.tracks),
        not any(t.tiled for t in value.primary),
        sorted(contracted) == list(range(len(contracted))),
    )


def ragged_dot(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """Rows by groups, each with its own matrix."""
    data, kernel, *rest = operands
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if not isinstance(kernel, Fixed) or not kernel.tracks:
        return None
    contracted, batched = numbers.dot_dimension_numbers
    stacked = (*batched[1], *numbers.rhs_group_dimensions)
    shapes = [v.aval.shape for v in eqn.invars[:2]]
    free = len(shapes[0]) - len(contracted[0]) - len(batched[0])
    out = ["b"] * len(batched[0]) + ["x"] * free
    out += ["o"] * (len(eqn.outvars[0].aval.shape) - len(out))
    own = [k for k in range(len(shapes[1])) if k not in (*contracted[1], *stacked)]
    places = {len(out) - len(own) + n: k for n, k in enumerate(own)}
    letters = Letters(_letters(len(shapes[1]), contracted[1], stacked), out, places)
    return finish(book, eqn, kernel, [data, *rest], letters, "linear")


def convolution(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """A convolution by a kernel; a leading part of its output axis that makes its own groups is a batch of kernels."""
    data, kernel = operands
    if not isinstance(kernel, Fixed) or not kernel.tracks:
        return None
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    feature = numbers.rhs_spec[0]
    dims = {k: "o" if k == feature else "i" for k in range(len(numbers.rhs_spec))}
    out = ["o" if k == numbers.out_spec[1] else "x" for k in range(len(numbers.out_spec))]
    letters = Letters(dims, out, {numbers.out_spec[1]: feature})
    outs = finish(book, eqn, kernel, [data], letters, "conv")
    for track in kernel.primary:
        groups = _experts(book, track, feature, groups)
        if not book.rehearsing and book.notes[track.path].uses.count("conv_general_dilated") == 1:
            book.notes[track.path].groups = groups
            window = (a for k in numbers.rhs_spec[2:] for a in track.layout.dims[k] if is_own(a))
            book.notes[track.path].window = tuple(sorted({int(a[0]) for a in window}))
    return outs


def _experts(book: Book, track: Track, feature: int, groups: int) -> int:
    """Marks the kernels' own axis, where vmap made groups of it; the groups that are left within each."""
    large = [a for a in track.layout.dims[feature] if track.layout.size(a) > 1]
    while len(large) > 1 and groups > 1 and groups % track.layout.size(large[0]) == 0:
        groups //= track.layout.size(large[0])
        if not book.rehearsing:
            book.notes[track.path].letters[int(large[0][0])] = {"b"}
        large.pop(0)
    return groups


def gather(book: Book, eqn: Any, operands: Sequence[Value]) -> Outs:
    """A lookup. One scalar index is no lookup but a choice of layer."""
    table, *indices = operands
    if not isinstance(table, Fixed) or not table.tracks:
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if math.prod(eqn.invars[1].aval.shape[:-1]) == 1 and not numbers.operand_batching_dims:
        return _entry(book, eqn, table, numbers, sizes) or _lookup(book, eqn, table, indices, numbers, sizes)
    return _lookup(book, eqn, table, indices, numbers, sizes)


def _lookup(book: Book, eqn: Any, table: Fixed, indices: Sequence[Value], numbers: Any, sizes: Sequence[int]) -> Outs:
    dims = _letters(len(sizes), numbers.start_index_map, numbers.operand_batching_dims)
    book.contract(table, "gather", "embedding", dims, data=True)
    for value in indices:
        value.touch()
        if isinstance(value, Act):
            value.end()
        elif value.tracks:
            book.activation(value, "gather")
    return [Act(heads=heads(indices), data=any_data(indices))]


def _entry(book: Book, eqn: Any, table: Fixed, numbers: Any, sizes: Sequence[int]) -> Outs:
    """The slice that a gather with one index takes; None where that is no view."""
    if eqn.invars[1].aval.ndim != 1 or len(numbers.start_index_map) != len(numbers.collapsed_slice_dims):
        return None
    made: list[Track] = []
    for track in table.tracks:
        cut = views.dynamic_cut(track.layout, sizes)
        if cut is None:
            return None
        track = book.edit(track, *cut)
        made.append(book.edit(track, *views.squeeze(track.layout, numbers.collapsed_slice_dims)))
    return [Fixed(tuple(made))]


PRODUCTS: dict[str, Callable[[Book, Any, Sequence[Value]], Outs]] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "conv_general_dilated": convolution,
    "gather": gather,
}
