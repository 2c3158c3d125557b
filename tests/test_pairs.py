"""Every method on top of every other, and of itself: a tree that runs, or an error that says why not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj

KEY = jax.random.key(0)
D, VOCABULARY = 4, 7
IDS, MASK = np.array([[1, 2, 3], [4, 5, 0]]), np.array([[1, 1, 1], [1, 1, 0]])


def dense(n_in, n_out):
    return {"kernel": np.full((n_in, n_out), 0.3, np.float32), "bias": np.full(n_out, 0.1, np.float32)}


PARAMS = {
    "words": {"embedding": np.ones((VOCABULARY, D), np.float32)},
    **{name: dense(D, D) for name in ("query", "key", "value", "out")},
    **{"up": dense(D, 6), "down": dense(6, D), "head": dense(D, 2)},
    **{name: {"scale": np.ones(D, np.float32), "bias": np.zeros(D, np.float32)} for name in ("norm_1", "norm_2")},
}


def block(p, input_ids, attention_mask):
    """A post-LN block of one head, and a head for each token."""
    layer = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"][None, None]

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * p[name]["scale"][None, None] + p[name]["bias"][None, None]

    x = p["words"]["embedding"][input_ids]
    scores = jnp.einsum("bqd,bkd->bqk", layer("query", x), layer("key", x))
    weights = jax.nn.softmax(jnp.where(attention_mask[:, None] > 0, scores, jnp.float32(-1e9)), -1)
    x = norm("norm_1", x + layer("out", jnp.einsum("bqk,bkd->bqd", weights, layer("value", x))))
    x = norm("norm_2", x + layer("down", jnp.tanh(layer("up", x))))
    return layer("head", x)


ROLES = pj.roles(block, PARAMS, IDS, MASK)
AT = ("key", "value", "down")
METHODS = {
    "lora": pj.lora(rank=2, targets=AT),
    "lora_bias": pj.lora(rank=2, bias=True, targets=AT),
    "pissa": pj.lora(rank=2, init="pissa", targets=AT),
    "lora_words": pj.lora(rank=2, targets="words"),
    "dora": pj.dora(rank=2, targets=AT),
    "dora_words": pj.dora(rank=2, targets="words"),
    "adalora": pj.adalora(rank=2, target_rank=1, total_steps=9, targets=AT),
    "vera": pj.vera(rank=2, targets=(*AT, "words")),
    "loha": pj.loha(rank=2, targets=AT),
    "lokr": pj.lokr(rank=1, targets=AT),
    "oft": pj.oft(block_size=2, targets=AT),
    "ia3": pj.ia3(("key", "value"), ("down",)),
    "trainable_tokens": pj.trainable_tokens((1, 2)),
    "houlsby": pj.adapter("houlsby", bottleneck=2),
    "pfeiffer": pj.adapter("pfeiffer", bottleneck=2),
    "compacter": pj.compacter(bottleneck=2, terms=2),
    "reft": pj.reft(rank=2),
    "prefix": pj.prefix(2),
    "prefix_network": pj.prefix(2, hidden=3),
    "prompt": pj.prompt(2),
    "p_tuning": pj.p_tuning(2, 4),
    "bitfit": pj.bitfit(),
    "layer_norm": pj.layer_norm(),
    "head": pj.head(),
    "last_layers": pj.last_layers(2),
    "full": pj.full(),
}


@functools.cache
def alone(name):
    return jax.eval_shape(lambda key: METHODS[name].init(key, PARAMS, ROLES), KEY)


def pair(one, two, locked):
    """The tree that the second method makes of the first one's, nothing computed; None where it refuses."""
    make = lambda key, tuned: METHODS[two].init(key, pj.lock(tuned) if locked else tuned, ROLES)
    try:
        return jax.eval_shape(make, KEY, alone(one))
    except ValueError as error:
        assert str(error).startswith((METHODS[two].name, "unfreeze")), error
        return None


TOKENS, PREFIXES = {"prompt", "p_tuning"}, {"prefix", "prefix_network"}
ONE_ONLY = {(one, two) for group in (TOKENS, PREFIXES) for one in group for two in group}
WEIGHTS = {"lora", "lora_bias", "pissa", "dora", "adalora", "vera", "loha", "lokr", "oft", "ia3"}
TWICE = {(name, name) for name in ("adalora", "vera", "ia3")}
# A copy of a weight that another overlay trains would act in its place.
COPIES = {(one, "full") for one in WEIGHTS | {"lora_words", "dora_words", "trainable_tokens"}}
COPIES |= {(one, "last_layers") for one in WEIGHTS} | {("ia3", "bitfit"), ("lora_bias", "bitfit")}


def test_every_pair_starts_or_says_why_not():
    assert {
        (one, two) for one in METHODS for two in METHODS if pair(one, two, False) is None
    } == ONE_ONLY | TWICE | COPIES


def test_what_is_locked_takes_a_new_one():
    """But for a second prefix or prompt at one place."""
    assert {pairs for pairs in ONE_ONLY | TWICE | COPIES if pair(*pairs, True) is None} == ONE_ONLY


@pytest.mark.full
@pytest.mark.parametrize("locked", [False, True])
def test_every_pair_runs(locked):
    run = pj.wrap_tokens(block)
    for one in METHODS:
        for two in METHODS:
            if (tuned := pair(one, two, locked)) is not None:
                assert jax.eval_shape(run, tuned, IDS, MASK).shape == (*IDS.shape, 2), (one, two)
