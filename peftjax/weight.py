"""An operator as a sum of products: `W = sum_t dense_t * factor_t1 * factor_t2 ...`, over named axes."""

import dataclasses
import functools
import operator
from functools import partial
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from peftjax.factored import Factor, Term, chain
from peftjax.overlay import Overlay, type_of
from peftjax.views import Layout, Split


@partial(jax.tree_util.register_dataclass, data_fields=["terms"], meta_fields=["layout", "type", "path"])
@dataclasses.dataclass(frozen=True)
class Weight:
    """An operator on its way through a model: its terms, its axes as viewed so far, its logical type, its leaf's path."""

    terms: tuple[Term, ...]
    layout: Layout
    type: Any
    path: str

    def only_for(self, primitive: str) -> "Weight":
        """The operator as this primitive sees it."""
        return dataclasses.replace(self, terms=tuple(t for t in self.terms if t.acts_in(primitive)))

    @property
    def drops(self) -> bool:
        """Whether a term drops some of what it reads, by a key: no array says so."""
        return any(t.rate and t.key is not None for t in self.terms)

    @property
    def plain(self) -> Any:
        """Its dense array, where that is all there is, else None."""
        term = self.terms[0] if len(self.terms) == 1 else Term(factors=(Factor(None, ()),))
        return term.dense if not term.factors else None


def expand(leaf: Any, path: str = "") -> Weight:
    """The operator that a leaf stands for: an array is its own dense term; an overlay changes its base's terms."""

    def terms(x: Any) -> tuple[Term, ...]:
        return x.expand(terms(x.base)) if isinstance(x, Overlay) else (Term(dense=x),)

    kind = type_of(leaf)
    return Weight(*_split(terms(leaf), Layout.of(kind.shape)), kind, path)


def _split(terms: tuple[Term, ...], layout: Layout) -> tuple[tuple[Term, ...], Layout]:
    """The terms on the same parts of the axes; a product on other parts than those before it is formed."""
    agreed: dict[Any, Split] = {}
    fits = lambda t: all(agreed.get(s.atom, s) == s for s in t.splits)
    for term in terms:
        agreed.update({s.atom: s for s in term.splits} if fits(term) else {})
    if not agreed:
        return terms, layout

    def edited(f: Factor) -> Factor:
        return functools.reduce(lambda f, s: f.edited(s, ()), agreed.values(), f)

    made = [t if fits(t) else _formed(t, layout) for t in terms]
    whole = functools.reduce(Layout.split, agreed.values(), layout)
    return tuple(dataclasses.replace(t.mapped(edited, t.dense), splits=()) for t in made), whole


def _formed(term: Term, layout: Layout) -> Term:
    """The term with one factor in the place of those on parts of axes, and of all that inner axes join to them."""
    split = functools.reduce(Layout.split, term.splits, layout)
    reached = {p for s in term.splits for p in s.parts}
    for _ in term.factors:
        found = [f for f in term.factors if reached & set(f.atoms)]
        reached |= {a for f in found for a in f.atoms if isinstance(a, str)}
    held = {a for f in found for a in f.atoms}
    axes = [k for k, dim in enumerate(split.dims) if held & set(dim)]
    out = tuple(a for k in axes for a in split.dims[k])
    array = chain(found[0], found[1:], out, dict(split.sizes)).reshape([layout.shape[k] for k in axes])
    rest = (f for f in term.factors if not reached & set(f.atoms))
    return dataclasses.replace(term, factors=(Factor(array, tuple((k,) for k in axes)), *rest), splits=())


def materialise(leaf: Any) -> Any:
    """The array that an overlay stands for: summed in float32 (or wider), then cast to the leaf's dtype."""
    return dense(expand(leaf)) if isinstance(leaf, Overlay) else leaf


def dense(weight: Weight, where: str = "") -> Any:
    """The operator as one array of its logical type; `where` ends what is said of one that has none."""
    if (plain := weight.plain) is not None:
        return plain
    if weight.drops:
        raise ValueError(
            f"the overlay at {weight.path} has dropout, which acts on what its weight reads, and would have to be merged"
            f"{where}; leave the leaf out with `exclude`, give it another method without dropout, or run without a key"
        )
    whole = [_dense_term(t, weight.layout) for t in weight.terms if t.dense is not None]
    products = [_dense_term(t, weight.layout) for t in weight.terms if t.dense is None]
    # Products are summed among themselves first: opposite ones cancel exactly.
    parts = [*whole, functools.reduce(operator.add, products)] if products else whole
    return functools.reduce(operator.add, parts).astype(weight.type.dtype)


def _dense_term(term: Term, layout: Layout) -> Any:
    factors = tuple(f.wide() for f in term.factors)
    if term.dense is not None:
        whole = Factor(term.dense.reshape([layout.size(a) for a in layout.atoms]), layout.atoms)
        factors = (whole.wide(), *factors)
    sizes = {a: layout.size(a) for a in layout.atoms}
    first, *rest = _mixed(factors, sizes)
    return chain(first, rest, layout.atoms, sizes).reshape(layout.shape)


def _mixed(factors: Sequence[Factor], sizes: dict[Any, int]) -> list[Factor]:
    """The factors, where those that mix entries have acted on the product of those before them along the same axes."""
    done: list[Factor] = []
    for f in factors:
        if f.along:
            done = [g if set(f.along).isdisjoint(g.atoms) else g.whole() for g in done]
            apart = [set(f.along).isdisjoint(g.atoms) for g in done]
            held = [g for a, g in zip(apart, done) if not a]
            labels = tuple(dict.fromkeys([*(a for g in held for a in g.atoms), *f.along]))
            whole = len(held) == 1 and held[0].atoms == labels
            one = held[0] if whole else Factor(chain(Factor(jnp.ones(()), ()), held, labels, sizes), labels)
            done, f = [g for a, g in zip(apart, done) if a], f.acting(one)
        done.append(f)
    return done
