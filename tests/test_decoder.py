"""The scanned decoder: the logits of transformers' own Llama, from its weights, and what its configuration may say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from experiments.models.decoder import Decoder, frequencies
from experiments.models.decoder_config import Config, read_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PAGE = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
}


UNSAID = object()


def written(folder, **changes):
    path = folder / "config.json"
    page = {**PAGE, **changes}
    path.write_text(json.dumps({key: value for key, value in page.items() if value is not UNSAID}))
    return path


def stacked(params):
    """A tree of transformers' Llama with its layers in one stack."""
    layers = params["model"]["layers"]
    one = jax.tree.map(lambda *xs: jnp.stack(xs), *(layers[k] for k in sorted(layers, key=int)))
    return {**params, "model": {**params["model"], "layers": one}}


@pytest.mark.third_party
def test_gives_what_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.FlaxLlamaForCausalLM(transformers.LlamaConfig(**PAGE, max_position_embeddings=64))
    ids = np.random.default_rng(0).integers(0, 31, (2, 9))
    want = jax.jit(lambda params: theirs(ids, params=params).logits)(theirs.params)
    for block in (1024, 4):  # in one block, and in three of which the last is short
        config = read_config(written(tmp_path), dtype=jnp.float32, block=block)
        got = jax.jit(Decoder(config).apply)({"params": stacked(theirs.params)}, ids)
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_frequencies_of_llama_3(tmp_path):
    """Slow pairs turn 8 times slower, fast ones as before, and those between lie between."""
    c = read_config(written(tmp_path, rope_scaling=LLAMA3, head_dim=32))
    plain, found = (np.asarray(frequencies(x)) for x in (read_config(written(tmp_path, head_dim=32)), c))
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(found[waves < 32 / 4], plain[waves < 32 / 4], rtol=1e-6)
    np.testing.assert_allclose(found[waves > 32], plain[waves > 32] / 8, rtol=1e-6)
    between = (waves > 8) & (waves < 32)
    smooth = (32 / waves[between] - 1) / 3
    np.testing.assert_allclose(found[between], plain[between] * (smooth + (1 - smooth) / 8), rtol=1e-5)
    assert between.any() and (waves > 32).any()


def test_positions_in_the_words_of_transformers_5_are_those_of_4(tmp_path):
    """`rope_parameters` holds the base too; both may be there where they say the same."""
    new = {**LLAMA3, "rope_theta": 1000.0}
    plain = {"rope_type": "default", "rope_theta": 1000.0}
    for scaling, changes in [
        (LLAMA3, {"rope_theta": UNSAID, "rope_parameters": new}),
        (LLAMA3, {"rope_parameters": new}),
        (LLAMA3, {"rope_scaling": LLAMA3, "rope_parameters": {**new, "rope_theta": None}}),
        (LLAMA3, {"rope_scaling": {**LLAMA3, "type": "llama3"}}),
        (None, {"rope_theta": UNSAID, "rope_parameters": plain}),
        (None, {"rope_theta": UNSAID, "rope_parameters": {"rope_theta": 1000, "partial_rotary_factor": 1.0}}),
        (None, {"rope_scaling": {"rope_type": "default"}}),
    ]:
        old = read_config(written(tmp_path, rope_scaling=scaling))
        assert read_config(written(tmp_path, **changes)) == old and old.rope_theta == 1000, changes
    assert read_config(written(tmp_path, rope_theta=UNSAID)).rope_theta == 10000


def test_what_is_null_is_not_said(tmp_path):
    """As many heads of keys as of queries, and what is left of the width for each."""
    found = read_config(written(tmp_path, num_key_value_heads=None, head_dim=None, rope_scaling=None))
    assert (found.num_key_value_heads, found.head_dim, found.rope_scaling) == (4, 4, None)
    assert read_config(written(tmp_path, num_attention_heads=6, head_dim=8)).head_dim == 8


@pytest.mark.third_party
def test_tied_embeddings_and_methods_without_a_merge(tmp_path):
    model = Decoder(read_config(written(tmp_path, tie_word_embeddings=True)))
    ids = jnp.zeros((1, 5), jnp.int32)
    params = model.init(jax.random.key(0), ids)["params"]
    assert "lm_head" not in params and params["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (2, 16, 24)
    fn = lambda params, ids: model.apply({"params": params}, ids)
    for method in (pj.lora(rank=2), pj.dora(rank=2), pj.adapter("pfeiffer", bottleneck=4)):
        _, tuned = pj.attach(method, fn, params, ids, key=jax.random.key(1))
        assert not pj.explain(fn, tuned, ids).merged, method


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "expected that of llama3"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "expected that of llama3"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', expected an object with a rope_type, or null"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_scaling says nothing of high_freq_factor, original_max_position_embeddings; expected factor, low_",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "rope_scaling.factor is '8', expected a number above 0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor is 4, expected less than high_.*, 4.0"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor is 8.0, expected none where rope_type is 'default'"),
        ({"rope_scaling": {**LLAMA3, "type": "yarn"}}, "rope_type is 'llama3', rope_scaling.type is 'yarn': "),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters is {.*}, expected that of"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0, rope_theta is 1000.0: expected"),
        ({"rope_parameters": LLAMA3, "rope_scaling": {"rope_type": "default"}}, "rope_scaling is .*, rope_parameters"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5,"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0"),
        ({"rope_theta": -1}, "rope_theta is -1, expected a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected false or true"),
        ({"hidden_size": "16"}, "hidden_size is '16', expected a whole number, 1 at least"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2, expected a whole number, 1 at least"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number"),
        ({"num_attention_heads": 6}, "num_attention_heads is 6, expected a divisor of hidden_size, 16, or a head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of num_attention_heads, 4"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"vocab_size": None}, "says nothing of vocab_size"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', expected llama or mistral"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"num_local_experts": 8}, "num_local_experts is 8, expected none"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096, expected None"),
    ],
)
def test_what_it_does_not_do_is_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        read_config(written(tmp_path, **changes))
    assert str(error.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(error.value)


def test_a_page_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a config.json of the Llama family, found list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(ValueError, match="expected a config.json of the Llama family"):
            read_config(path)
    assert Config(**{**PAGE, "head_dim": 4}).remat == "layers"
