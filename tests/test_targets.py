"""Choosing leaves: by pattern, by name, by role; and what is said when nothing was there to choose."""

import jax
import jax.numpy as jnp
import pytest

from peftjax.roles import Role, Roles
from peftjax.targets import check_patterns, choose, closest, pattern_value

LAYER = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}
PARAMS = {
    "embed": {"embedding": jnp.zeros((9, 4))},
    "layers": [{"query": LAYER, "value": LAYER, "norm": {"scale": jnp.ones(4)}}, {"query": LAYER, "value": LAYER}],
    "steps": jnp.zeros((2, 2), jnp.int32),
    "head": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)},
}
LINEAR = Role("linear", "io", 0)
ROLES = Roles({
    "embed/embedding": Role("embedding", "io", 0),
    "head/bias": Role("bias", "o", 1, kernel="head/kernel"),
    "head/kernel": Role("linear", "io", 2, head=True),
    **{f"layers/{i}/{name}/bias": Role("bias", "o", 3) for i in (0, 1) for name in ("query", "value")},
    **{f"layers/{i}/{name}/kernel": LINEAR for i in (0, 1) for name in ("query", "value")},
    "layers/0/norm/scale": Role("scale", "o", 4),
    "steps": Role("unused", "oo", 5),
})  # fmt: skip
QUERIES = ["layers/0/query/kernel", "layers/1/query/kernel"]
KERNELS = ["layers/0/query/kernel", "layers/0/value/kernel", "layers/1/query/kernel", "layers/1/value/kernel"]


def test_all_linear_is_every_kernel_but_embeddings_head_and_what_trains():
    assert choose("all-linear", PARAMS, ROLES) == KERNELS
    assert choose("all-linear", PARAMS, ROLES, taken=QUERIES, exclude=".*0/.*") == ["layers/1/value/kernel"]


def test_all_linear_takes_convolutions_and_no_vector():
    params = {"conv": jnp.zeros((3, 4, 4)), "pool": jnp.zeros(4), "w": jnp.zeros((4, 4))}
    roles = Roles({"conv": Role("conv", "iio", 0), "pool": Role("linear", "i", 1), "w": LINEAR})
    assert choose("all-linear", params, roles) == ["conv", "w"]


def test_all_linear_without_roles_asks_for_them_where_axes_are_unclear():
    """Attention's kernels have three axes, and their biases two: by their number they would be mistaken."""
    params = {"query": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}, "out": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match="query/kernel has 3 axes, and only roles can tell inputs from outputs; pass `roles="):
        choose("all-linear", params)
    assert choose("all-linear", params, exclude=".*query.*") == ["out"]


def test_all_linear_without_roles_is_every_matrix_but_embeddings():
    assert choose("all-linear", PARAMS) == ["head/kernel", *KERNELS]


def test_a_string_is_a_regex_on_the_leaf_or_its_module():
    assert choose(".*query", PARAMS, ROLES, kernels=True) == QUERIES
    assert choose(r"layers/\d/query/kernel", PARAMS) == QUERIES
    assert choose("head", PARAMS) == ["head/bias", "head/kernel"]
    assert choose(".*", PARAMS, exclude="(?!head).*") == ["head/bias", "head/kernel"]


def test_a_sequence_holds_ends_of_paths():
    assert choose(["query"], PARAMS, kernels=True) == QUERIES
    assert choose(("query", "value"), PARAMS, ROLES, kernels=True) == KERNELS
    assert choose(["0/query/kernel", "bias"], PARAMS)[0] == "head/bias"
    with pytest.raises(ValueError, match="'uery' matches no leaf"):
        choose(["uery"], PARAMS)
    with pytest.raises(ValueError, match=r"'que\.y' matches no leaf"):
        choose(["que.y"], PARAMS)


def test_a_predicate_sees_path_and_role():
    assert choose(lambda path, role: role.op == "scale", PARAMS, ROLES) == ["layers/0/norm/scale"]
    assert choose(lambda path, role: role is None and path == "steps", PARAMS) == ["steps"]
    with pytest.raises(ValueError, match="predicate that is true of one"):
        choose(lambda path, role: False, PARAMS, ROLES)


@pytest.mark.parametrize("exclude", [".*query.*", ["query"], lambda path, role: "query" in path])
def test_exclude_wins_in_every_form(exclude):
    left = choose("all-linear", PARAMS, ROLES, exclude=exclude)
    assert left == ["layers/0/value/kernel", "layers/1/value/kernel"]


def test_a_miss_names_the_closest_paths_and_the_usual_cause():
    with pytest.raises(ValueError, match="closest: layers/0/query/bias, layers/0/query/kernel"):
        choose(".*qeury", PARAMS)
    with pytest.raises(ValueError, match=r"As a name rather than a regex: \('query',\), or '\.\*query'"):
        choose("query", PARAMS)
    with pytest.raises(ValueError, match="'values' matches no leaf"):
        choose(["query", "values"], PARAMS)
    with pytest.raises(ValueError, match="'nothing' matches no leaf"):
        choose("all-linear", PARAMS, ROLES, exclude=["nothing"])
    with pytest.raises(ValueError, match="exclude='all-linear'"):
        choose(".*", PARAMS, ROLES, exclude="all-linear")


def test_only_vectors_where_a_kernel_is_wanted():
    with pytest.raises(ValueError, match="layers/0/norm/scale, which is no kernel.*closest kernels"):
        choose(["norm"], PARAMS, ROLES, kernels=True)
    with pytest.raises(ValueError, match="which is no kernel"):
        choose(".*bias", PARAMS, kernels=True)


@pytest.mark.parametrize("targets", [".*", ".*kernel", ["query", "kernel"], lambda path, role: role.op != "embedding"])
def test_what_the_model_never_uses_is_named_and_not_passed_over(targets):
    params = {**PARAMS, "pooler": LAYER}
    roles = Roles({**ROLES, "pooler/bias": Role("unused", "o", 6), "pooler/kernel": Role("unused", "oo", 7)})
    with pytest.raises(ValueError, match="pooler/kernel: never used by the model.*`exclude` what of targets="):
        choose(targets, params, roles, kernels=True)
    kernels = choose(targets, params, roles, kernels=True, exclude="pooler/.*")
    assert set(kernels) - {"embed/embedding"} == {"head/kernel", *KERNELS}
    assert choose("all-linear", params, roles, kernels=True) == KERNELS


def test_a_vector_that_the_model_never_uses_is_named_where_vectors_are_wanted():
    params = {**PARAMS, "gate": jnp.zeros(4)}
    with pytest.raises(ValueError, match="gate: never used by the model"):
        choose(["bias", "gate"], params, Roles({**ROLES, "gate": Role("unused", "o", 6)}))


def test_nothing_left():
    with pytest.raises(ValueError, match="nothing is left of targets='head'"):
        choose("head", PARAMS, exclude="head")
    with pytest.raises(ValueError, match="no kernel but the output head head/kernel, embeddings, and 4 leaves"):
        choose("all-linear", PARAMS, ROLES, taken=KERNELS)


def test_abstract_leaves_and_empty_places():
    params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": None, "f": jnp.tanh, "n": 3}
    assert choose("all-linear", params) == ["w"]


def test_patterns_of_values():
    assert pattern_value({"a/.*": 1, ".*": 2}, "a/kernel", 0) == 1
    assert pattern_value({"a": 1}, "a/kernel", 0) == 1
    assert pattern_value({"b": 1}, "a/kernel", 0) == 0
    check_patterns(["a", ".*kernel"], ["a/kernel"])
    with pytest.raises(ValueError, match="'b' matches none of the 1 leaves that it may name; closest: a/kernel"):
        check_patterns(["a", "b"], ["a/kernel"])


def test_closest_is_best_first():
    assert closest(".*(vlaue)", list(KERNELS), 2) == ["layers/0/value/kernel", "layers/1/value/kernel"]
    assert closest("zzz", KERNELS) == []
