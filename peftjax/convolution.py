"""Convolutions with an operator: with the factor that reads, then the factors that write."""

import math
from functools import partial
from typing import Any, Callable, Sequence

import jax.numpy as jnp
from jax import lax

from peftjax.factored import Factor, Term, chain
from peftjax.outputs import Run, dropped, split_terms, summed
from peftjax.sides import between, outside, shared, sides
from peftjax.views import Split
from peftjax.weight import Weight


def convolution(eqn: Any, operands: Sequence[Any], run: Run) -> list[Any] | None:
    """The output of a convolution whose kernel is an operator, or None where the operator has to be merged first."""
    x, w = operands
    p = eqn.params
    if not isinstance(w, Weight) or isinstance(x, Weight):
        return None
    w = w.only_for("conv_general_dilated")
    ins, outs, sizes = _conv_labels(eqn, w, x)
    plain = lambda x, array: run(eqn, [x, array])[0]

    def product(term: Term, x: Any) -> Callable[[], Any] | None:
        if found := sides(term, ins, outs):
            return lambda: between(dropped(x, term), term, found, plain, ins, outs, sizes)
        return _conv_term(term, w, x, p)

    def inner(x: Any, w: Weight) -> Any:
        base, products = split_terms(w, "conv_general_dilated", partial(plain, x), lambda t: product(t, x))
        return summed(eqn, base, [make() for make in products])

    around = shared(w, ins, outs)
    if around is None or any(product(t, x) is None for _, _, part in around for t in part.terms):
        return None
    return [outside(x, around, inner, ins, outs, sizes)]


def _conv_labels(eqn: Any, w: Weight, x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[Any, int]]:
    """The axes of the input and of the output, their channels in the kernel's atoms; their sizes.

    The input channels of a grouped convolution are not those of its kernel.
    """
    numbers, sizes = eqn.params["dimension_numbers"], dict(w.layout.sizes)
    reads, writes = (w.layout.dims[k] for k in (numbers.rhs_spec[1], numbers.rhs_spec[0]))

    def labels(name: str, shape: Sequence[int], feature: int, atoms: Sequence[Any]) -> tuple[Any, ...]:
        sizes.update({(name, k): n for k, n in enumerate(shape)})
        return tuple(a for k in range(len(shape)) for a in (atoms if k == feature else ((name, k),)))

    channels = numbers.lhs_spec[1]
    ins = labels("x", x.shape, channels, reads if eqn.params["feature_group_count"] == 1 else (("x", channels),))
    outs = labels("y", eqn.outvars[0].aval.shape, numbers.out_spec[1], writes)
    return ins, outs, sizes


def _conv_term(term: Term, w: Weight, x: Any, p: dict[str, Any]) -> Callable[[], Any] | None:
    """The output of one product of factors: a convolution with the factor that reads, then the ones that write.

    Groups of features read each its own part of x's features; groups of examples, each its own examples of all.
    """
    out_dim, *read_dims = p["dimension_numbers"].rhs_spec
    read = {a for k in read_dims for a in w.layout.dims[k]}
    write = w.layout.dims[out_dim]
    readers = [f for f in term.factors if read & set(f.atoms)]
    if (
        term.dense is not None
        or len(readers) != 1
        or not read <= set(readers[0].atoms)
        or set(write) & set(readers[0].atoms)
    ):
        return None
    grouped, groups = p["feature_group_count"] > 1, max(p["feature_group_count"], p["batch_group_count"])
    if groups > 1 and len(write) != 1:
        return None
    reader = readers[0]
    inner = tuple(a for a in reader.atoms if a not in read)
    width = math.prod(n for a, n in zip(reader.atoms, reader.array.shape) if a in inner)

    def kernel() -> Any:
        order = [a for k in range(len(w.layout.dims)) for a in (inner if k == out_dim else w.layout.dims[k])]
        shape = [width if k == out_dim else n for k, n in enumerate(w.layout.shape)]
        array = lax.transpose(reader.array, [reader.atoms.index(a) for a in order]).reshape(shape)
        return jnp.tile(array, [groups if grouped and k == out_dim else 1 for k in range(array.ndim)])

    def product() -> Any:
        keys = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")
        h = lax.conv_general_dilated(
            dropped(x, term), kernel().astype(x.dtype), **{k: p[k] for k in keys}, precision=p["precision"]
        )
        batch, feature, *_ = p["dimension_numbers"].out_spec
        parts = (write[0] + (0,), write[0] + (1,)) if groups > 1 else write
        others = [f for f in term.factors if f is not reader]
        sizes = dict(w.layout.sizes)
        if groups > 1:
            sizes |= {parts[0]: groups, parts[1]: sizes[write[0]] // groups}
            others = [f.edited(Split(write[0], parts, (groups, sizes[parts[1]])), ()) for f in others]
        inner_sizes = dict(zip(reader.atoms, reader.array.shape))
        sizes |= {("y", k): n for k, n in enumerate(h.shape)} | {a: inner_sizes[a] for a in inner}
        sizes[("y", batch)] //= p["batch_group_count"]
        at = lambda k, these: these if k == feature else (("y", k),)
        group = lambda k: parts[:1] if groups > 1 and k == (feature if grouped else batch) else ()
        have = tuple(a for k in range(h.ndim) for a in group(k) + at(k, inner))
        want = tuple(a for k in range(h.ndim) for a in at(k, parts))
        return chain(Factor(h.reshape([sizes[a] for a in have]), have), others, want, sizes, p["precision"])

    return product
