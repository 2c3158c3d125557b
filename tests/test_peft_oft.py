"""OFT in Hugging Face peft's files: which blocks the options mean, and what cannot be read or written."""

import json

import flax.linen as nn
import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from trees import away
from peftjax.interop import hf_peft, peft_oft
from safetensors.numpy import load_file

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

KEY = jax.random.key(0)
SHIFT = np.random.default_rng(0)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    "features,wanted,taken", [(16, 12, 8), (16, 13, 16), (32, 12, 8), (10, 3, 2), (10, 4, 5), (7, 5, 7), (8, 9, 8)]
)
def test_the_divisor_that_peft_takes(features, wanted, taken):
    """Of two as near, the smaller one; the whole where the wish is larger."""
    assert peft_oft.adjusted(features, wanted) == taken


def test_one_number_of_blocks_for_modules_of_several_widths(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    tuned = away(pj.oft(rank=4, targets=("query", "output/dense")).init(KEY, params, roles), by=0.1)
    hf_peft.save(tmp_path / "a", tuned, roles)
    page = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (page["r"], page["oft_block_size"], page["use_cayley_neumann"]) == (4, 0, False)
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles), tuned)


def test_a_stack_of_layers_is_written_as_its_modules(tmp_path):
    params = {"layers": {"kernel": jnp.asarray(SHIFT.normal(size=(3, 6, 6)), jnp.float32)}}
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"]["kernel"])[0]
    roles, names = pj.roles(fn, params, jnp.ones((2, 6))), {"layers/kernel": "layers.{layer}.weight"}
    tuned = away(pj.oft(block_size=3, neumann_terms=6, eps=0.3).init(KEY, params, roles), by=0.1)
    hf_peft.save(tmp_path / "a", tuned, roles, names)
    tensor = load_file(tmp_path / "a" / TENSORS)["base_model.model.layers.1.oft_R.weight"]
    np.testing.assert_array_equal(tensor, tuned["layers"]["kernel"].upper[1])
    again = hf_peft.load(tmp_path / "a", params, roles, names)
    jax.tree.map(np.testing.assert_array_equal, again, tuned)
    assert again["layers"]["kernel"].series == 6 and again["layers"]["kernel"].eps == 0.3


def convolution(window):
    conv = nn.Conv(4, window)
    x = jnp.ones((1, 5, 5, 4))
    params = {"conv": conv.init(KEY, x)["params"]}
    return params, pj.roles(lambda p, x: conv.apply({"params": p["conv"]}, x), params, x)


def test_a_convolution_without_a_window(tmp_path):
    params, roles = convolution((1, 1))
    tuned = away(pj.oft(block_size=2, targets=("conv",)).init(KEY, params, roles), by=0.1)
    hf_peft.save(tmp_path / "a", tuned, roles)
    assert load_file(tmp_path / "a" / TENSORS)["base_model.model.conv.oft_R.weight"].shape == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles), tuned)


def test_a_convolution_with_a_window_is_no_weight_in_peft(tmp_path):
    params, roles = convolution((3, 3))
    tuned = pj.oft(block_size=2, targets=("conv",)).init(KEY, params, roles)
    with pytest.raises(ValueError, match="conv is a convolution with a window"):
        hf_peft.save(tmp_path / "a", tuned, roles)


QUERY = ("layer/0/attention/self/query",)
UNWRITTEN = {
    "at another scale": (lambda i: pj.scale(i(pj.oft(rank=2, targets=QUERY)), 0.5), "query.*not at scale 1"),
    "a series that peft has not": (
        lambda i: i(pj.oft(rank=2, targets=QUERY, neumann_terms=3)),
        "3 terms of the series",
    ),
    "two kinds of blocks": (
        lambda i: i(pj.chain(pj.oft(rank=8, targets=("query",)), pj.oft(rank=2, targets=("key",)))),
        "blocks of 2 of 16, 8 of 16 features",
    ),
    "shared and not": (
        lambda i: i(pj.chain(pj.oft(rank=2, targets=("query",), share=True), pj.oft(rank=2, targets=("key",)))),
        "whether blocks are shared",
    ),
    "the inverse and a series": (
        lambda i: i(pj.chain(pj.oft(rank=2, targets=("query",), neumann_terms=5), pj.oft(rank=2, targets=("key",)))),
        "numbers of terms",
    ),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_peft_has_no_file_for(name, tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    make, words = UNWRITTEN[name]
    with pytest.raises(ValueError, match=words):
        hf_peft.save(tmp_path / "a", make(lambda method: method.init(KEY, params, roles)), roles)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"r": 2}, "r is 2 and oft_block_size 12; expected one of them"),
        ({"oft_block_size": 0}, "r is 0 and oft_block_size 0"),
        ({"oft_block_size": ...}, "oft_block_size is missing, expected an integer: files without it are of peft 0.13"),
        ({"use_cayley_neumann": True, "peft_version": "0.17.1"}, "peft_version='0.17.1'.*before 0.18"),
        ({"use_cayley_neumann": ..., "peft_version": ...}, "peft_version=None"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms is 2"),
        ({"oft_block_size": 4}, "oft_R.weight is .2,28., expected .4,6."),
        ({"block_share": True}, "expected .1,28."),
        ({"coft": True, "eps": 0}, "positive eps"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"target_modules": ["word_embeddings"], "bias": "none"}, "missing: .*oft_embedding_R.weight .2,28."),
    ],
)
def test_a_damaged_folder_is_one_clear_error(changes, words, tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    golden.repaged("bert", "oft", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=words) as caught:
        hf_peft.load(tmp_path / "a", params, roles)
    assert str(tmp_path / "a") in str(caught.value)
