"""Prompts, P-tuning and prefixes of Hugging Face peft: what the golden folders do not show."""

import json
import shutil

import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from experiments.models import bert
from peftjax.interop import hf_peft
from safetensors.numpy import load_file, save_file

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = jax.random.key(2)


def edit(folder, tensors={}, **page):
    """Changes a folder's tensors, and options of its page."""
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **page}))
    save_file({**load_file(folder / TENSORS), **tensors}, folder / TENSORS)


def drawn(tuned):
    """The tree with other trained values."""
    moved = {
        k: x + jax.random.normal(jax.random.fold_in(KEY, n), x.shape)
        for n, (k, x) in enumerate(pj.extract(tuned).items())
    }
    return pj.insert(tuned, moved)


@pytest.mark.parametrize("adapter", ["prompt", "ptuning"])
def test_our_own_bert_gives_the_logits_that_peft_gives(adapter):
    config = bert.read_config(golden.GOLDEN / "bert" / "base" / "config.json")
    _, params, _, ids, masks = golden.model("bert")
    model = bert.Classifier(config, 3, "first")
    fn = lambda params, input_ids, attention_mask: model.apply({"params": params}, input_ids, attention_mask)
    roles = pj.roles(fn, params, ids, masks["full"])
    tuned = hf_peft.load(golden.GOLDEN / "bert" / adapter, params, roles)
    apply = jax.jit(pj.wrap_tokens(fn, side="first", check=False))
    found = golden.errors("bert", golden.GOLDEN / "bert" / adapter, apply, tuned)
    assert max(found.values()) <= 1e-5


def test_of_two_prompts_the_first_is_read(tmp_path):
    _, params, roles, _, _ = golden.model("llama")
    folder = tmp_path / "a"
    shutil.copytree(golden.GOLDEN / "llama" / "prompt", folder)
    rows = load_file(folder / TENSORS)["prompt_embeddings"]
    edit(folder, {"prompt_embeddings": np.concatenate([rows, 0 * rows])}, num_transformer_submodules=2)
    with pytest.raises(ValueError, match="num_transformer_submodules is 2 with the task CAUSAL_LM"):
        hf_peft.load(folder, params, roles)
    edit(folder, task_type="SEQ_2_SEQ_LM")
    tuned = hf_peft.load(folder, params, roles)
    np.testing.assert_array_equal(pj.extract(tuned)["model/embed_tokens/embedding/prompt"], rows)
    edit(folder, {"prompt_embeddings": rows})
    with pytest.raises(ValueError, match=r"prompt_embeddings is \[5,16\], expected \[10,16\]"):
        hf_peft.load(folder, params, roles)


def test_what_a_network_puts_out_is_written_and_read_as_a_prompt(tmp_path):
    _, params, roles, ids, masks = golden.model("llama")
    tuned = drawn(pj.p_tuning(4, 6).init(KEY, params, roles))
    hf_peft.save(tmp_path / "a", pj.scale(tuned, 0.5), roles, task_type="CAUSAL_LM")
    page = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert page["peft_type"] == "P_TUNING" and page["num_virtual_tokens"] == 4 and page["token_dim"] == 16
    again = hf_peft.load(tmp_path / "a", params, roles)
    assert isinstance(
        again["model"]["embed_tokens"]["embedding"], type(pj.fold(tuned)["model"]["embed_tokens"]["embedding"])
    )
    run = golden.wrapped("llama", "prompt")
    np.testing.assert_allclose(run(again, ids, masks["full"]), run(pj.scale(tuned, 0.5), ids, masks["full"]), atol=1e-6)
    hf_peft.save(tmp_path / "b", again, roles)
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["peft_type"] == "PROMPT_TUNING"
    both = [load_file(tmp_path / name / TENSORS)["prompt_embeddings"] for name in "ab"]
    np.testing.assert_array_equal(*both)


def test_the_method_of_a_prompt_trains_on():
    _, params, roles, _, _ = golden.model("bert")
    tuned = hf_peft.load(golden.GOLDEN / "bert" / "prompt", params, roles)
    fresh = hf_peft.method(golden.GOLDEN / "bert" / "prompt", params, roles).init(KEY, params, roles)
    values = lambda tree: {k: x.shape for k, x in pj.extract(tree).items()}
    assert values(fresh) == values(tuned) and len(values(tuned)) == 3


def test_a_table_of_words_that_cannot_be_told_is_named():
    params = {"a": {"embedding": jnp.ones((5, 16))}, "b": {"embedding": jnp.ones((5, 16))}}
    fn = lambda params, ids: params["a"]["embedding"][ids] + params["b"]["embedding"][ids]
    roles = pj.roles(fn, params, jnp.ones((1, 3), int))
    folder = golden.GOLDEN / "llama" / "prompt"
    with pytest.raises(ValueError, match="this model looks up a.weight, b.weight; expected one"):
        hf_peft.load(folder, params, roles)
    names = {"a/embedding": "wte.weight", "(.*)": r"\1"}
    assert list(pj.extract(hf_peft.load(folder, params, roles, names))) == ["a/embedding/prompt"]
