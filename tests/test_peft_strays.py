"""Entries of HF peft's configurations that name nothing in the model: which raise, and which may."""

import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from peftjax.interop import hf_peft
from test_hf_peft import loaded, page

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

STRAYS = {
    **{
        f"{adapter}'s {key}": (adapter, {key: {"qurey": 2}}, f"{key} has 'qurey', which matches no module that is adapted")
        for adapter in ("lora", "loha", "lokr")
        for key in ("rank_pattern", "alpha_pattern")
    },
    "a pattern of a module that is not adapted": ("lora", {"alpha_pattern": {"query": 4, "key": 2}}, "alpha_pattern has 'key'"),
    "a pattern of a layer that is not adapted": (
        "lora",
        {"rank_pattern": {r"layer\.[7-9]\..*query": 2}},
        "rank_pattern has 'layer",
    ),
    **{
        f"{adapter}'s target": (adapter, {"target_modules": [*names, "qurey"]}, "target_modules has 'qurey', which names no")
        for adapter, names in {
            "lora": ("query", "value"),
            "vera": ("query", "intermediate.dense"),
            "ia3": ("key", "value", "output.dense"),
            "oft": ("query", "output.dense"),
        }.items()
    },
    "a norm": ("ln", {"target_modules": ["LayerNorm", "LayerNrom"]}, "target_modules has 'LayerNrom'.*nearest: .*LayerNorm"),
    "a layer": ("lora", {"layers_to_transform": [0, 1, 9]}, "layers_to_transform has 9, and .* of the layers 0, 1"),
    "a feed-forward module": (
        "ia3",
        {"feedforward_modules": ["output.dense", "otuput.dense"]},
        "feedforward_modules has 'otuput.dense', which names no module that is adapted .nearest: .*output.dense",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STRAYS)
def test_an_entry_that_names_nothing_raises(case, tmp_path):
    adapter, changes, message = STRAYS[case]
    _, params, roles, _, _ = golden.model("bert")
    golden.repaged("bert", adapter, tmp_path / "a", **changes)
    for read in (hf_peft.load, hf_peft.method):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / "a", params, roles)
        assert str(tmp_path / "a") in str(caught.value) and "nearest: none" not in str(caught.value)


def test_an_entry_that_names_nothing_is_listed_beside_tensors(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    golden.repaged("bert", "lora", tmp_path / "a", target_modules=["query", "value", "qurey"], r=4)
    with pytest.raises(ValueError, match="'qurey', which names no module .*nearest: bert.*query(.|\n)*shape: "):
        hf_peft.load(tmp_path / "a", params, roles)


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude_modules": ["qurey", "key"]},  # peft passes over it too, and a tied head is no module of this tree
        {"exclude_modules": "nothing"},
        {"modules_to_save": ["classifier", "score", "qa_outputs"]},  # peft adds heads that other models have
        {"target_modules": ".*(query|value|qurey)"},
        {"rank_pattern": {".*query": 2, "query": 3}},  # the first counts
    ],
)
def test_what_may_name_nothing(changes, tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    golden.repaged("bert", "lora", tmp_path / "a", **changes)
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles), loaded("bert", "lora"))


@pytest.mark.parametrize("more,fits", [([], True), (["wj"], False)])
def test_a_default_list_of_peft_may_name_what_a_model_lacks(more, fits, tmp_path):
    """AdaLoRA's for T5 has `wi`, where the gated T5 has `wi_0` and `wi_1`."""
    names = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
    params = {name: {"kernel": jnp.eye(4)} for name in names}

    def fn(params, x):
        for name in names:
            x = x @ params[name]["kernel"]
        return x

    roles = pj.roles(fn, params, jnp.ones((2, 4)))
    method = pj.adalora(rank=2, target_rank=1, total_steps=9, targets=("q", "k", "v", "o", "wo"))
    tuned = method.init(jax.random.key(0), params, roles)
    hf_peft.save(tmp_path / "a", tuned, roles)
    page(target_modules=["q", "k", "v", "o", "wi", "wo", *more])(tmp_path / "a")
    if fits:
        again = hf_peft.load(tmp_path / "a", params, roles)
        jax.tree.map(np.testing.assert_array_equal, pj.extract(again), pj.extract(tuned))
        return
    with pytest.raises(ValueError, match="target_modules has 'wi', which names no module(.|\n)*has 'wj'"):
        hf_peft.load(tmp_path / "a", params, roles)
