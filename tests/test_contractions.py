"""Random uses of a weight agree with the dense one: contractions, convolutions and lookups, of random views of a leaf
whose axes are lettered at random, so that letters and use may agree or not.

1,100 contractions and convolutions in all, no two alike in a part; a fifth of them is run by default, the rest by
`pytest -m full`."""

import dataclasses
import math
import string

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from hypothesis import HealthCheck, given, seed, settings
from jax import lax
from laws import oracle
from peftjax.methods.lora import LoRA


FEW = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


BATCH = 10


def examples(count, strategy, parts):
    """Checks this many different examples of a strategy in each part, the same every time; the first part by default.

    The decorated function makes a `Use` of an example. Every batch of them is one program, for most of the time of a
    small program is spent on its being a program; a batch that fails shrinks to its example.
    """

    def decorate(use):
        @pytest.mark.parametrize("part", [0, *(pytest.param(k, marks=pytest.mark.full) for k in range(1, parts))])
        def test(part):
            met = set()

            def check(specs):
                met.update(map(said, specs))
                agree([use(*spec) for spec in specs])

            batches = st.lists(strategy(), min_size=BATCH, max_size=BATCH, unique_by=said)
            few = settings(FEW, max_examples=1 + count // BATCH)  # one batch more: now and then two are alike
            seed(part)(few(given(batches)(check)))()
            assert len(met) >= count

        return test

    return decorate


def said(spec):
    """What tells an example from others: of arrays of floats the shape, of everything else what it says."""
    match spec:
        case LoRA():
            return f"{spec.base.shape}{spec.axes}"
        case tuple() | list():
            return str([said(x) for x in spec])
        case np.ndarray() if spec.dtype == np.float32:
            return str(spec.shape)
    return str(spec)


# The leaf: a LoRA of a random array, its axes lettered at random


def leaf(shape, letters, seed=0):
    """A LoRA on an array of this shape, nothing in it zero."""
    rng = np.random.default_rng(seed)
    numbers = lambda *dims: np.asarray(rng.standard_normal(dims), np.float32)
    a, b = (list(shape), list(shape))
    for sizes, gone in ((a, "o"), (b, "i")):
        sizes[letters.index(gone)] = 2
        for k in reversed(range(letters.index(gone) + 1, len(shape))):
            if letters[k] == gone:
                del sizes[k]
    scale = np.float32(1.5) + numbers(*(n for n, letter in zip(shape, letters) if letter in "sb"))
    return LoRA(base=numbers(*shape), a=numbers(*a), b=numbers(*b), scale=scale, axes=letters)


@st.composite
def lettered(draw, ndim):
    """Letters of a leaf: one input and one output axis at least, the rest as it comes."""
    rest = draw(st.lists(st.sampled_from("iosb"), min_size=ndim - 2, max_size=ndim - 2))
    return "".join(draw(st.permutations(["i", "o", *rest])))


# Views


@dataclasses.dataclass(frozen=True)
class View:
    """A view of an array, and whether it keeps axes whole or cuts them evenly, so that no merge is due."""

    name: str
    fn: object = dataclasses.field(repr=False)
    even: bool = True


@st.composite
def views(draw, shape, most=3):
    """Random views, one after the other, of an array of this shape; and the last one's shape."""
    found, parts = [], [(n,) for n in shape]  # parts: the axes that each dimension has been merged of
    for _ in range(draw(st.integers(0, most))):
        made = draw(st.sampled_from(VIEWS))(draw, parts)
        if made is not None and math.prod(n for dim in made[1] for n in dim) <= 120:
            found.append(made[0])
            parts = made[1]
    return found, tuple(math.prod(dim) for dim in parts)


def _transpose(draw, parts):
    order = draw(st.permutations(range(len(parts))))
    return View(f"transpose{tuple(order)}", lambda w: lax.transpose(w, order)), [parts[k] for k in order]


def _merge(draw, parts):
    if len(parts) < 3:
        return None
    k = draw(st.integers(0, len(parts) - 2))
    new = [*parts[:k], parts[k] + parts[k + 1], *parts[k + 2 :]]
    return _reshaped("merge", new)


def _split(draw, parts):
    able = [k for k, dim in enumerate(parts) if len(dim) == 1 and dim[0] in (4, 6)]
    if not able or len(parts) > 4:
        return None
    k = draw(st.sampled_from(able))
    first = draw(st.sampled_from((2, parts[k][0] // 2)))
    return _reshaped("split", [*parts[:k], (first,), (parts[k][0] // first,), *parts[k + 1 :]])


def _reshaped(name, parts):
    shape = [math.prod(dim) for dim in parts]
    return View(f"{name}{shape}", lambda w: w.reshape(shape)), parts


def _uneven(draw, parts):
    size = math.prod(n for dim in parts for n in dim)
    first = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    new = [(first,), (size // first,)]
    return View(f"reshape{[first, size // first]}", lambda w: w.reshape(first, -1), even=False), new


def _slice(draw, parts):
    k = draw(st.integers(0, len(parts) - 1))
    size = math.prod(parts[k])
    start = draw(st.integers(0, size - 1))
    limit, stride = draw(st.integers(start + 1, size)), draw(st.integers(1, 2))
    fn = lambda w: lax.slice_in_dim(w, start, limit, stride, k)
    whole, left = sum(n > 1 for n in parts[k]) < 2, -(-(limit - start) // stride)
    return View(f"slice({start}:{limit}:{stride}, axis {k})", fn, whole), _sized(parts, k, left)


def _dynamic(draw, parts):
    k = draw(st.integers(0, len(parts) - 1))
    size = math.prod(parts[k])
    length, start = draw(st.integers(1, size)), draw(st.integers(0, size))
    fn = lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(start), length, k)
    whole = sum(n > 1 for n in parts[k]) < 2 or length == size
    new = _sized(parts, k, length) if length < size else parts
    return View(f"dynamic({start}, {length}, axis {k})", fn, whole), new


def _sized(parts, k, size):
    return [*parts[:k], (size,), *parts[k + 1 :]]


def _rev(draw, parts):
    k = draw(st.integers(0, len(parts) - 1))
    return View(f"rev({k})", lambda w: lax.rev(w, (k,))), parts


def _broadcast(draw, parts):
    if len(parts) > 4:
        return None
    k, size = draw(st.integers(0, len(parts))), draw(st.integers(1, 3))
    new = [*parts[:k], (size,), *parts[k:]]
    shape, kept = [math.prod(dim) for dim in new], [j for j in range(len(new)) if j != k]
    return View(f"broadcast{shape}{kept}", lambda w: lax.broadcast_in_dim(w, shape, kept)), new


def _squeeze(draw, parts):
    able = [k for k, dim in enumerate(parts) if math.prod(dim) == 1]
    if not able or len(parts) < 2:
        return None
    k = draw(st.sampled_from(able))
    return View(f"squeeze({k})", lambda w: lax.squeeze(w, (k,))), [*parts[:k], *parts[k + 1 :]]


def _narrow(draw, parts):
    return View("bfloat16", lambda w: w.astype(jnp.bfloat16).astype(jnp.float32)), parts


VIEWS = [_transpose, _merge, _split, _uneven, _slice, _dynamic, _rev, _broadcast, _squeeze, _narrow]


def seen(w, through):
    """The array after its views."""
    for view in through:
        w = view.fn(w)
    return w


# Agreement


@dataclasses.dataclass(frozen=True)
class Use:
    """A use of a viewed leaf, as `fn(viewed, *xs)`; `merges` False: without a merge."""

    w: LoRA
    through: list
    fn: object
    xs: tuple
    merges: bool = True

    def of(self, params, *xs):
        return self.fn(seen(params["w"], self.through), *xs)

    def run(self, f, tree, a, b, xs):
        """The use by `f` of the leaf as `tree` makes it, and its gradients."""
        moving = [k for k, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.floating)]

        def value(a, b, moved):
            given = list(xs)
            for k, x in zip(moving, moved):
                given[k] = x
            return f({"w": tree(self.w.replace(a=a, b=b))}, *given)

        y, back = jax.vjp(value, a, b, [xs[k] for k in moving])
        return y, back(numbers(*y.shape, seed=1))

    def both(self, a, b, xs):
        return self.run(pj.wrap(self.of), lambda w: w, a, b, xs), self.run(self.of, oracle, a, b, xs)


def agree(uses):
    """The uses, and their gradients, are those of the dense array."""
    arrays = [(use.w.a, use.w.b, use.xs) for use in uses]
    found = jax.jit(lambda arrays: [use.both(*x) for use, x in zip(uses, arrays)])(arrays)
    for use, (got, want) in zip(uses, found, strict=True):
        loose = 5e-2 if any(view.name == "bfloat16" for view in use.through) else 2e-5
        top = max(np.abs(y).max() for y in jax.tree.leaves(want[1]))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype, use
            np.testing.assert_allclose(x, y, rtol=0, atol=loose * max(np.abs(y).max(), top / 10), err_msg=str(use))
        if not use.merges and all(view.even for view in use.through):
            merged = pj.explain(use.of, {"w": use.w}, *use.xs).merged
            assert not merged, (use, merged)


def numbers(*shape, seed=2):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


SIZES = st.sampled_from((1, 2, 3, 4, 6))


@st.composite
def leaves(draw, least=2, most=4):
    """A leaf and views of it; the last view's shape."""
    ndim = draw(st.integers(least, most))
    shape = draw(st.lists(SIZES, min_size=ndim, max_size=ndim).filter(lambda dims: math.prod(dims) <= 80))
    w = leaf(shape, draw(lettered(ndim)))
    return w, *draw(views(shape))


# Products


@st.composite
def products(draw):
    w, through, shape = draw(leaves())
    roles = [draw(st.sampled_from(("contract", "batch", "free"))) for _ in shape]
    own = draw(st.lists(st.integers(1, 3), max_size=2))
    mine = [k for k, role in enumerate(roles) if role != "free"]
    labels = draw(st.permutations(mine + [-1 - j for j in range(len(own))]))
    x = numbers(*(shape[k] if k >= 0 else own[-1 - k] for k in labels))
    numbered = lambda role: [k for k, found in enumerate(roles) if found == role]
    mine = [draw(st.permutations(numbered(role))) for role in ("contract", "batch")]
    other = [[labels.index(k) for k in dims] for dims in mine]
    return w, through, x, mine, other, draw(st.booleans())


@examples(10, products, parts=42)
def test_dot_general(w, through, x, mine, other, left):
    pair = lambda first, second: ((first[0], second[0]), (first[1], second[1]))

    def use(w, x):
        return lax.dot_general(w, x, pair(mine, other)) if left else lax.dot_general(x, w, pair(other, mine))

    return Use(w, through, use, (x,), merges=False)


@st.composite
def einsums(draw):
    """A spec in which every axis of the weight meets the activation or the output."""
    w, through, shape = draw(leaves())
    mine = string.ascii_lowercase[: len(shape)]
    sizes = dict(zip(mine, shape))
    roles = [draw(st.sampled_from(("contract", "batch", "free"))) for _ in mine]
    own = "".join(draw(st.lists(st.sampled_from("XYZ"), max_size=2, unique=True)))
    sizes |= {letter: draw(st.integers(1, 3)) for letter in own}
    without = lambda gone: [k for k, role in zip(mine, roles) if role != gone]
    x = "".join(draw(st.permutations(without("free") + list(own))))
    out = "".join(draw(st.permutations(without("contract") + list(own[draw(st.integers(0, len(own))) :]))))
    left = draw(st.booleans())
    return w, through, numbers(*(sizes[k] for k in x)), f"{mine},{x}->{out}" if left else f"{x},{mine}->{out}", left


@examples(10, einsums, parts=34)
def test_einsum(w, through, x, spec, left):
    return Use(w, through, lambda w, x: jnp.einsum(spec, *((w, x) if left else (x, w))), (x,), merges=False)


# Convolutions


@dataclasses.dataclass(frozen=True)
class Conv:
    """The arguments of a convolution."""

    strides: tuple
    padding: tuple
    lhs_dilation: tuple
    rhs_dilation: tuple
    numbers: lax.ConvDimensionNumbers
    groups: int
    batch_groups: int

    def __call__(self, w, x):
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            dimension_numbers=self.numbers,
            feature_group_count=self.groups,
            batch_group_count=self.batch_groups,
        )


@st.composite
def convolutions(draw):
    spatial = draw(st.integers(1, 3))
    groups, batch_groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 1), (2, 1), (1, 2)]))
    lists = lambda values: tuple(draw(st.lists(values, min_size=spatial, max_size=spatial)))
    dims = lambda: tuple(draw(st.permutations(range(2 + spatial))))
    numbered = lax.ConvDimensionNumbers(dims(), dims(), dims())
    features = draw(st.integers(1, 3))
    laid = lambda spec, sizes: [n for _, n in sorted(zip(spec, sizes))]
    outs = groups * batch_groups * draw(st.integers(1, 3))
    kernel = laid(numbered.rhs_spec, (outs, features, *lists(st.integers(1, 3))))
    image = laid(numbered.lhs_spec, (2, groups * features, *lists(st.integers(4, 5))))
    small = st.integers(1, 2)
    padding = lists(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    conv = Conv(lists(small), padding, lists(small), lists(small), numbered, groups, batch_groups)
    letters = "".join("o" if k == numbered.rhs_spec[0] else "i" for k in range(2 + spatial))
    natural = draw(st.booleans())
    w = leaf(kernel, letters if natural else draw(lettered(2 + spatial)))
    turned = draw(st.lists(st.sampled_from(numbered.rhs_spec[1:]), max_size=2, unique=True))
    through = [View(f"rev({k})", lambda w, k=k: lax.rev(w, (k,))) for k in turned]
    return w, through, conv, numbers(*image), natural


@examples(10, convolutions, parts=42)
def test_conv_general_dilated(w, through, conv, x, natural):
    return Use(w, through, conv, (x,), merges=not natural)


# Lookups


@st.composite
def lookups(draw):
    w, through, shape = draw(leaves())
    axis = draw(st.integers(0, len(shape) - 1))
    many = draw(st.lists(st.integers(1, 3), max_size=2))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    ids = np.asarray(rng.integers(-1, shape[axis] + 1, many), np.int32)
    return w, through, axis, ids, draw(st.sampled_from(("clip", "wrap")))


@examples(10, lookups, parts=16)
def test_take_along_one_axis(w, through, axis, ids, mode):
    return Use(w, through, lambda w, ids: jnp.take(w, ids, axis=axis, mode=mode), (ids,))


@st.composite
def rowed(draw):
    groups, width, features = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = np.asarray(draw(st.lists(st.integers(0, 3), min_size=groups, max_size=groups)), np.int32)
    natural = draw(st.booleans())
    w = leaf((groups, width, features), "bio" if natural else draw(lettered(3)))
    return w, numbers(max(1, counts.sum()), width), counts, natural


@examples(10, rowed, parts=10)
def test_ragged_dot(w, x, counts, natural):
    return Use(w, [], lambda w, x, counts: lax.ragged_dot(x, w, counts), (x, counts), merges=not natural)
