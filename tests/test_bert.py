"""BERT against the one of transformers, and what its loader refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from experiments.models import bert
from experiments.models.load import folder_of, load

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
IDS = np.random.default_rng(0).integers(0, 40, (3, 7)).astype(np.int32)
MASK = (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int32)


def torch_tensors(params):
    """The tensors as a checkpoint holds them: names with dots, kernels as (out, in)."""
    ends = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    named = {}
    for path, x in flatten_dict(params, sep="/").items():
        module, _, last = path.rpartition("/")
        named[f"{module.replace('/', '.')}.{ends.get(last, last)}"] = np.ascontiguousarray(
            x.T if last == "kernel" else x
        )
    return named


def write(folder, tensors, **page):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES, **page}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def drawn():
    """Random parameters of the encoder with its pooler, none of them a zero or a one that stayed."""
    config = bert.Config(**SIZES)
    params = jax.jit(bert.Bert(config, "first").init)(jax.random.key(0), IDS, MASK)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


def test_equals_transformers(drawn, usual_promotion):
    transformers = pytest.importorskip("transformers")
    config = bert.Config(**SIZES)
    with usual_promotion():
        theirs = transformers.FlaxBertModel(transformers.BertConfig(**SIZES), _do_init=False)
        expected = theirs(IDS, MASK, params=drawn)
    hidden, pooled = jax.jit(bert.Bert(config, "first").apply)({"params": drawn}, IDS, MASK)
    np.testing.assert_allclose(
        np.asarray(hidden) * MASK[..., None], np.asarray(expected[0]) * MASK[..., None], atol=1e-5
    )
    np.testing.assert_allclose(pooled, expected[1], atol=1e-5)


def test_padding_changes_nothing(drawn):
    apply = jax.jit(bert.Bert(bert.Config(**SIZES)).apply)
    body = {name: x for name, x in drawn.items() if name != "pooler"}
    _, pooled = apply({"params": body}, IDS, MASK)
    _, alone = apply({"params": body}, IDS[1:2, :4], MASK[1:2, :4])
    np.testing.assert_allclose(pooled[1:2], alone, atol=1e-5)


def test_dropout_needs_train_and_a_key(drawn):
    model = bert.Classifier(bert.Config(**SIZES), 2, "first")
    params = {"bert": drawn, "classifier": {"kernel": np.ones((16, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    run = jax.jit(lambda key: model.apply({"params": params}, IDS, MASK, train=True, rngs={"dropout": key}))
    one, same, other = (run(jax.random.key(k)) for k in (0, 0, 1))
    assert (one == same).all() and not (one == other).any()


def test_reads_a_checkpoint(drawn, tmp_path):
    tensors = {f"bert.{name}": x for name, x in torch_tensors(drawn).items()}
    tensors["bert.embeddings.position_ids"] = np.arange(12)[None]
    tensors["cls.predictions.bias"] = np.zeros(40, np.float32)
    config, params = load(write(tmp_path / "model", tensors), "first")
    assert config == bert.Config(**SIZES)
    jax.tree.map(np.testing.assert_array_equal, params, drawn)
    assert "pooler" not in load(tmp_path / "model", "mean")[1]


def test_reads_half_precision_and_old_names(drawn, tmp_path):
    tensors = {n: x.astype(np.float16) for n, x in torch_tensors(drawn).items() if "pooler" not in n}
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for n, x in tensors.items()
    }
    _, params = load(write(tmp_path / "model", old))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_lists_every_tensor_that_does_not_fit(drawn, tmp_path):
    tensors = torch_tensors(drawn)
    tensors["encoder.layer.0.extra.weight"] = tensors.pop("encoder.layer.1.output.dense.bias")
    tensors["embeddings.LayerNorm.bias"] = np.zeros(5, np.float32)
    with pytest.raises(ValueError) as error:
        load(write(tmp_path / "model", tensors))
    for part in (
        "missing: encoder/layer/1/output/dense/bias (16,)",
        "not in the model: encoder/layer/0/extra/kernel (16,)",
        "embeddings/LayerNorm/bias: found (5,), expected (16,)",
    ):
        assert part in str(error.value)


def test_refuses_other_models(drawn, tmp_path):
    write(tmp_path / "model", torch_tensors(drawn), model_type="roberta")
    with pytest.raises(ValueError, match="'roberta' with absolute positions; expected 'bert'"):
        load(tmp_path / "model")
    write(tmp_path / "model", {}, position_embedding_type="relative_key")
    with pytest.raises(ValueError, match="relative_key"):
        load(tmp_path / "model")
    for name, wrong in (("hidden_size", "16"), ("num_attention_heads", 0), ("intermediate_size", 2.5)):
        (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES, name: wrong}))
        with pytest.raises(ValueError, match=f"config.json: {name} {wrong!r}; expected a whole number, 1 at least"):
            load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"short")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES}))
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors; found config.json"):
        load(tmp_path / "model")


def test_says_what_to_do_without_a_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ValueError, match="'some/model' is no folder, and could not be had.*Without a network, give a folder"
    ):
        folder_of("some/model")
    with pytest.raises(ValueError, match="is no folder, nor can it be the id"):
        folder_of("/no/such/place")
    assert folder_of(str(tmp_path)) == tmp_path


def test_says_what_is_wrong_with_its_input(drawn):
    model = bert.Bert(bert.Config(**SIZES), "first")
    with pytest.raises(ValueError, match=r"T <= 12"):
        model.apply({"params": drawn}, np.zeros((1, 13), np.int32), np.ones((1, 13), np.int32))
    with pytest.raises(ValueError, match="hidden_size 16 is no multiple of 3 heads"):
        bert.Config(**{**SIZES, "num_attention_heads": 3})
