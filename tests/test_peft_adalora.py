"""HF peft's AdaLoRA files: pruned ranks, stacked leaves, convolutions, and options that cannot be read."""

import json

import flax.linen as nn
import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from laws import moved
from peftjax.interop import hf_peft
from peftjax.paths import flatten
from safetensors.numpy import load_file
from test_hf_peft import CONFIG, TENSORS

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party
KEY = jax.random.key(0)
PRUNED = golden.GOLDEN / "llama" / "adalora_pruned"
Q = "model.layers.0.self_attn.q_proj"


def read(folder):
    return json.loads((folder / CONFIG).read_text())


def pattern_of(folder):
    return read(folder)["rank_pattern"]


def test_pruned_ranks_lie_where_they_were(tmp_path):
    """A file holds the ranks that are kept; they keep their numbers, and what was pruned is zero."""
    _, params, roles, _, _ = golden.model("llama")
    tuned = hf_peft.load(PRUNED, params, roles)
    x = dict(flatten(tuned))[Q.replace(".", "/") + "/kernel"]
    np.testing.assert_array_equal(x.kept, [False, False, True, False])
    assert x.a.shape == (16, 4) and not np.any(np.delete(x.a, 2, 1)) and not np.any(np.delete(x.e, 2))
    a = load_file(PRUNED / TENSORS)[f"base_model.model.{Q}.lora_A"]
    np.testing.assert_array_equal(x.a[:, 2], a[0])
    np.testing.assert_array_equal(x.scale, np.float32(8 / (4 + 1e-5)))  # the scale is that of the first rank
    hf_peft.save(tmp_path / "a", tuned, roles, task_type="CAUSAL_LM")
    want, got = read(PRUNED), read(tmp_path / "a")
    same = "init_r target_r lora_alpha total_step tinit tfinal deltaT beta1 beta2 orth_reg_weight rank_pattern".split()
    assert {key: got[key] for key in same} == {key: want[key] for key in same}


def test_a_file_that_was_read_trains_on():
    _, params, roles, ids, masks = golden.model("llama")
    method = hf_peft.method(PRUNED, params, roles)
    tuned = hf_peft.load(PRUNED, params, roles)
    assert jax.tree.structure(method.init(KEY, params, roles)) == jax.tree.structure(tuned)
    grads = jax.tree.map(jnp.ones_like, pj.partition(tuned)[0])
    after = method.update(tuned, grads, 14)
    assert np.isfinite(method.penalty(after)) and pj.extract(after).keys() == pj.extract(tuned).keys()


def test_ranks_that_came_back_are_written(tmp_path):
    """Between two prunings an entry of E may have left zero again: it acts, so a file has to hold it."""
    params, roles = {"w": {"kernel": np.eye(4, dtype=np.float32)}}, None
    fn = lambda p, x: x @ p["w"]["kernel"]
    roles = pj.roles(fn, params, jnp.ones((2, 4)))
    tuned = moved(pj.adalora(rank=3, target_rank=2, total_steps=9).init(KEY, params, roles), 0)
    x = tuned["w"]["kernel"]
    tuned["w"]["kernel"] = x.replace(kept=jnp.array([True, False, False]), e=x.e.at[1].set(0))
    hf_peft.save(tmp_path / "a", tuned, roles)
    assert pattern_of(tmp_path / "a") == {"w.lora_E": [True, False, True]}
    again = hf_peft.load(tmp_path / "a", params, roles)
    np.testing.assert_allclose(pj.merge(again)["w"]["kernel"], pj.merge(tuned)["w"]["kernel"], rtol=1e-6)


def test_layers_of_a_stacked_leaf_have_their_own_ranks(tmp_path):
    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["dense"]["kernel"])[0]

    params = {"dense": {"kernel": jax.random.normal(KEY, (3, 4, 4))}}
    roles, names = pj.roles(fn, params, jnp.ones((2, 4))), {"dense/kernel": "layers.{layer}.dense.weight"}
    tuned = moved(pj.adalora(rank=2, target_rank=1, alpha=3, total_steps=9).init(KEY, params, roles), 0)
    x, kept = tuned["dense"]["kernel"], np.array([[True, True], [False, False], [False, True]])
    tuned["dense"]["kernel"] = x.replace(kept=jnp.asarray(kept), e=x.e * kept)
    hf_peft.save(tmp_path / "a", tuned, roles, names)
    tensors = load_file(tmp_path / "a" / TENSORS)
    shapes = {k: tensors[f"base_model.model.layers.{k}.dense.lora_A"].shape for k in range(3)}
    assert shapes == {0: (2, 4), 1: (0, 4), 2: (1, 4)}
    again = hf_peft.load(tmp_path / "a", params, roles, names)
    np.testing.assert_array_equal(again["dense"]["kernel"].kept, kept)
    np.testing.assert_array_equal(pj.merge(again)["dense"]["kernel"], pj.merge(tuned)["dense"]["kernel"])
    hf_peft.save(tmp_path / "b", again, roles, names)
    for name, tensor in load_file(tmp_path / "b" / TENSORS).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)


def convolution(*window, **options):
    conv = nn.Conv(6, window, **options)
    x = jnp.ones((2, *(6 for _ in window), 4))
    params = {"conv": conv.init(KEY, x)["params"]}
    roles = pj.roles(lambda params, x: conv.apply({"params": params["conv"]}, x), params, x)
    return moved(pj.adalora(rank=2, target_rank=1, alpha=3, total_steps=9).init(KEY, params, roles), 0), params, roles


def test_a_convolution_is_written_as_torch_has_it(tmp_path):
    tuned, params, roles = convolution(3, 2)
    hf_peft.save(tmp_path / "a", tuned, roles)
    a, e, b = (load_file(tmp_path / "a" / TENSORS)[f"base_model.model.conv.lora_{k}"] for k in "AEB")
    assert (a.shape, e.shape, b.shape) == ((2, 24), (2, 1), (6, 2))
    delta = (b @ (a * e)).reshape(6, 4, 3, 2) * 3 / (2 + 1e-5)
    merged = np.asarray(pj.merge(tuned)["conv"]["kernel"]) - np.asarray(params["conv"]["kernel"])
    np.testing.assert_allclose(merged.transpose(3, 2, 0, 1), delta, atol=1e-6)
    again = hf_peft.load(tmp_path / "a", params, roles)
    jax.tree.map(np.testing.assert_array_equal, pj.extract(again), pj.extract(tuned))


@pytest.mark.parametrize("window,options", [((3,), {}), ((3, 3), {"feature_group_count": 2})])
def test_convolutions_that_peft_does_not_take_raise(window, options, tmp_path):
    tuned, _, roles = convolution(*window, **options)
    with pytest.raises(ValueError, match="conv is a table, or a convolution of groups"):
        hf_peft.save(tmp_path / "a", tuned, roles)


@pytest.mark.parametrize("alpha,rank", [(8, 4), (2.5, 3), (0.1, 7), (32, 12), (1 / 3, 5)])
def test_alpha_is_the_shortest_that_makes_the_scale(alpha, rank, tmp_path):
    params = {"w": {"kernel": np.ones((16, 16), np.float32)}}
    roles = pj.roles(lambda p, x: x @ p["w"]["kernel"], params, jnp.ones((2, 16)))
    tuned = pj.adalora(rank=rank, target_rank=1, alpha=alpha, total_steps=9).init(KEY, params, roles)
    hf_peft.save(tmp_path / "a", tuned, roles)
    found = read(tmp_path / "a")["lora_alpha"]
    assert found == alpha or (alpha == 1 / 3 and abs(found - alpha) < 1e-6)
    again = hf_peft.load(tmp_path / "a", params, roles)
    assert again["w"]["kernel"].scale == tuned["w"]["kernel"].scale
    with pytest.raises(ValueError, match="scale is 0.0"):
        hf_peft.save(tmp_path / "b", pj.disable(tuned), roles)


FULL = f"{Q}.lora_E"
DAMAGES = {
    **{
        f"rank_pattern {v!r}": ({"rank_pattern": v}, "rank_pattern is")
        for v in ([True], {FULL: 3}, {FULL: [1, 0, 0, 0]})
    },
    "too few entries": ({"rank_pattern": {FULL: [True]}}, f"{FULL} has 1 entries"),
    "of another module": ({"rank_pattern": {"model.norm.lora_E": [True] * 4}}, "model.norm.lora_E is not adapted"),
    "more ranks": ({"rank_pattern": None}, r"lora_A is \[1,16\], expected \[4,16\]"),
    "no steps": ({"total_step": None}, "total_step is None, expected a positive integer"),
    "no time": ({"tinit": 20}, "no step is left to prune at"),
    "a negative alpha": ({"lora_alpha": 0}, "lora_alpha is 0, expected a positive number"),
    "beta": ({"beta1": 1.5}, "beta1 and beta2 within"),
    "weight": ({"orth_reg_weight": -1.0}, "orth_weight from 0"),
    "dora": ({"use_dora": True}, "use_dora=True is not supported"),
    "alphas by module": ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern=.* is not supported"),
    "a table": ({"target_modules": ["embed_tokens"], "rank_pattern": None}, "embed_tokens is a table"),
    "rank 0": ({"init_r": 0}, "init_r is 0"),
    **{
        f"a target of {k}": ({"target_r": k}, f"target_rank is {k}, expected 1 to the rank at the start, 4")
        for k in (5, 7, 9, 99)
    },
    "a target above a start above the default": ({"init_r": 9, "target_r": 10}, "target_rank is 10, expected 1 to .*, 9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_options_that_cannot_be_read_are_one_clear_error(damage, tmp_path):
    changes, message = DAMAGES[damage]
    _, params, roles, _, _ = golden.model("llama")
    golden.repaged("llama", "adalora_pruned", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        hf_peft.load(tmp_path / "a", params, roles)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("target", [8, ...])
def test_the_default_target_above_the_start_is_read_as_one_that_never_prunes(target, tmp_path):
    """Peft writes `target_r=8` for who says `init_r=4` and no more; what is written again is the start."""
    _, params, roles, _, _ = golden.model("llama")
    golden.repaged("llama", "adalora_pruned", tmp_path / "a", target_r=target)
    tuned = hf_peft.load(tmp_path / "a", params, roles)
    hf_peft.save(tmp_path / "b", tuned, roles)
    assert (read(tmp_path / "b")["init_r"], read(tmp_path / "b")["target_r"]) == (4, 4)
    same = hf_peft.load(PRUNED, params, roles)
    for (_, x), (_, y) in zip(pj.extract(tuned).items(), pj.extract(same).items(), strict=True):
        np.testing.assert_array_equal(x, y)
