"""Worked numbers of prompts and of the networks that make them and prefixes; where prompts start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj

KEY = jax.random.key(0)
WORDS = np.array([[1, 0], [0, 2], [3, 3], [-1, 1], [4, -2]], np.float32)


def test_the_network_of_p_tuning():
    """Of E = [[1, -1], [2, 0]]: E W1 + b1 = [[1, -2], [2, 1]], relu, W2 and b2: [[1, -1], [2, 1]], relu, W3 and b3."""
    tuned = pj.p_tuning(2, 2, targets="words").init(KEY, {"words": WORDS})
    numbers = {
        "embedding": [[1, -1], [2, 0]], "w1": [[1, 1], [0, 2]], "b1": [0, -1], "w2": [[1, 0], [0, 2]], "b2": [0, -1],
        "w3": [[1, -1], [2, 3]], "b3": [0.5, 1],
    }  # fmt: skip
    tuned = pj.insert(tuned, {f"words/{name}": np.float32(x) for name, x in numbers.items()})
    want = np.float32([[1.5, 0], [4.5, 2]])
    np.testing.assert_allclose(tuned["words"].rows(), want, rtol=1e-6)
    np.testing.assert_allclose(pj.fold(tuned)["words"].prompt, want, rtol=1e-6)
    np.testing.assert_allclose(pj.scale(tuned, 0.5)["words"].rows(), want / 2, rtol=1e-6)


def test_the_network_of_a_prefix():
    """P = tanh(E W1 + b1) W2 + b2: E, W1 and b1 are held once, W2 and b2 by keys and by values."""
    fn = lambda p, x: jax.nn.softmax(x @ (x @ p["key"]).T) @ (x @ p["value"])
    params, x = {"key": np.eye(2, dtype=np.float32), "value": np.eye(2, dtype=np.float32)}, np.ones((3, 2), np.float32)
    tuned = pj.prefix(2, hidden=1).init(KEY, params, pj.roles(fn, params, x))
    half = float(np.arctanh(0.5))  # tanh of it is 0.5
    numbers = {
        "key/embedding": [[1, 0], [0, 1]], "key/w1": [[half], [0]], "key/b1": [0], "key/w2": [[2, -4]], "key/b2": [1, 0],
        "value/w2": [[6, 0]], "value/b2": [0, 3],
    }  # fmt: skip
    tuned = pj.insert(tuned, {name: np.float32(x) for name, x in numbers.items()})
    flat = pj.extract(pj.fold(tuned))
    np.testing.assert_allclose(flat["key/prefix"], [[2, -2], [1, 0]], rtol=1e-5)
    np.testing.assert_allclose(flat["value/prefix"], [[3, 3], [0, 3]], rtol=1e-5)


@pytest.mark.parametrize(
    "length, ids, rows", [(3, (4, 2, 4), (4, 2, 4)), (5, (4, 2), (4, 2, 4, 2, 4)), (1, (3, 0), (3,))]
)
def test_a_prompt_starts_as_a_text(length, ids, rows):
    """Its ids' own embeddings, repeated or cut to the length."""
    tuned = pj.prompt(length, ids=ids, targets="words").init(KEY, {"words": WORDS})
    np.testing.assert_array_equal(tuned["words"].prompt, WORDS[list(rows)])


def test_a_prompt_starts_from_the_vocabulary_or_at_random():
    """From the table's rows, all different where there are enough; or normal, as wide as the table's entries."""
    start = lambda n, table=WORDS, **options: (
        pj.prompt(n, targets="words", **options).init(KEY, {"words": table})["words"].prompt
    )
    found = [tuple(row) for row in np.asarray(start(5)).tolist()]
    assert sorted(found) == sorted(map(tuple, WORDS.tolist()))
    assert {tuple(row) for row in np.asarray(start(9)).tolist()} <= set(map(tuple, WORDS.tolist()))
    wide = np.asarray(start(4000, jnp.asarray(WORDS), init="random"))
    assert wide.std() == pytest.approx(WORDS.std(), rel=0.05) and abs(wide.mean()) < 0.1
