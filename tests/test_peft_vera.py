"""VeRA in Hugging Face peft's files: the shared matrices, scales, and what cannot be read or written."""

import json
import shutil

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
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def layers(n=3):
    """A stack of layers, wide and back, as one leaf each; and the names of their modules."""
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    params = {"down": {"kernel": draw(0, n, 4, 6)}, "up": {"kernel": draw(1, n, 6, 4)}}

    def fn(params, x):
        step = lambda x, w: (jnp.tanh(x @ w["down"]["kernel"]) @ w["up"]["kernel"], None)
        return jax.lax.scan(step, x, params)[0]

    names = {f"{k}/kernel": f"layers.{{layer}}.{k}.weight" for k in params}
    return fn, params, pj.roles(fn, params, jnp.ones((2, 4))), names


def test_a_stack_of_layers_is_written_as_its_modules(tmp_path):
    fn, params, roles, names = layers()
    tuned = away(pj.vera(rank=5, targets=("up", "down")).init(KEY, params, roles), by=1.0)
    hf_peft.save(tmp_path / "a", tuned, roles, names)
    tensors, prefix = load_file(tmp_path / "a" / TENSORS), "base_model.model.layers.1.up."
    assert len(tensors) == 2 * 3 * 2 + 2
    assert tensors["base_model.vera_A"].shape == (5, 6) and tensors["base_model.vera_B"].shape == (6, 5)
    a, b = (tensors[f"base_model.vera_{k}"].astype(np.float64) for k in "AB")
    d, lambda_b = (tensors[f"{prefix}vera_lambda_{k}"] for k in "db")
    delta = np.diag(lambda_b) @ b[:4] @ np.diag(d) @ a[:, :6]
    merged = np.asarray(pj.merge(tuned)["up"]["kernel"][1]) - np.asarray(params["up"]["kernel"][1])
    np.testing.assert_allclose(merged, delta.T, rtol=1e-4, atol=1e-5)
    again = hf_peft.load(tmp_path / "a", params, roles, names)
    jax.tree.map(np.testing.assert_array_equal, again, tuned)


def test_a_scale_is_written_into_the_vectors(tmp_path):
    fn, params, roles, names = layers()
    tuned = pj.scale(away(pj.vera(rank=5, targets=("up", "down")).init(KEY, params, roles), by=1.0), 0.5)
    hf_peft.save(tmp_path / "a", tuned, roles, names)
    again, x = hf_peft.load(tmp_path / "a", params, roles, names), jnp.ones((2, 4))
    np.testing.assert_allclose(pj.wrap(fn)(again, x), pj.wrap(fn)(tuned, x), rtol=1e-5, atol=1e-6)


def test_dropout_is_kept(tmp_path):
    _, params, roles, names = layers()
    hf_peft.save(
        tmp_path / "a", pj.vera(rank=5, targets=("up", "down"), dropout=0.25).init(KEY, params, roles), roles, names
    )
    assert hf_peft.load(tmp_path / "a", params, roles, names)["up"]["kernel"].dropout == 0.25


def test_matrices_of_several_methods_are_refused(tmp_path):
    _, params, roles, names = layers()
    tuned = pj.chain(pj.vera(rank=2, targets=("up",)), pj.vera(rank=2, targets=("down",))).init(KEY, params, roles)
    with pytest.raises(ValueError, match="down/kernel and up/kernel hold random matrices of their own"):
        hf_peft.save(tmp_path / "a", tuned, roles, names)


def edited(folder, tensors=lambda t: t, **page):
    shutil.copytree(golden.GOLDEN / "bert" / "vera", folder)
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **page}))
    save_file(tensors(load_file(folder / TENSORS)), folder / TENSORS)
    _, params, roles, _, _ = golden.model("bert")
    return hf_peft.load(folder, params, roles)


@pytest.mark.parametrize(
    "page,message",
    [
        (dict(save_projection=False), "save the adapter again, in peft, with save_projection=True"),
        (dict(r=4), r"shape: base_model.vera_A is \[5,16\], expected \[4,16\]"),
        (dict(bias="lora_only"), 'bias is .lora_only., expected one of "none", "all", "vera_only"'),
        (dict(bias="none"), "unknown: base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias"),
        (dict(target_modules=["word_embeddings"]), "word_embeddings is a table; peft has VeRA for linear layers alone"),
        (dict(vera_dropout=1.0), "dropout is a rate"),
    ],
)
def test_pages_that_do_not_fit(page, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        edited(tmp_path / "a", **page)


def test_missing_matrices_are_named(tmp_path):
    without = lambda t: {k: x for k, x in t.items() if k != "base_model.vera_B"}
    with pytest.raises(ValueError, match=r"missing: base_model.vera_B \[32,5\]"):
        edited(tmp_path / "a", without)
    with pytest.raises(ValueError, match="not finite: base_model.vera_A"):
        edited(tmp_path / "b", lambda t: {**t, "base_model.vera_A": t["base_model.vera_A"] * np.float32(np.nan)})
