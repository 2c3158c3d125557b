"""The laws on a cover of METHODS x MODELS: each law meets each method, and each model. `pytest -m full` runs the whole table."""

import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from laws import (
    BLOCKS,
    KEY,
    LAWS,
    METHODS,
    MODELS,
    WHEN,
    after,
    applies,
    arrays_only,
    asked,
    case,
    cover,
    known,
    refusal,
    row,
    says,
    stepping,
    table,
    usual,
    whole,
)

COVER = cover()


OF_METHODS = (8, 9, 10)  # what these laws say hangs on the method more than on the model
IN_PART = (1, 5, 6)  # and of these the last of what they say, which is compiled for itself
# Methods of a family of which another one stands for them by default.
ALIKE = {"rslora", "lora_gaussian", "lora_zero_a", "pissa", "olora", "lora_orthogonal", "lora_fa", "lora_bias", "dora_pissa",
         "dora_dropout", "lora_and_biases", "bitfit", "full", "layer_norm", "head", "last_layers", "adapter_pfeiffer",
         "adapter_parallel", "compacter_plus", "reft_output", "ia3_feedforward", "oft_neumann", "oft_shared", "lokr_whole",
         "prompt", "p_tuning", "prefix"}  # fmt: skip


def cells(pairs):
    """Every law that says something of a pair; the laws of a pair stand together, for they share what was compiled.

    What hangs on the method is seen on one model, a small one on which nothing has to be merged.
    """
    made = [(law, *pair) for pair in pairs for law in LAWS if refusal(*pair) is None and applies(law, *pair)]
    unlike = lambda cell: ("merges" in MODELS[cell[2]].tags, cell[2] in BLOCKS)
    own = {cell[:2]: cell for cell in sorted(made, key=unlike, reverse=True)}

    def marks(cell):
        if cell[0] not in OF_METHODS:
            return ()
        return pytest.mark.full if cell != own[cell[:2]] else pytest.mark.ci if cell[1] in ALIKE else ()

    options = lambda cell: {"thorough": cell == own[cell[:2]] and cell[1] not in ALIKE} if cell[0] in IN_PART else {}
    return [pytest.param(*c, options(c), id=f"{c[1]}-{c[2]}-{c[0]}", marks=marks(c)) for c in made]


@pytest.mark.parametrize("law,method,model,options", cells(COVER))
def test_law(law, method, model, options):
    LAWS[law](method, model, **options)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
def test_every_law(model):
    wrong = {method: said for method, said in zip(METHODS, row(model, list(METHODS))) if said not in ("ok", "-")}
    assert not wrong, wrong


EACH = [("lora", "nnx_batch_norm_dropout"), ("dora", "linen_mlp"), ("oft", "linen_mlp")]
OTHERS = [pytest.param(m, usual(m), marks=pytest.mark.full) for m in METHODS if (m, usual(m)) not in EACH]


@pytest.mark.parametrize("method,model", EACH + OTHERS)
def test_identity_at_init_is_exact_step_by_step(method, model):
    it = case(method, model)
    with jax.disable_jit():
        got, want = whole(it.apply(it.fresh, *it.args), it.fresh), jax.tree.leaves(it.fn(it.params, *it.args))
    for x, y in zip(got, want, strict=True):
        if x is not None and it.method.identity_at_init:
            np.testing.assert_array_equal(x, y)


def test_every_law_meets_every_method_and_every_model():
    assert {method for method, _ in COVER} == set(METHODS)
    assert {model for _, model in COVER} == set(MODELS)
    for law in LAWS:
        held = [pair for pair in COVER if applies(law, *pair)]
        assert {method for method, _ in held} == {m for m in METHODS if says(law, m)}
        assert {model for _, model in held} >= {m for m in MODELS if applies(law, "lora", m)}


def test_rows_and_columns_of_the_written_table_keep_the_others(tmp_path):
    """A cell is as new as the later of the dates of its column and its row."""
    path, all_ok = tmp_path / "laws.md", lambda *models: {m: dict.fromkeys(METHODS, "ok") for m in models}

    def written(columns):
        path.write_text(table(columns))
        return known(path)

    old = written(after({}, list(METHODS), all_ok(*MODELS), "day 1", whole=True))
    assert list(old) == list(METHODS) and old["lora"]["decoder"] == "ok" and old["lora"][WHEN] == "day 1"
    new = written(after(old, list(METHODS), {"decoder": dict.fromkeys(METHODS, "3")}, "day 2", whole=False))
    assert new[WHEN] == {**dict.fromkeys((WHEN, *MODELS), ""), "decoder": "day 2"}
    assert new["lora"] == {**old["lora"], "decoder": "3"}
    new = written(after(new, ["dora"], {"decoder": {"dora": "ok"}}, "day 3", whole=False))
    assert (new["dora"]["decoder"], new["dora"][WHEN], new[WHEN]["decoder"]) == ("ok", "day 1", "day 2")
    new = written(after(new, ["dora"], {m: {"dora": "ok"} for m in MODELS}, "day 4", whole=True))
    assert (new["dora"][WHEN], new["lora"][WHEN], new[WHEN]["decoder"]) == ("day 4", "day 1", "day 2")
    assert written(after(new, list(METHODS), all_ok(*MODELS), "day 1", whole=True)) == old


def test_what_the_command_line_of_the_laws_asks_for():
    assert asked(["--write"]) == (list(METHODS), list(MODELS))
    assert asked(["--models=decoder,nnx_linear", "lora"]) == (["lora"], ["nnx_linear", "decoder"])
    with pytest.raises(SystemExit, match="no method or model is called decodr, lroa"):
        asked(["--models=decodr", "lroa"])


REFUSED = [(method, model) for model in MODELS for method in METHODS if refusal(method, model) is not None]


@pytest.mark.parametrize("method", sorted({method for method, _ in REFUSED}))
@pytest.mark.parametrize("most", [2, pytest.param(None, marks=pytest.mark.full)])
def test_a_method_says_which_models_it_cannot_tune(method, most):
    for model in [model for m, model in REFUSED if m == method][:most]:
        fn, args = arrays_only(MODELS[model].make())
        params = MODELS[model].make().params
        with pytest.raises(ValueError, match=re.compile(refusal(method, model))):
            tuned = METHODS[method].make(MODELS[model]).init(KEY, params, pj.roles(fn, params, *args))
            step = stepping(MODELS[model], lambda t, f, *args: METHODS[method].run(fn)(pj.combine(t, f), *args))
            jax.eval_shape(step, *pj.partition(tuned), *args)


# Law 11, for what is wrong with any method: every error names the path, what was found, and what was expected


def linear(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


PARAMS = {
    "up": {"kernel": np.ones((6, 4), np.float32), "bias": np.ones(4, np.float32)},
    "down": {"kernel": np.ones((4, 3), np.float32)},
    "steps": np.zeros((2, 2), np.int32),
    "spare": {"kernel": np.ones((3, 3), np.float32)},
}
X = jax.ShapeDtypeStruct((2, 6), "float32")


def refuses(method, *words, params=PARAMS, roles=True):
    found = pj.roles(linear, params, X) if roles else None
    with pytest.raises(ValueError) as caught:
        method.init(KEY, params, found)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{caught.value} lacks {missing}"


@pytest.mark.parametrize("method", [pj.lora(rank=1, targets="up/kernle"), pj.unfreeze("up/kernle")])
def test_a_pattern_that_matches_nothing_names_the_closest_path(method):
    refuses(method, "'up/kernle'", "up/kernel")


def test_a_name_that_matches_nothing_says_so_beside_one_that_matches():
    refuses(pj.lora(rank=1, targets=("up", "dwon")), "'dwon'", "down/kernel")


def test_a_rank_pattern_that_matches_nothing():
    refuses(pj.lora(rank=1, targets="up", rank_pattern={"up/kernle": 2}), "'up/kernle'", "up/kernel")


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_that_the_kernel_does_not_have(rank):
    refuses(pj.lora(rank=rank, targets="up/kernel"), "up/kernel", f"rank {rank}", "expected 1 to 4")


def test_an_odd_rank_for_an_even_start():
    refuses(pj.lora(rank=3, targets="up/kernel", init="orthogonal"), "up/kernel", "even rank", "found 3")


def test_integers_do_not_train():
    refuses(pj.unfreeze("steps"), "steps", "int32[2, 2]", "expected floating point")


def test_a_leaf_that_the_model_never_uses():
    refuses(pj.unfreeze("spare"), "spare/kernel", "never used")


def test_more_than_two_axes_need_roles():
    params = {"kernel": np.ones((2, 3, 4), np.float32)}
    refuses(pj.lora(rank=1, targets="kernel"), "kernel", "3 axes", "roles=", params=params, roles=False)


def test_roles_of_another_tree():
    params = {"head": {"kernel": np.ones((3, 4), np.float32)}}
    with pytest.raises(ValueError, match="head/kernel is not among the roles"):
        pj.lora(rank=1, targets="head").init(KEY, params, pj.roles(linear, PARAMS, X))


def test_a_vector_has_no_low_rank():
    refuses(pj.lora(rank=1, targets="up/bias"), "up/bias", "expected a kernel", "up/kernel")


def test_an_axis_of_which_a_reshape_makes_two_kinds():
    """Three layers in one axis: the message names the axis, what it became, and by which equations."""
    layers = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"].reshape(3, 8, 8))[0]
    params = {"w": np.ones((24, 8), np.float32)}
    roles = pj.roles(layers, params, jax.ShapeDtypeStruct((2, 8), "float32"))
    said = "axis 0 is partly read by dot_general and partly stacked layers, taken apart by scan"
    for method in (pj.lora(rank=1, targets="w"), pj.lora(rank=1), pj.ia3("w"), pj.adapter("houlsby", targets="w")):
        with pytest.raises(ValueError, match=said):
            method.init(KEY, params, roles)
    with pytest.raises(ValueError, match="w float32.24,8. has axes '.o': .*`reshape`, .*`unfreeze`.*`exclude`"):
        pj.lora(rank=1, targets="w").init(KEY, params, roles)


def test_two_overlays_of_which_one_would_not_act():
    both = pj.chain(pj.lora(rank=1, targets="up/kernel"), pj.unfreeze("up/kernel"))
    refuses(both, "up/kernel", "LoRA(float32[6,4], rank=1)", "exclude")


@pytest.mark.parametrize("layers,words", [((0, 3), ("[3]", "stacks 3 layers, 0 to 2")), ((-1,), ("[-1]", "0 to 2"))])
def test_layers_out_of_range(layers, words):
    fn, args = arrays_only(MODELS["nnx_scan"].make())
    params = MODELS["nnx_scan"].make().params
    with pytest.raises(ValueError) as caught:
        pj.lora(rank=1, layers=layers).init(KEY, params, pj.roles(fn, params, *args))
    assert all(word in str(caught.value) for word in ("layers/down/kernel", *words))


def test_layers_of_what_is_not_stacked():
    refuses(pj.lora(rank=1, targets="up/kernel", layers=(0,)), "up/kernel", "not stacked")


@pytest.mark.parametrize("options,words", [({"init": "xavier"}, ("'xavier'", "kaiming")), ({"dropout": 1.0}, ("1.0",))])
def test_options_that_do_not_exist(options, words):
    with pytest.raises(ValueError) as caught:
        pj.lora(**options)
    assert all(word in str(caught.value) for word in words)


def test_a_bare_model_names_the_wrapper():
    tuned = pj.lora(rank=1, targets="up/kernel").init(KEY, PARAMS)
    with pytest.raises(TypeError, match="LoRA.*peftjax.wrap"):
        linear(tuned, np.ones((2, 6), np.float32))


def test_what_a_bare_model_may_do_with_a_weight_names_the_wrapper():
    """Every method of an array, every operator, and a comparison too, which would else be False without a word."""
    w = pj.lora(rank=1, targets="up/kernel").init(KEY, PARAMS)["up"]["kernel"]
    array = np.ones((2, 2), np.float32)
    for name in ("sum", "dot", "transpose", "flatten", "swapaxes", "conj", "mean", "real", "at", "shape", "sharding"):
        with pytest.raises(AttributeError, match="LoRA.*peftjax.wrap"):
            getattr(w, name)
    binary = (operator.mod, operator.floordiv, operator.gt, operator.le, operator.eq, operator.ne, operator.matmul)
    uses = [lambda f=f, other=other: f(w, other) for f in binary for other in (2, array, jnp.asarray(array))]
    for use in (*uses, lambda: array == w, lambda: 2 % w, lambda: abs(w), lambda: float(w), lambda: bool(w)):
        with pytest.raises(TypeError, match="LoRA.*peftjax.wrap"):
            use()
    assert w == w and w != w.replace() and w in {w} and w is not None


def test_what_has_diverged_does_not_merge():
    tuned = pj.unfreeze("up/bias").init(KEY, PARAMS)
    with pytest.raises(ValueError, match="up/bias/value"):
        pj.merge(jax.tree.map(lambda x: np.full_like(x, np.inf), tuned))
