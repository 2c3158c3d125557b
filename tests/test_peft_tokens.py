"""HF peft's trained tokens: options and tensors that do not fit, tied heads, and what is written."""

import json
import shutil

import golden_models as golden
import jax
import numpy as np
import peftjax as pj
import pytest
from peftjax.interop import hf_peft
from safetensors.numpy import load_file, save_file
from test_hf_peft import CONFIG, TENSORS

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party
KEY = jax.random.key(0)


def damaged(tmp_path, model, adapter, page={}, tensors={}):
    folder = tmp_path / "a"
    shutil.copytree(golden.GOLDEN / model / adapter, folder)
    found = json.loads((folder / CONFIG).read_text()) | page
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))
    arrays = load_file(folder / TENSORS)
    save_file({k: tensors[k](x) if k in tensors else x for k, x in arrays.items()}, folder / TENSORS)
    return folder


def load(folder, model):
    _, params, roles, _, _ = golden.model(model)
    return hf_peft.load(folder, params, roles)


def test_rows_are_values_and_not_differences():
    tuned = load(golden.GOLDEN / "llama" / "tokens", "llama")
    x = tuned["model"]["embed_tokens"]["embedding"]
    name = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    want = load_file(golden.GOLDEN / "llama" / "tokens" / TENSORS)[name]
    assert x.ids == (7, 0, 30)
    np.testing.assert_array_equal(pj.merge(tuned)["model"]["embed_tokens"]["embedding"][np.array(x.ids)], want)


@pytest.mark.parametrize(
    "said",
    [[11, 3, 0], {"embed_tokens": [11, 3, 0]}, {"embed_tokens": [11, 3, 0], "lm_head": [11, 3, 0]}],
)
def test_a_tied_head_is_named_or_not(said, tmp_path):
    folder = damaged(tmp_path, "tied", "lora_tokens", {"trainable_token_indices": said})
    want = pj.extract(load(golden.GOLDEN / "tied" / "lora_tokens", "tied"))
    jax.tree.map(np.testing.assert_array_equal, pj.extract(load(folder, "tied")), want)


EMBED, HEAD = "model.embed_tokens.trainable_tokens_delta", "lm_head.trainable_tokens_delta"
PAGES = {
    "no ids": ("llama", "tokens", {"token_indices": ...}, "token_indices is missing, expected a list of integers"),
    "ids of another type": ("llama", "tokens", {"token_indices": [True, 1, 2]}, "token_indices is"),
    "an id outside": ("llama", "tokens", {"token_indices": [7, 0, 50]}, r"ids \[50\]"),
    "an id twice": ("llama", "tokens", {"token_indices": [7, 0, 7]}, r"\[7\] stand twice"),
    "fewer ids": ("llama", "tokens", {"token_indices": [7, 0]}, r"is \[3,16\], expected \[2,16\]"),
    "no module": ("llama", "tokens", {"target_modules": ["wte"]}, "names no module"),
    "no table": ("llama", "tokens", {"target_modules": ["norm"]}, "norm, which have no kernel"),
    "of LoRA, no module": ("llama", "lora_tokens", {"trainable_token_indices": {"wte": [5, 2]}}, "names 'wte'"),
    "of LoRA, an empty list": ("llama", "lora_tokens", {"trainable_token_indices": []}, "trainable_token_indices is"),
    "of LoRA, adapted too": (
        "llama",
        "lora_tokens",
        {"trainable_token_indices": {"q_proj": [1]}},
        "is adapted or saved",
    ),
    "of LoRA, saved too": ("llama", "lora_tokens", {"modules_to_save": ["embed_tokens"]}, "is adapted or saved"),
    "other rows of a tied head": (
        "tied",
        "lora_tokens",
        {"trainable_token_indices": {"embed_tokens": [11, 3, 0], "lm_head": [1, 3, 0]}},
        "'lm_head', for which this model has no weight of its own, or other tokens",
    ),
}


@pytest.mark.parametrize("damage", PAGES)
def test_options_that_cannot_be_read_are_one_clear_error(damage, tmp_path):
    model, adapter, page, message = PAGES[damage]
    with pytest.raises(ValueError, match=message) as caught:
        load(damaged(tmp_path, model, adapter, page), model)
    assert str(tmp_path) in str(caught.value)


def test_a_tied_head_with_rows_of_its_own_is_refused(tmp_path):
    folder = damaged(tmp_path, "tied", "tokens", tensors={f"base_model.model.{HEAD}": lambda x: x + 1})
    with pytest.raises(ValueError, match="not equal: .*which this model has as one array"):
        load(folder, "tied")


def test_the_shortest_names_are_written(tmp_path):
    _, params, roles, _, _ = golden.model("llama")
    tuned = pj.chain(
        pj.lora(rank=2, targets=("q_proj",)),
        pj.trainable_tokens((4, 2), targets=("embed_tokens",)),
        pj.trainable_tokens((1,), targets=("lm_head",)),
    ).init(KEY, params, roles)
    hf_peft.save(tmp_path / "a", tuned, roles)
    page = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert page["trainable_token_indices"] == {"embed_tokens": [4, 2], "lm_head": [1]}
    again = hf_peft.load(tmp_path / "a", params, roles)
    jax.tree.map(np.testing.assert_array_equal, pj.extract(again), pj.extract(tuned))


def test_tokens_beside_adalora(tmp_path):
    _, params, roles, _, _ = golden.model("llama")
    tuned = pj.chain(
        pj.adalora(rank=2, target_rank=1, total_steps=9, targets=("q_proj",)),
        pj.trainable_tokens((4, 2), targets=("embed_tokens",)),
    ).init(KEY, params, roles)
    hf_peft.save(tmp_path / "a", tuned, roles)
    again = hf_peft.load(tmp_path / "a", params, roles)
    jax.tree.map(np.testing.assert_array_equal, pj.extract(again), pj.extract(tuned))


def test_rows_are_written_at_scale_one_and_different_ids_have_no_file(tmp_path):
    _, params, roles, _, _ = golden.model("llama")
    tuned = load(golden.GOLDEN / "llama" / "tokens", "llama")
    hf_peft.save(tmp_path / "a", pj.scale(tuned, 0.5), roles)
    again = hf_peft.load(tmp_path / "a", params, roles)
    leaf = lambda tree: pj.merge(tree)["model"]["embed_tokens"]["embedding"]
    np.testing.assert_allclose(leaf(again), leaf(pj.scale(tuned, 0.5)), rtol=1e-6, atol=1e-7)
    two = [pj.trainable_tokens((k,), targets=(n,)) for k, n in enumerate(("embed_tokens", "lm_head"))]
    with pytest.raises(ValueError, match="tokens differ"):
        hf_peft.save(tmp_path / "b", pj.chain(*two).init(KEY, params, roles), roles)
