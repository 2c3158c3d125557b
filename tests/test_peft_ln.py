"""Norms trained themselves in Hugging Face peft's files, and the biases of heads beside them."""

import json

import flax.linen as nn
import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from trees import away
from peftjax.interop import hf_peft
from safetensors.numpy import load_file, save_file

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

KEY = jax.random.key(0)
SHIFT = np.random.default_rng(0)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(tuned, roles, folder, **options):
    hf_peft.save(folder, tuned, roles, **options)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


def test_the_norms_of_a_model_and_its_head(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    method = pj.chain(pj.layer_norm(), pj.head())
    tuned = away(method.init(KEY, params, roles), by=0.1)
    page, tensors = saved(tuned, roles, tmp_path / "a", task_type="SEQ_CLS")
    assert (page["target_modules"], page["modules_to_save"]) == (["LayerNorm"], ["classifier"])
    assert len(tensors) == 2 * 5 + 2
    name = "base_model.model.bert.embeddings.LayerNorm.ln_tuning_layers.bias"
    np.testing.assert_array_equal(tensors[name], tuned["bert"]["embeddings"]["LayerNorm"]["bias"].value)
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles), tuned)


def test_what_stays_of_a_norm_is_written_as_the_base_has_it(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    tuned = away(pj.unfreeze("bert/embeddings/LayerNorm/scale").init(KEY, params, roles), by=0.1)
    page, tensors = saved(tuned, roles, tmp_path / "a")
    assert page["target_modules"] == ["bert.embeddings.LayerNorm"]
    assert len(tensors) == 2 and any(
        np.array_equal(x, params["bert"]["embeddings"]["LayerNorm"]["bias"]) for x in tensors.values()
    )


def test_leaves_trained_themselves_without_a_norm(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    with pytest.raises(ValueError, match="no file for leaves that are trained themselves.*classifier/bias"):
        hf_peft.save(tmp_path / "a", pj.head().init(KEY, params, roles), roles)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"target_modules": ["query"]}, "bert.encoder.layer.0.attention.self.query.*which are no norms"),
        ({"target_modules": ["LayerNrom"]}, "names no module of this model .nearest"),
        ({"target_modules": ["embeddings.LayerNorm"]}, "unknown: .*layer.0.attention.output.LayerNorm"),
        ({"modules_to_save": ["embeddings"]}, "modules_to_save names bert.embeddings.LayerNorm, which are norms"),
        ({"modules_to_save": []}, "unknown: base_model.model.classifier.bias"),
    ],
)
def test_a_damaged_page(changes, words, tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    golden.repaged("bert", "ln", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=words) as caught:
        hf_peft.load(tmp_path / "a", params, roles)
    assert str(tmp_path / "a") in str(caught.value)


def heads():
    """Attention whose kernels are (in, heads, size), and whose biases (heads, size)."""
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    x = jnp.asarray(SHIFT.normal(size=(2, 3, 4)), jnp.float32)
    params = jax.tree.map(lambda x: x + jnp.asarray(SHIFT.normal(size=x.shape), x.dtype), model.init(KEY, x)["params"])
    fn = lambda params, x: model.apply({"params": params}, x)
    return fn, params, pj.roles(fn, params, x), x


def test_the_bias_of_heads_is_one_axis_in_torch(tmp_path):
    fn, params, roles, x = heads()
    method = pj.chain(pj.lora(rank=2, targets=("query",)), pj.unfreeze(("key", "value/bias")))
    tuned = away(method.init(KEY, params, roles), by=0.1)
    page, tensors = saved(tuned, roles, tmp_path / "a")
    assert page["modules_to_save"] == ["key", "value"]
    of = lambda name: tensors[f"base_model.model.{name}"]
    np.testing.assert_array_equal(of("key.bias"), np.ravel(tuned["key"]["bias"].value))
    np.testing.assert_array_equal(of("key.weight"), np.asarray(tuned["key"]["kernel"].value).reshape(4, 6).T)
    np.testing.assert_array_equal(of("value.weight"), np.asarray(params["value"]["kernel"]).reshape(4, 6).T)
    again = hf_peft.load(tmp_path / "a", params, roles)
    for name in pj.extract(tuned):
        np.testing.assert_array_equal(pj.extract(again)[name], pj.extract(tuned)[name])
    np.testing.assert_array_equal(pj.wrap(fn)(again, x), pj.wrap(fn)(tuned, x))
    save_file(
        {k: v.reshape(2, 3) if k.endswith("key.bias") else v for k, v in tensors.items()}, tmp_path / "a" / TENSORS
    )
    with pytest.raises(ValueError, match="key.bias is .2,3., expected .6."):
        hf_peft.load(tmp_path / "a", params, roles)


def test_the_biases_of_adapted_heads(tmp_path):
    fn, params, roles, x = heads()
    method = pj.chain(pj.lora(rank=2, targets=("query",)), pj.unfreeze(("query/bias",)))
    tuned = away(method.init(KEY, params, roles), by=0.1)
    page, tensors = saved(tuned, roles, tmp_path / "a")
    assert page["bias"] == "lora_only"
    np.testing.assert_array_equal(
        tensors["base_model.model.query.base_layer.bias"], np.ravel(tuned["query"]["bias"].value)
    )
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles), tuned)
