"""Products of arrays over named axes: the terms that an operator is the sum of, and how they are multiplied."""

import dataclasses
import math
from functools import partial
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from peftjax import compat
from peftjax.views import Cut, Drop, DynamicCut, Edit, Reverse, Split

Labels = tuple[Any, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["atoms", "shared"])
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array whose axes are atoms of the operator's axes, or inner labels (strings) that the product sums over.

    Factors of several terms with the same number in `shared` are one array, whatever views have made of it since.
    """

    array: Any
    atoms: Labels
    shared: int = 0

    lazy = False  # whether some axis of it is in no array: see `peftjax.picks`

    @property
    def labels(self) -> Labels:
        """Every axis of it."""
        return self.atoms

    @property
    def sizes(self) -> dict[Any, int]:
        """The sizes of these axes."""
        return dict(zip(self.atoms, self.array.shape))

    def edited(self, edit: Edit, operands: Sequence[Any]) -> "Factor":
        """The factor after the operator's axes moved: untouched where it lacks the axis."""
        if edit.atom not in self.atoms:
            return self
        k = self.atoms.index(edit.atom)
        match edit:
            case Split(_, parts, sizes):
                shape = (*self.array.shape[:k], *sizes, *self.array.shape[k + 1 :])
                return self.having(self.array.reshape(shape), (*self.atoms[:k], *parts, *self.atoms[k + 1 :]))
            case Drop():
                return self.having(lax.squeeze(self.array, (k,)), (*self.atoms[:k], *self.atoms[k + 1 :]))
            case Cut(_, start, limit, stride):
                return self.having(lax.slice_in_dim(self.array, start, limit, stride, k))
            case DynamicCut(_, operand, size):
                return self.having(lax.dynamic_slice_in_dim(self.array, operands[operand], size, k))
            case Reverse():
                return self.having(lax.rev(self.array, (k,)))

    def having(self, array: Any, atoms: Labels | None = None) -> "Factor":
        """The same factor as a view of it: another array, with these atoms or its own."""
        return dataclasses.replace(self, array=array, atoms=self.atoms if atoms is None else atoms)

    @property
    def along(self) -> Labels:
        """The operator's axes whose entries it mixes; a factor that only multiplies has none."""
        return ()

    @property
    def touches(self) -> set[Any]:
        """The operator's axes, and inner ones, that it says something of."""
        return set(self.atoms)

    def follows(self, edit: Edit) -> bool:
        """Whether it can be `edited`."""
        return True

    def backward(self) -> "Factor":
        """What acts on an operator's input as this one acts on the operator."""
        return self

    def wide(self) -> "Factor":
        """The factor in float32 or wider."""
        return self.having(self.array.astype(wide_dtype(self.array.dtype)))

    def whole(self) -> "Factor":
        """The factor with all its axes in one array."""
        return self

    def times(self, x: "Factor", keep: set[Any], precision: Any) -> "Factor":
        """What `pair` gives of x and this factor."""
        x = _summed(x, keep | set(self.atoms))
        w = _summed(self, keep | set(x.atoms))
        if set(w.atoms) <= set(x.atoms) & keep:
            order = [w.atoms.index(a) for a in x.atoms if a in w.atoms]
            shape = [n if a in w.atoms else 1 for a, n in zip(x.atoms, x.array.shape)]
            return Factor(x.array * lax.transpose(w.array, order).reshape(shape).astype(x.array.dtype), x.atoms)
        shared = set(x.atoms) & set(w.atoms)
        out = (
            *(a for a in x.atoms if a in shared and a in keep),
            *(a for a in x.atoms if a not in shared),
            *(a for a in w.atoms if a not in shared),
        )
        return Factor(product(x.array, w.array, x.atoms, w.atoms, out, precision), out)

    def acting(self, x: "Factor") -> "Factor":
        """Its product with an array that has all of its axes, in the array's dtype."""
        return pair(x, self, set(x.atoms), lax.Precision.HIGHEST)


@partial(
    jax.tree_util.register_dataclass, data_fields=["dense", "factors", "key"], meta_fields=["uses", "rate", "splits"]
)
@dataclasses.dataclass(frozen=True)
class Term:
    """One product. `dense` spans the operator's axes in their order; `uses` limits the primitives it acts in.

    `rate` and `key` are dropout of what the term reads. `splits` are those of the operator's axes whose parts the
    factors stand on; an operator splits them for all of its terms.
    """

    dense: Any = None
    factors: tuple[Factor, ...] = ()
    key: Factor | None = None
    uses: tuple[str, ...] | None = None
    rate: float = 0.0
    splits: tuple[Split, ...] = ()

    def acts_in(self, primitive: str) -> bool:
        """Whether the term takes part where this primitive uses the operator."""
        return self.uses is None or primitive in self.uses

    def times(self, *factors: Factor) -> "Term":
        """The term with further factors."""
        return dataclasses.replace(self, factors=(*self.factors, *factors))

    def dropping(self, key: Factor, rate: float) -> "Term":
        """The term with dropout of what it reads; one that has its own keeps that."""
        return self if self.rate and self.key is not None else dataclasses.replace(self, key=key, rate=rate)

    def mapped(self, on_factor: Any, dense: Any) -> "Term":
        """The term with every factor (and the key) changed, and another dense part."""
        key = None if self.key is None else on_factor(self.key)
        return dataclasses.replace(self, dense=dense, factors=tuple(map(on_factor, self.factors)), key=key)


def scaled(terms: Sequence[Term], factor: Factor) -> tuple[Term, ...]:
    """Every term times one factor, which a contraction then applies once, to the sum of what the terms give."""
    number = 1 + max((f.shared for t in terms for f in t.factors), default=0)
    return tuple(t.times(dataclasses.replace(factor, shared=number)) for t in terms)


def wide_dtype(dtype: Any) -> Any:
    """float32 for narrower floating types, else the type itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def chain(x: Factor, factors: Sequence[Factor], out: Labels, sizes: dict[Any, int], precision: Any = None) -> Any:
    """Contracts x with factor after factor, the smallest result first, into an array with axes `out`.

    Labels that are not in `out` are summed; labels of `out` that nobody holds are broadcast to `sizes`.
    """
    todo = list(factors)
    if x.lazy:
        x, todo = _led(x, todo)
    while todo:
        todo.sort(key=lambda f: _result_size(x, f, _kept(out, todo, f)))
        factor = todo.pop(0)
        x = pair(x, factor, {*out, *(a for f in todo for a in f.labels)}, precision)
    x = _summed(x, set(out))
    missing = [a for a in out if a not in x.atoms]
    order = [x.atoms.index(a) for a in out if a in x.atoms]
    array = lax.transpose(x.array, order)
    if missing:
        shape = [sizes[a] for a in out]
        array = lax.broadcast_in_dim(array, shape, [k for k, a in enumerate(out) if a in x.atoms])
    return array


def _led(x: Factor, todo: list[Factor]) -> tuple[Factor, list[Factor]]:
    """Another factor first, from which x picks; where there is none, x with all its axes."""
    first = next((f for f in todo if not f.lazy), None)
    return (x.whole(), todo) if first is None else (first, [x, *(f for f in todo if f is not first)])


def _kept(out: Labels, todo: Sequence[Factor], factor: Factor) -> set[Any]:
    return {*out, *(a for f in todo if f is not factor for a in f.labels)}


def _result_size(x: Factor, f: Factor, keep: set[Any]) -> int:
    sizes = x.sizes | f.sizes
    return math.prod(n for a, n in sizes.items() if a in keep)


def _summed(x: Factor, keep: set[Any]) -> Factor:
    gone = tuple(k for k, a in enumerate(x.atoms) if a not in keep)
    return Factor(x.array.sum(gone), tuple(a for a in x.atoms if a in keep)) if gone else x


def pair(x: Factor, w: Factor, keep: set[Any], precision: Any = None) -> Factor:
    """The product of two labelled arrays in x's dtype, summed over what neither `keep` nor the other holds."""
    return w.times(x, keep, precision)


def product(x: Any, w: Any, xs: Labels, ws: Labels, out: Labels, precision: Any = None, batched: bool = False) -> Any:
    """`x . w` over the labels they share, in x's dtype, with axes `out`; w is the smaller of the two.

    `batched` says that it is one of a batch of products, whose axis a `jax.vmap` around it adds.
    """
    rows = [a for a in xs if a not in ws]
    made = (*(a for a in xs if a in ws and a in out), *rows, *(a for a in ws if a not in xs))
    if len(rows) > 1 and list(xs[: len(rows)]) == rows == list(made[: len(rows)]) and compat.joins_rows(x):
        joined = x.reshape(-1, *x.shape[len(rows) :])
        y = _product(joined, w, ("rows", *xs[len(rows) :]), ws, ("rows", *made[len(rows) :]), precision, batched)
        y = y.reshape(*x.shape[: len(rows)], *y.shape[1:])
    else:
        y = _product(x, w, xs, ws, made, precision, batched)
    return lax.transpose(y, [made.index(a) for a in out])


def _product(x: Any, w: Any, xs: Labels, ws: Labels, out: Labels, precision: Any, batched: bool) -> Any:
    """The product with axes `out`: those shared and kept, then x's own, then w's own.

    JAX takes the gradient for w with x on the right and turns the result. The barrier, which gradients pass too, keeps
    XLA from turning a large x instead: on CPU, a transposed copy of all activations, made with what produces them.
    A custom VJP would order the products as well, and take the forward derivatives, `jax.jvp`, from every tuned model.
    """
    summed = [a for a in xs if a in ws and a not in out]
    batch = [a for a in xs if a in ws and a in out]
    at = lambda labels, which: [labels.index(a) for a in which]
    w = w.astype(x.dtype)
    size = lambda labels: math.prod(w.shape[ws.index(a)] for a in labels)
    # Where w reads more than it writes, x is the large operand. With batch axes, its own or those of a vmap around it, XLA on
    # CPU cannot lay out the gradient that this asks for: where they are split over devices, it stops the process.
    if not batch and not batched and size(summed) > size(a for a in ws if a not in xs):
        turned = at(ws, (*(a for a in ws if a not in xs), *summed))
        w = lax.optimization_barrier(lax.transpose(w, turned))
        w = lax.transpose(w, [turned.index(k) for k in range(len(turned))])
    return lax.dot_general(
        x,
        w,
        ((at(xs, summed), at(ws, summed)), (at(xs, batch), at(ws, batch))),
        precision=precision,
        out_sharding=compat.product_sharding(x, w, xs, ws, out),
    )
