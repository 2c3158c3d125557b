"""What `views` says of an array's axes, against arrays that are really transposed, reshaped and sliced."""

import math

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from peftjax.views import Cut, Drop, DynamicCut, Layout, Reverse, Split, follow

MAY_MIX = ("reshape", "slice", "dynamic_slice", "split")  # may cut an axis where no atom ends


class Labelled:
    """An array with an atom for each axis, which edits change as they say."""

    def __init__(self, array):
        self.array, self.atoms = array, [(k,) for k in range(array.ndim)]

    def edit(self, edit, starts):
        axis = self.atoms.index(edit.atom) if edit.atom in self.atoms else None
        at = lambda index: (slice(None),) * axis + (index,)
        match edit:
            case Drop() if axis is not None:
                assert self.array.shape[axis] == 1
                self.array = self.array[at(0)]
                self.atoms.pop(axis)
            case Split(parts=parts, sizes=sizes) if axis is not None:
                assert math.prod(sizes) == self.array.shape[axis]
                self.array = self.array.reshape(*self.array.shape[:axis], *sizes, *self.array.shape[axis + 1 :])
                self.atoms[axis : axis + 1] = parts
            case Cut(start=start, limit=limit, stride=stride) if axis is not None:
                self.array = self.array[at(slice(start, limit, stride))]
            case DynamicCut(operand=operand, size=size) if axis is not None:
                self.array = self.array[at(slice(starts[operand - 1], starts[operand - 1] + size))]
            case Reverse() if axis is not None:
                self.array = np.flip(self.array, axis)

    def seen(self, layout):
        """The view that a layout describes; an atom that the array has not is a repetition."""
        own = [a for a in layout.atoms if a in self.atoms]
        assert sorted(own) == sorted(self.atoms), (own, self.atoms)
        array = self.array.transpose([self.atoms.index(a) for a in own])
        array = array.reshape([layout.size(a) if a in own else 1 for a in layout.atoms])
        return np.broadcast_to(array, [layout.size(a) for a in layout.atoms]).reshape(layout.shape)


def _sizes(draw, total):
    """Some shape with this many entries."""
    sizes = []
    while total > 1:
        n = draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
        sizes.append(n)
        total //= n
        if len(sizes) == 3:
            sizes.append(total)
            break
    return tuple(sizes)


@st.composite
def step(draw, shape):
    """An operation on an array of this shape, and the starts of its dynamic slice."""
    kinds = ["transpose", "reshape", "expand", "cast"] + ["slice", "dynamic", "rev", "split"] * bool(shape)
    kinds += ["squeeze"] * (1 in shape) + ["tile"] * (len(shape) < 4)
    kind, axes = draw(st.sampled_from(kinds)), range(len(shape))
    spans = [sorted(draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape]
    spans = [(a, max(b, a + 1)) for a, b in spans]
    if kind == "transpose":
        order = draw(st.permutations(axes))
        return (lambda x: lax.transpose(x, order)), ()
    if kind == "reshape":
        sizes = _sizes(draw, math.prod(shape))
        return (lambda x: lax.reshape(x, sizes)), ()
    if kind == "expand":
        at = draw(st.integers(0, len(shape)))
        return (lambda x: lax.expand_dims(x, [at])), ()
    if kind == "cast":
        return (lambda x: x.astype(np.float32)), ()
    if kind == "squeeze":
        return (lambda x: lax.squeeze(x, [shape.index(1)])), ()
    if kind == "tile":
        places = sorted(draw(st.permutations(range(len(shape) + 1)))[: len(shape)])
        sizes = {p: 3 if n == 1 and draw(st.booleans()) else n for p, n in zip(places, shape)}
        return (lambda x: lax.broadcast_in_dim(x, [sizes.get(k, 2) for k in range(len(shape) + 1)], places)), ()
    if kind == "slice":
        strides = [draw(st.integers(1, 2)) for _ in shape]
        return (lambda x: lax.slice(x, [a for a, _ in spans], [b for _, b in spans], strides)), ()
    if kind == "dynamic":
        starts = [a for a, _ in spans]
        return (lambda x: lax.dynamic_slice(x, starts, [b - a for a, b in spans])), starts
    axis = draw(st.sampled_from(axes))
    if kind == "rev":
        return (lambda x: lax.rev(x, [axis])), ()
    first = draw(st.integers(0, shape[axis]))
    return (lambda x: lax.split(x, [first, shape[axis] - first], axis=axis)[0 if first else 1]), ()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_layouts_describe_the_views(data):
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    layout, labelled = Layout.of(shape), Labelled(array)
    for _ in range(data.draw(st.integers(1, 5))):
        op, starts = data.draw(step(array.shape))
        jaxpr = jax.make_jaxpr(op)(array).jaxpr
        if not jaxpr.eqns:
            continue
        (eqn,) = jaxpr.eqns
        views = follow(eqn.primitive.name, eqn.params, layout)
        if views is None:
            assert eqn.primitive.name in MAY_MIX
            return
        layout, edits = views[eqn.outvars.index(jaxpr.outvars[0])]
        for edit in edits:
            labelled.edit(edit, starts)
        array = np.asarray(op(array))
        assert layout.shape == array.shape
        np.testing.assert_array_equal(labelled.seen(layout), array)


def test_a_reshape_splits_and_joins():
    (split, edits), *_ = follow("reshape", {"new_sizes": (4, 3, 2), "dimensions": None}, Layout.of((4, 6)))
    assert split.dims == (((0,),), ((1, 0),), ((1, 1),)) and edits == (Split((1,), ((1, 0), (1, 1)), (3, 2)),)
    (joined, edits), *_ = follow("reshape", {"new_sizes": (24,), "dimensions": None}, split)
    assert joined.dims == (((0,), (1, 0), (1, 1)),) and edits == ()
    assert follow("reshape", {"new_sizes": (6, 4), "dimensions": None}, Layout.of((4, 6))) is None


def test_what_is_no_view():
    assert follow("dot_general", {}, Layout.of((2, 3))) is None
    assert follow("reshape", {"new_sizes": (6,), "dimensions": (1, 0)}, Layout.of((2, 3))) is None


def test_repetitions_are_told_apart():
    tile = lambda layout, *shape: follow("broadcast_in_dim", {"shape": shape, "broadcast_dimensions": (1, 2)}, layout)
    (tiled, _), *_ = tile(Layout.of((1, 3)), 2, 1, 3)
    (narrow, _), *_ = follow("squeeze", {"dimensions": (1,)}, tiled)
    (again, _), *_ = tile(narrow, 4, 2, 3)
    assert again.shape == (4, 2, 3)
