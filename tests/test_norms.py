"""Norms after a residual sum: what roles reads of them, adapters that read through them, and those that none can read."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import peftjax as pj
from peftjax.roles import Norm

RNG = np.random.default_rng(0)
drawn = lambda *shape: jnp.asarray(RNG.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)
PARAMS = {"up": drawn(8, 6), "down": drawn(6, 8), "g": 1 + drawn(8) / 2, "b": drawn(8)}
X = drawn(2, 5, 8)
row = lambda v: v[None, None]


def mean(x):
    return x.mean(-1, keepdims=True)


def block(norm):
    """A post-norm block."""
    return lambda p, x: norm(p, (x := jnp.sin(x)) + jnp.tanh(x @ p["up"]) @ p["down"])


def own(p, x):
    centred = x - mean(x)
    return centred * lax.rsqrt(mean(centred * centred) + 1e-5) * row(p["g"]) + row(p["b"])


def gemma(p, x):
    return (x * lax.rsqrt(mean(x**2) + 1e-6)) * (1.0 + row(p["g"]))


def gemma_in_bfloat16(p, x):
    wide = x.astype(jnp.float32)
    y = wide * lax.rsqrt(mean(jnp.square(wide)) + 1e-6)
    return (y * (1 + row(p["g"].astype(jnp.float32)))).astype(x.dtype)


def centred_gemma(p, x):
    x = x - mean(x)
    return x / jnp.sqrt(mean(jnp.square(x)) + 1e-5) * (row(p["g"]) + 1) + row(p["b"])


def powers(p, x):
    return row(p["g"]) * (x / jnp.sqrt(jnp.power(x, 2).mean(-1, keepdims=True) + 1e-6))


def without_eps(p, x):
    return x * jnp.power(mean(x * x), -0.5)


def standardised(p, x):
    return jax.nn.standardize(x, epsilon=1e-3) * row(p["g"])


def a_token_at_a_time(p, x):
    def norm(x):  # (features,)
        inverse = lax.rsqrt(jnp.maximum(0.0, jnp.var(x)) + 1e-5)
        return p["g"] * ((x - jnp.mean(x)) * inverse) + p["b"]

    return jax.vmap(jax.vmap(norm))(x)


def a_token_at_a_time_rms(p, x):
    return jax.vmap(jax.vmap(lambda x: p["g"] * (x * lax.rsqrt(jnp.mean(x**2) + 1e-5)) + p["b"]))(x)


def of_linen(p, x):
    return nn.LayerNorm().apply({"params": {"scale": p["g"], "bias": p["b"]}}, x)


def of_linen_slow(p, x):
    return nn.LayerNorm(use_fast_variance=False).apply({"params": {"scale": p["g"], "bias": p["b"]}}, x)


def of_linen_rms(p, x):
    return nn.RMSNorm().apply({"params": {"scale": p["g"]}}, x)


def of_nnx(p, x):
    norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = p["g"], p["b"]
    return norm(x)


READ = {
    own: Norm("g", "b", 1e-5),
    gemma: Norm("g", None, 1e-6, centred=False, offset=1.0),
    gemma_in_bfloat16: Norm("g", None, 1e-6, centred=False, offset=1.0),
    centred_gemma: Norm("g", "b", 1e-5, offset=1.0),
    powers: Norm("g", None, 1e-6, centred=False),
    without_eps: Norm(None, None, 0.0, centred=False),
    standardised: Norm("g", None, 1e-3),
    a_token_at_a_time: Norm("g", "b", 1e-5),
    a_token_at_a_time_rms: Norm("g", "b", 1e-5, centred=False),
    of_linen: Norm("g", "b", 1e-6),
    of_linen_slow: Norm("g", "b", 1e-6),
    of_linen_rms: Norm("g", None, 1e-6, centred=False),
    of_nnx: Norm("g", "b", 1e-6),
}


@pytest.mark.third_party
@pytest.mark.parametrize("norm", READ, ids=lambda f: f.__name__)
def test_an_adapter_reads_through_the_norm_that_follows(norm):
    fn = block(norm)
    roles = pj.roles(fn, PARAMS, X)
    assert roles["down"].norm == READ[norm] and not roles["down"].unread
    method = pj.adapter(bottleneck=2, init="bert", scale=9.0)
    tuned = method.init(jax.random.key(0), PARAMS, roles)
    f = tuned["down"]

    def twin(p, x):
        s = (x := jnp.sin(x)) + jnp.tanh(x @ p["up"]) @ p["down"]
        return norm(p, s + 9.0 * jnp.maximum(norm(p, s) @ f.down, 0) @ f.up)

    want = twin(PARAMS, X)
    np.testing.assert_allclose(pj.wrap(fn)(tuned, X), want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want - fn(PARAMS, X)).max() > 1e-3


# Norms of other kinds, each nearly one that is known


def of_the_largest(p, x):
    return x / (1e-6 + jnp.abs(x).max(-1, keepdims=True)) * row(p["g"])


def of_absolute_values(p, x):
    return x / mean(jnp.abs(x)) * row(p["g"])


def of_length_one(p, x):
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)) * row(p["g"])


def eps_outside_the_root(p, x):
    return (x - mean(x)) / (jnp.sqrt(x.var(-1, keepdims=True)) + 1e-3) * row(p["g"])


def one_degree_less(p, x):
    return (x - mean(x)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5) * row(p["g"])


def uncentred_by_the_deviation(p, x):
    return x / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def centred_by_the_mean_square(p, x):
    return (x - mean(x)) * lax.rsqrt(mean(x * x) + 1e-5)


def only_centred(p, x):
    return (x - mean(x)) * row(p["g"])


def of_a_contraction(p, x):
    return x * lax.rsqrt(jnp.einsum("btd,btd->bt", x, x)[..., None] / 8 + 1e-6) * row(p["g"])


def a_scale_of_another_kind(p, x):
    return of_linen_rms({"g": jnp.exp(p["g"])}, x)


def two_added(p, x):
    return gemma({"g": p["g"] + p["b"]}, x)


def over_positions(p, x):
    centred = x - x.mean(1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(1, keepdims=True) + 1e-5) * row(p["g"])


def over_the_batch(p, x):
    return nn.BatchNorm(use_running_average=False).apply(
        {"params": {"scale": p["g"], "bias": p["b"]}, "batch_stats": {"mean": p["b"], "var": p["g"]}},
        x, mutable=["batch_stats"])[0]  # fmt: skip


def in_groups(p, x):
    return nn.GroupNorm(num_groups=2).apply({"params": {"scale": p["g"], "bias": p["b"]}}, x)


def soft(p, x):
    return jax.nn.softmax(x, -1) * row(p["g"])


OTHERS = [of_the_largest, of_absolute_values, of_length_one, eps_outside_the_root, one_degree_less,
          uncentred_by_the_deviation, centred_by_the_mean_square, only_centred, of_a_contraction, a_scale_of_another_kind,
          two_added, over_positions, over_the_batch, in_groups, soft]  # fmt: skip


@pytest.mark.third_party
@pytest.mark.parametrize("norm", OTHERS, ids=lambda f: f.__name__)
def test_a_norm_that_none_can_read_is_refused_where_an_adapter_would_read_through_it(norm):
    roles = pj.roles(block(norm), PARAMS, X)
    assert roles["down"].norm is None and roles["down"].unread
    for method in (pj.adapter(), pj.compacter("compacter++", bottleneck=4, terms=2)):
        with pytest.raises(ValueError, match="sum after down looks like a norm.*houlsby.*parallel.*exclude"):
            method.init(jax.random.key(0), PARAMS, roles)
    for kind in ("houlsby", "parallel"):
        pj.adapter(kind).init(jax.random.key(0), PARAMS, roles)


@pytest.mark.parametrize("norm", [gemma, of_absolute_values, of_length_one, soft], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scanned", [False, True])
def test_before_the_layers_it_may_be_any(norm, scanned):
    """Pre-norm blocks and a last norm: an adapter reads the sum itself, whatever the norms are."""
    layer = lambda p, x: x + jnp.tanh(norm(p, x) @ p["up"]) @ p["down"]

    def fn(p, x):
        x = jnp.sin(x)
        if scanned:
            x = lax.scan(lambda x, _: (layer(p, x), None), x, None, length=2)[0]
        else:
            x = layer(p, layer(p, x))
        return norm(p, x)

    roles = pj.roles(fn, PARAMS, X)
    assert roles["down"].residual and roles["down"].norm is None and not roles["down"].unread
    tuned = pj.adapter(bottleneck=2).init(jax.random.key(0), PARAMS, roles)
    np.testing.assert_allclose(pj.wrap(fn)(tuned, X), fn(PARAMS, X), atol=1e-5)


@pytest.mark.parametrize("after", [jax.nn.relu, jax.nn.gelu, lambda x: x.mean(1), lambda x: (x**2).mean(), jnp.tanh])
def test_what_meets_no_statistic_of_itself_is_no_norm(after):
    roles = pj.roles(block(lambda p, x: after(x)), PARAMS, X)
    assert roles["down"].residual and not roles["down"].unread


def test_in_a_scan_a_norm_that_none_can_read_is_refused_too():
    layer = lambda p, x: of_length_one(p, x + jnp.tanh(x @ p["up"]) @ p["down"])
    fn = lambda p, x: lax.scan(lambda x, _: (layer(p, x), None), jnp.sin(x), None, length=2)[0]
    assert pj.roles(fn, PARAMS, X)["down"].unread
