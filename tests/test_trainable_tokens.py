"""Trainable tokens: rows that replace a table's, in lookups and in a tied head, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from peftjax.methods.trainable_tokens import Tokens

KEY = jax.random.key(0)
draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
IDS = jnp.array([[3, 0, 5], [5, 5, 1]])
TABLE = {"words": draw(0, 6, 4)}
NEW = draw(1, 2, 4)


def look(p, ids):
    return p["words"][ids]


def tied(p, ids):
    return jnp.tanh(p["words"][ids]) @ p["words"].T


def tuned_on(fn, params=TABLE, tokens=(5, 0), rows=NEW):
    apply, tuned = pj.attach(pj.trainable_tokens(tokens), fn, params, IDS, key=KEY)
    return apply, pj.insert(tuned, {"words/rows": rows})


def test_lookups_and_the_tied_head_see_the_rows():
    want = TABLE["words"].at[jnp.array([5, 0])].set(NEW)
    for fn in (look, tied):
        apply, tuned = tuned_on(fn)
        np.testing.assert_allclose(apply(tuned, IDS), fn({"words": want}, IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_merged_is_the_rows_themselves(dtype):
    """To the bit: differences would not come back, where a row is far from what it replaces."""
    params, rows = {"words": jnp.asarray(1e4 * draw(0, 6, 4), dtype)}, NEW * 1e-3
    apply, tuned = tuned_on(look, params, rows=rows)
    merged = pj.merge(tuned)["words"]
    np.testing.assert_array_equal(merged[jnp.array([5, 0])], jnp.asarray(rows).astype(dtype))
    np.testing.assert_array_equal(merged[1:5], params["words"][1:5])
    np.testing.assert_array_equal(apply(tuned, IDS), look({"words": merged}, IDS))


def test_it_starts_as_the_table_is():
    apply, tuned = pj.attach(pj.trainable_tokens((2, 4)), look, TABLE, IDS, key=KEY)
    np.testing.assert_array_equal(tuned["words"].rows, TABLE["words"][jnp.array([2, 4])])
    np.testing.assert_array_equal(apply(tuned, IDS), TABLE["words"][IDS])


def test_the_scale_interpolates_and_switches_off():
    apply, tuned = tuned_on(tied)
    at = jnp.array([5, 0])
    half = TABLE["words"].at[at].set((TABLE["words"][at] + NEW) / 2)
    np.testing.assert_allclose(apply(pj.scale(tuned, 0.5), IDS), tied({"words": half}, IDS), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pj.merge(pj.disable(tuned))["words"], TABLE["words"])
    np.testing.assert_allclose(pj.scale(tuned, 0.5)["words"].folded().rows, half[at], rtol=1e-6)


def test_gradients_reach_the_rows_that_are_read():
    apply, tuned = tuned_on(look)
    grads = pj.value_and_grad(lambda t: jnp.sum(apply(t, IDS) * jnp.arange(1.0, 7).reshape(2, 3, 1)))(tuned)[1]
    np.testing.assert_array_equal(grads["words"].rows, np.outer([3 + 4 + 5, 2], np.ones(4)))


def test_a_head_by_itself_trains_outputs():
    params = {"head": {"kernel": draw(2, 4, 6)}}
    fn = lambda p, x: x @ p["head"]["kernel"]
    method = pj.trainable_tokens((3, 1), targets=("head",))
    apply, tuned = pj.attach(method, fn, params, jnp.ones((2, 4)), key=KEY)
    assert tuned["head"]["kernel"].rows.shape == (4, 2)
    tuned = pj.insert(tuned, {"head/kernel/rows": NEW.T})
    want = params["head"]["kernel"].at[:, jnp.array([3, 1])].set(NEW.T)
    np.testing.assert_allclose(apply(tuned, draw(3, 2, 4)), draw(3, 2, 4) @ want, rtol=1e-5, atol=1e-6)


def test_other_overlays_below_and_above():
    """Below, the rows replace what another overlay made of them; above, the other acts on the rows."""
    tokens = pj.trainable_tokens((5, 0), targets="words")
    lora = pj.lora(rank=2, targets="words")
    roles = pj.roles(tied, TABLE, IDS)
    for others in (
        (lora, tokens),
        (tokens, lora),
        (tokens, pj.dora(rank=2, targets="words")),
        (tokens, pj.oft(block_size=2, targets="words")),
    ):
        tuned = pj.chain(*others).init(KEY, TABLE, roles)
        moved = pj.insert(tuned, {k: np.asarray(x) + 0.1 for k, x in pj.extract(tuned).items()})
        for fn in (look, tied):
            got, want = pj.wrap(fn)(moved, IDS), fn(pj.merge(moved), IDS)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    under = pj.chain(lora, tokens).init(KEY, TABLE, roles)
    under = pj.insert(under, {k: np.asarray(x) + 0.1 for k, x in pj.extract(under).items()})
    np.testing.assert_array_equal(pj.merge(under)["words"][5], under["words"].rows[0])


def sizes(jaxpr):
    """The sizes of everything that a program computes, but for views: a tied head is the model's own transpose."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if eqn.primitive.name not in ("transpose", "pjit", "jit"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("fn", [look, tied])
def test_no_other_table_is_made(fn):
    """Neither (vocabulary, D), nor (vocabulary, tokens), in the value or in the gradient."""
    params = {"words": jnp.ones((5000, 16))}
    ids = jnp.arange(3)
    apply, tuned = pj.attach(pj.trainable_tokens(range(10, 17)), fn, params, ids, key=KEY)
    step = pj.value_and_grad(lambda t: jnp.sum(apply(t, ids) ** 2))
    found = max(sizes(jax.make_jaxpr(step)(tuned).jaxpr))
    assert found <= 5000 * 3, found  # the logits of three tokens, and vectors over the vocabulary


@pytest.mark.parametrize(
    "tokens,message",
    [
        ((), "expected a sequence of integers"),
        ((0.5,), "expected a sequence of integers"),
        (((1, 2),), "expected a sequence of integers"),
        ((1, 2, 1), r"\[1\] stand twice"),
        ((1, 6, -1), r"ids \[6, -1\] at words, whose vocabulary has 6 tokens"),
    ],
)
def test_ids_that_cannot_be_raise(tokens, message):
    with pytest.raises(ValueError, match=message):
        pj.attach(pj.trainable_tokens(tokens), look, TABLE, IDS, key=KEY)


def test_wrong_targets_raise():
    two = {"words": TABLE["words"], "places": TABLE["words"]}
    both = lambda p, ids: p["words"][ids] + p["places"][ids]
    with pytest.raises(ValueError, match="looked up in places, words; name the table"):
        pj.attach(pj.trainable_tokens((1,)), both, two, IDS, key=KEY)
    with pytest.raises(ValueError, match="Expected `roles=`"):
        pj.trainable_tokens((1,)).init(KEY, TABLE)
    heads = {"kernel": draw(4, 4, 2, 3)}
    fn = lambda p, x: jnp.einsum("bi,iho->bho", x, p["kernel"])
    with pytest.raises(ValueError, match="kernel has axes 'ioo'; expected a table"):
        pj.attach(pj.trainable_tokens((1,), targets="kernel"), fn, heads, jnp.ones((2, 4)), key=KEY)
    plain = pj.trainable_tokens((1,), targets="words").init(KEY, TABLE)
    assert isinstance(plain["words"], Tokens) and plain["words"].rows.shape == (1, 4)


def test_the_choice_goes_through_files(tmp_path):
    method = pj.trainable_tokens((5, 0), targets=("words",))
    tuned = method.init(KEY, TABLE)
    pj.save(tmp_path / "a", tuned, method)
    again = pj.load(tmp_path / "a", TABLE)
    assert again["words"].ids == (5, 0) and jax.tree.structure(again) == jax.tree.structure(tuned)
