"""Files of Hugging Face peft on models of several kinds: fused and transposed kernels, tied tables, heads of two layers."""

import json

import golden_models as golden
import jax
import numpy as np
import peftjax as pj
import pytest
from covers import some
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from test_hf_peft import CONFIG, TENSORS, loaded

from experiments.models.bert import Classifier, read_config
from peftjax.interop import hf_peft

pytestmark = pytest.mark.third_party

KEY = jax.random.key(0)


def own_bert():
    """The BERT of this repository, with the golden base's parameters: `fn(params, ids, mask)`, and they."""
    folder = golden.GOLDEN / "bert" / "base"
    made = Classifier(read_config(folder / "config.json"), 3, "first")
    _, _, _, ids, masks = golden.model("bert")
    shapes = jax.eval_shape(made.init, KEY, ids, masks["full"])["params"]
    fn = lambda params, ids, mask: made.apply({"params": params}, ids, mask)
    return fn, golden.flax_tree(load_file(folder / "model.safetensors"), shapes)


@pytest.mark.parametrize("adapter", some([a for a in golden.adapters("bert") if a not in golden.SOFT], 3))
def test_this_repositorys_bert_gives_them_too(adapter, tmp_path):
    fn, params = own_bert()
    _, _, _, ids, masks = golden.model("bert")
    roles, folder = pj.roles(fn, params, ids, masks["full"]), golden.GOLDEN / "bert" / adapter
    tuned = hf_peft.load(folder, params, roles)
    assert max(golden.errors("bert", folder, jax.jit(pj.wrap(fn)), tuned).values()) <= 1e-5
    hf_peft.save(tmp_path / "a", tuned, roles, task_type="SEQ_CLS")
    want, got = load_file(folder / TENSORS), load_file(tmp_path / "a" / TENSORS)
    assert set(got) == set(want)
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def written(model, adapter, folder, **options):
    hf_peft.save(folder, loaded(model, adapter), golden.model(model)[2], **options)
    return json.loads((folder / CONFIG).read_text())


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
def test_conv1d_lies_the_other_way_in_flax_and_in_torch(adapter, tmp_path):
    """Flax has (out, in), torch has (in, out), and peft's tensors are those of a linear layer all the same."""
    _, params, roles, _, _ = golden.model("gpt2")
    path = "transformer/h/0/attn/c_attn/kernel"
    assert roles[path].axes == "oi" and flatten_dict(params, sep="/")[path].shape == (48, 16)
    assert written("gpt2", adapter, tmp_path / "a", task_type="CAUSAL_LM")["fan_in_fan_out"] is True
    assert "fan_in_fan_out" not in written("bert", adapter, tmp_path / "b", task_type="SEQ_CLS")


def test_a_head_of_two_layers_is_saved_as_one_module(tmp_path):
    _, params, roles, _, _ = golden.model("roberta")
    page = written("roberta", "lora", tmp_path / "a", task_type="SEQ_CLS")
    assert page["modules_to_save"] == ["classifier"]
    method = pj.chain(pj.lora(rank=2, targets=("query",)), pj.unfreeze(("classifier/out_proj",)))
    tuned = method.init(KEY, params, roles)
    hf_peft.save(tmp_path / "b", tuned, roles)
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["modules_to_save"] == ["out_proj"]
    hf_peft.save(tmp_path / "c", tuned, roles, task_type="SEQ_CLS")
    assert json.loads((tmp_path / "c" / CONFIG).read_text())["modules_to_save"] == ["classifier"]
    dense = load_file(tmp_path / "c" / TENSORS)["base_model.model.classifier.dense.weight"]
    np.testing.assert_array_equal(dense, params["classifier"]["dense"]["kernel"].T)


def test_an_update_of_a_tied_table_acts_where_it_is_looked_up():
    fn, params, roles, ids, masks = golden.model("gpt2")
    tuned = loaded("gpt2", "lora_tied")
    table = tuned["transformer"]["wte"]["embedding"]
    assert roles["transformer/wte/embedding"].uses == ("gather", "dot_general") and table.uses == ("gather",)
    with pytest.raises(ValueError, match="transformer/wte/embedding"):
        pj.merge(tuned)
    both = pj.merge(tuned["transformer"] | {"wte": {"embedding": table.replace(uses=None)}})
    found = golden.errors("gpt2", golden.GOLDEN / "gpt2" / "lora_tied", jax.jit(fn), {"transformer": both})
    assert min(found.values()) > 0.01, "moved as the head too, the table gives other logits"


REFUSED = {
    "a trained copy of the table": ({"modules_to_save": ["wte"], "target_modules": ["c_fc"]}, "wte.*uses twice"),
    "a magnitude of the table": ({"use_dora": True}, "use_dora on transformer.wte, which is table and head in one"),
    "some rows of the table": (
        {"trainable_token_indices": [1, 2], "target_modules": ["c_fc"]},
        "missing: .*transformer.wte.token_adapter.trainable_tokens_delta .2,16.",
    ),
    "a head that is the table": ({"target_modules": ["lm_head", "c_fc"]}, "unknown: .*wte|lm_head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_acts_on_the_table_or_the_head_alone_is_refused(name, tmp_path):
    _, params, roles, _, _ = golden.model("gpt2")
    changes, words = REFUSED[name]
    golden.repaged("gpt2", "lora_tied", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=words) as caught:
        hf_peft.load(tmp_path / "a", params, roles)
    assert str(tmp_path / "a") in str(caught.value)
