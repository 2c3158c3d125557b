"""LoRA whose B has a bias, in Hugging Face peft's files: scales, and what cannot be read or written."""

import json

import golden_models as golden
import jax
import numpy as np
import peftjax as pj
import pytest
from peftjax.interop import hf_peft
from peftjax.methods.lora import Shift
from peftjax.tree import map_layers
from safetensors.numpy import load_file

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

KEY = jax.random.key(0)
CONFIG = "adapter_config.json"


def away(tuned):
    return pj.insert(tuned, {k: np.asarray(x) + np.float32(0.1) for k, x in pj.extract(tuned).items()})


def test_it_is_the_bias_of_b_and_has_its_scale(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    tuned = pj.scale(away(pj.lora(rank=2, alpha=6, targets=("query",), bias=True).init(KEY, params, roles)), 0.5)
    hf_peft.save(tmp_path / "a", tuned, roles)
    page, tensors = json.loads((tmp_path / "a" / CONFIG).read_text()), load_file(tmp_path / "a" / hf_peft.TENSORS)
    assert page["lora_bias"] is True and page["lora_alpha"] == 3
    layer = "bert.encoder.layer.1.attention.self.query"
    added = tensors[f"base_model.model.{layer}.lora_B.bias"] * 3 / 2
    leaf = lambda tree: tree["bert"]["encoder"]["layer"]["1"]["attention"]["self"]["query"]["bias"]
    np.testing.assert_allclose(leaf(pj.merge(tuned)) - leaf(params), added, rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles), tuned)


def test_a_model_without_biases_has_no_place_for_it(tmp_path):
    golden.repaged("llama", "lora", tmp_path / "a", lora_bias=True)
    _, params, roles, _, _ = golden.model("llama")
    with pytest.raises(ValueError, match="added to the bias of a module; model.layers.0.self_attn.q_proj.* have none"):
        hf_peft.load(tmp_path / "a", params, roles)


@pytest.mark.parametrize(
    "page,message",
    [
        (dict(lora_bias=False), "unknown: .*query.lora_B.bias"),
        (dict(lora_bias="yes"), "lora_bias is 'yes', expected true or false"),
        (dict(bias="lora_only"), "bias='lora_only' may train already"),
        (dict(use_dora=True), "which use_dora has no place for"),
    ],
)
def test_pages_that_do_not_fit(page, message, tmp_path):
    golden.repaged("bert", "lora_b_bias", tmp_path / "a", **page)
    _, params, roles, _, _ = golden.model("bert")
    with pytest.raises(ValueError, match=message):
        hf_peft.load(tmp_path / "a", params, roles)


def test_what_one_file_cannot_say(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    with_bias, without = (pj.lora(rank=2, targets=(n,), bias=b) for n, b in (("query", True), ("value", False)))
    with pytest.raises(ValueError, match="and none in .*value.*; peft's files say one"):
        hf_peft.save(tmp_path / "a", pj.chain(with_bias, without).init(KEY, params, roles), roles)
    halved = lambda _, x: x.replace(scale=x.scale / 2) if isinstance(x, Shift) else x
    uneven = map_layers(halved, with_bias.init(KEY, params, roles))
    with pytest.raises(ValueError, match="the scale of LoRA's bias is not that of its product in .*query"):
        hf_peft.save(tmp_path / "a", uneven, roles)
