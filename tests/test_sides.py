"""A dense array between factors: the equation runs on it as it stands, and what it reads and writes is changed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from jax import lax
from peftjax.factored import Factor, Term, scaled
from peftjax.overlay import Overlay, frozen, overlay, static, trained


def data(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@overlay
class Diagonals(Overlay):
    """The base times a vector along each of some axes."""

    base: Any = frozen()
    vectors: Any = trained()
    scale: Any = frozen(default=None)
    axes: tuple[int, ...] = static()
    locked: tuple[str, ...] = static(default=())

    def expand(self, terms):
        return tuple(t.times(*(Factor(v, ((k,),)) for k, v in zip(self.axes, self.vectors))) for t in terms)


def dense(x):
    w = jnp.asarray(x.base)
    for k, v in zip(x.axes, x.vectors):
        w = w * jnp.expand_dims(v, [j for j in range(w.ndim) if j != k])
    return w


def conv(w, x, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (2, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


IDS = np.array([[1, 0, 3], [3, 3, 2]])
USES = {
    "dot": (lambda w, x: x @ w, (4, 6), (5, 4), (0, 1)),
    "dot, more rows than inputs": (lambda w, x: x @ w, (4, 6), (9, 4), (0, 1)),
    "on the left": (lambda w, x: w @ x, (4, 6), (6, 5), (0, 1)),
    "heads": (
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w),
        (4, 3, 2),
        (5, 4),
        (0, 2, 1),
    ),
    "experts": (
        lambda w, x: jnp.einsum("ebd,edk->ebk", x, w),
        (3, 4, 2),
        (3, 5, 4),
        (0, 1, 2),
    ),
    "conv": (conv, (3, 2, 4, 6), (2, 5, 5, 4), (2, 3)),
    "grouped conv": (lambda w, x: conv(w, x, 2), (3, 2, 2, 6), (2, 5, 5, 4), (3,)),
    "lookup": (lambda w, x: w[IDS] + 0 * x.sum(), (4, 6), (1,), (0, 1)),
}


def case(name):
    fn, shape, shape_x, axes = USES[name]
    vectors = [1 + data(shape[k], seed=1) / 4 for k in axes]
    return fn, Diagonals(base=data(*shape), vectors=vectors, axes=axes), data(*shape_x)


@pytest.mark.parametrize("name", USES)
def test_values_and_gradients_are_those_of_the_dense_product(name):
    fn, w, x = case(name)
    apply = lambda w, x: pj.wrap(lambda p, x: fn(p["w"], x))({"w": w}, x)
    np.testing.assert_allclose(apply(w, x), fn(dense(w), x), rtol=1e-5, atol=1e-5)
    loss = lambda run: lambda vectors, x: jnp.sum(jnp.sin(run(w.replace(vectors=vectors), x)))
    got = jax.grad(loss(apply), (0, 1))(w.vectors, x)
    want = jax.grad(loss(lambda w, x: fn(dense(w), x)), (0, 1))(w.vectors, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("name", USES)
def test_the_array_itself_is_what_the_equation_reads(name):
    """Nothing of the weight's size is made, so the base's own product is all that a step costs."""
    fn, w, x = case(name)
    jaxpr = jax.make_jaxpr(lambda w, x: pj.wrap(lambda p, x: fn(p["w"], x))({"w": w}, x))(w, x)
    found = [e for e in jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated", "gather")]
    assert jaxpr.jaxpr.invars[0] in [v for e in found for v in e.invars]
    assert not pj.explain(lambda p, x: fn(p["w"], x), {"w": w}, x).merged


def test_taps_of_a_convolution_are_merged():
    fn, w, x = case("conv")
    w = w.replace(axes=(0, 3), vectors=[1 + data(3) / 4, w.vectors[1]])
    tuned, model = {"w": w}, lambda p, x: fn(p["w"], x)
    assert pj.explain(model, tuned, x).merged
    np.testing.assert_allclose(pj.wrap(model)(tuned, x), fn(dense(w), x), rtol=1e-5, atol=1e-5)


def test_a_factor_near_one_is_not_lost_in_bfloat16():
    """1 + 2^-8 is 1 in bfloat16, yet what it does to an output that is read in float32 stays."""
    w = {
        "w": Diagonals(
            base=jnp.ones((64, 4), jnp.bfloat16),
            vectors=[jnp.full(4, 1 + 2.0**-8)],
            axes=(1,),
        )
    }
    x = jnp.ones((1, 64), jnp.bfloat16)
    y = pj.wrap(lambda p, x: jnp.matmul(x, p["w"], preferred_element_type=jnp.float32))(w, x)
    np.testing.assert_array_equal(y, np.full((1, 4), 64 * (1 + 2.0**-8), np.float32))


@overlay
class Around(Overlay):
    """The base and a product of two factors, all of it times a vector along one axis."""

    base: Any = frozen()
    a: Any = trained()
    b: Any = trained()
    vector: Any = trained()
    scale: Any = frozen(default=None)
    axis: int = static()
    locked: tuple[str, ...] = static(default=())

    def expand(self, terms):
        last = self.base.ndim - 1
        reads = tuple((k,) for k in range(last))
        product = Term(factors=(Factor(self.a, (*reads, "rank")), Factor(self.b, ("rank", (last,)))))
        return scaled((*terms, product), Factor(self.vector, ((self.axis,),)))

    def array(self):
        vector = jnp.expand_dims(self.vector, [k for k in range(self.base.ndim) if k != self.axis])
        return vector * (self.base + jnp.tensordot(self.a, self.b, 1))


AROUND = {
    "dot": (lambda w, x: x @ w, (4, 6), (5, 4), 1),
    "dot, few rows": (lambda w, x: x @ w, (4, 6), (2, 4), 1),
    "read side": (lambda w, x: x @ w.T, (4, 6), (9, 6), 1),
    "in a jit region, sliced": (jax.jit(lambda w, x: x @ w[:, 2:5]), (4, 6), (5, 4), 1),
    "conv": (conv, (3, 2, 4, 6), (2, 5, 5, 4), 3),
    "grouped conv": (lambda w, x: conv(w, x, 2), (3, 2, 2, 6), (2, 5, 5, 4), 3),
    "lookup": (lambda w, x: w[IDS] + 0 * x.sum(), (4, 6), (1,), 1),
    "ragged": (lambda w, x: lax.ragged_dot(x, jnp.stack([w, 2 * w]), jnp.array([3, 1])), (4, 6), (5, 4), 1),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_factor_that_terms_share(name):
    fn, shape, shape_x, axis = AROUND[name]
    arrays = dict(a=data(*shape[:-1], 2), b=data(2, shape[-1]), vector=1 + data(shape[axis], seed=1) / 4)
    w, x = Around(base=data(*shape), axis=axis, **arrays), data(*shape_x)
    apply = lambda w, x: pj.wrap(lambda p, x: fn(p["w"], x))({"w": w}, x)
    np.testing.assert_allclose(apply(w, x), fn(w.array(), x), rtol=1e-5, atol=1e-5)
    loss = lambda run: lambda arrays, x: jnp.sum(jnp.sin(run(w.replace(**arrays), x)))
    got = jax.grad(loss(apply), (0, 1))(arrays, x)
    want = jax.grad(loss(lambda w, x: fn(w.array(), x)), (0, 1))(arrays, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_a_shared_factor_costs_no_product():
    """The sum is folded below the factor: without it, a step does as many operations but for some an output entry."""
    w = Around(base=data(256, 256), axis=1, a=data(256, 2), b=data(2, 256), vector=data(256))
    bare = pj.lora(rank=2).init(jax.random.key(0), {"w": data(256, 256)})["w"]
    apply = pj.wrap(lambda p, x: x @ p["w"])

    def operations(w):
        trainable, frozen = pj.partition({"w": w})
        loss = lambda t, x: jnp.sum(jnp.sin(apply(pj.combine(t, frozen), x)))
        return jax.jit(jax.grad(loss, (0, 1))).lower(trainable, data(512, 256)).compile().cost_analysis()["flops"]

    assert operations(w) < operations(bare) + 20 * 512 * 256
