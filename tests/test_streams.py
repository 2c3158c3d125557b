"""Which of the arrays that are added to a layer's output is the residual stream; overlays that wait act there alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import peftjax as pj
from peftjax.streams import streams


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[-2]), jnp.float32) for n, s in shapes.items()}


SHAPES = {"up": (8, 6), "down": (6, 8), "side": (8, 8), "positions": (5, 8), "bias": (8,), "stack": (3, 8, 8)}
PARAMS = {n: x for n, x in {**drawn({n: s for n, s in SHAPES.items() if len(s) > 1}), "bias": jnp.ones(8)}.items()}
X = drawn({"x": (2, 5, 8)}, 1)["x"]
INDEX = jnp.arange(5, dtype=jnp.float32)


def feed(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def term(p, x):
    """A term of positions: it depends on the stream, or on none, and the layer reads nothing of it."""
    return jnp.sin(x @ p["side"])


def ready(p, x):
    return jnp.sin(x) + p["positions"][None]


# Each model: `join(h, r)` adds a layer's output h, whatever else belongs to it, to its stream r.


def second_branch(p, x, join):
    x = ready(p, x)
    return join(feed(p, x) + term(p, x), x)


def term_on_the_left(p, x, join):
    x = ready(p, x)
    return join(term(p, x) - 0.5 + feed(p, x), x)


def constant(p, x, join):
    x = ready(p, x)
    return join(feed(p, x) + jnp.cos(INDEX)[None, :, None] * jnp.ones(x.shape, jnp.float32), x)


def positions_that_the_stream_was_made_with(p, x, join):
    where = jnp.broadcast_to(jnp.cos(p["positions"])[None], x.shape)
    x = jnp.sin(x) + where
    for _ in range(2):
        x = join(feed(p, x) + where, x)
    return x


def the_first_stream_again(p, x, join):
    first = ready(p, x)
    x = jnp.tanh(first @ p["side"]) + first
    return join(feed(p, x) + first, x)


def read_across(p, x, join):
    memory = jnp.cos(x)
    x = ready(p, x)
    weights = jax.nn.softmax(x @ p["side"] @ jnp.swapaxes(memory, 1, 2))
    h = jnp.tanh(weights @ memory @ p["up"]) @ p["down"]
    return join(h + memory, x)


def scaled_stream(p, x, join):
    x = ready(p, x)
    return join(feed(p, x), 1.5 * x)


def in_a_region(p, x, join):
    x = ready(p, x)
    layer = jax.jit(lambda p, x: feed(p, x) + term(p, x))
    return join(layer(p, x), x)


def in_a_scan(p, x, join):
    def body(x, w):
        return join(feed(p, x) + jnp.sin(x @ w), x), None

    return lax.scan(body, ready(p, x), p["stack"])[0]


def learned_stream(p, x, join):
    q = jnp.broadcast_to(p["positions"][None], x.shape)
    weights = jax.nn.softmax((q @ p["side"]) @ jnp.swapaxes(x, 1, 2))
    return join(jnp.tanh(weights @ x @ p["up"]) @ p["down"], q)


CASES = [second_branch, term_on_the_left, constant, positions_that_the_stream_was_made_with, the_first_stream_again,
         read_across, scaled_stream, in_a_region, in_a_scan, learned_stream]  # fmt: skip
KINDS = {
    "houlsby": lambda h, r, a: h + a(h) + r,
    "pfeiffer": lambda h, r, a: h + r + a(h + r),
    "parallel": lambda h, r, a: h + r + a(r),
}


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_an_array_that_the_layer_did_not_read_is_a_part_of_its_output(case):
    fn = lambda p, x: case(p, x, lambda h, r: h + r)
    roles = pj.roles(fn, PARAMS, X)
    assert roles["down"].residual
    for kind, join in KINDS.items():
        tuned = pj.adapter(kind, bottleneck=2, init="bert", scale=5.0, targets="down").init(
            jax.random.key(0), PARAMS, roles
        )
        f = tuned["down"]
        a = lambda z: 5.0 * (jnp.maximum(z @ f.down, 0) @ f.up)
        got, want = pj.wrap(fn)(tuned, X), case(PARAMS, X, lambda h, r: join(h, r, a))
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(want - fn(PARAMS, X)).max() > 1e-3, kind


def test_where_no_array_that_the_layer_read_is_added():
    """A layer of its own input, added to another one: no residual, by roles and where an overlay waits all the same."""
    fn = lambda p, x: jnp.cos(x) + feed(p, jnp.sin(x))
    roles = pj.roles(fn, PARAMS, X)
    assert not roles["down"].residual
    with pytest.raises(ValueError, match="output of down is not added to a residual stream"):
        pj.adapter(targets="down").init(jax.random.key(0), PARAMS, roles)
    other = pj.roles(lambda p, x: x + feed(p, x), PARAMS, X)
    tuned = pj.adapter(targets="down").init(jax.random.key(0), PARAMS, other)
    with pytest.raises(ValueError, match="down reached the function's output.*waits for the one addition of what the layer read"):
        pj.wrap(fn)(tuned, X)


def test_parallel_branches_of_two_kernels_are_refused():
    fn = lambda p, x: (x := jnp.sin(x)) + (feed(p, x) + x @ p["side"])
    roles = pj.roles(fn, PARAMS, X)
    assert not roles["down"].residual and not roles["side"].residual
    with pytest.raises(ValueError, match="no kernel that ends a sublayer of feed-forward"):
        pj.adapter().init(jax.random.key(0), PARAMS, roles)


@pytest.mark.parametrize(
    "fn, found",
    [
        (lambda w, x: x + jnp.tanh(x) @ w, [0]),
        (lambda w, x: jnp.tanh(x) @ w + x[...], [1]),
        (lambda w, x: (x[:, :2] @ w[:2]) * 0.5 + x[:, :2] @ jnp.ones((2, 4), jnp.float32), []),
        (lambda w, x: x[:2] + x[:2] @ w, [0]),  # the same part, taken twice
        (lambda w, x: x.astype(jnp.bfloat16) + (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)), [0]),
        (lambda w, x: x + jnp.sin(x @ w), []),
        (lambda w, x: x @ w + jnp.cos(x), []),
        (lambda w, x: jax.checkpoint(lambda x: x @ w)(x) + x, [1]),
    ],
)
def test_additions(fn, found):
    closed = jax.make_jaxpr(fn)(jnp.ones((4, 4), jnp.float32), jnp.ones((4, 4), jnp.float32))
    assert list(streams(closed, (True, False)).values()) == found
