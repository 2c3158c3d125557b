"""`roles` of models written by others: transformers' Flax models, unmodified, tiny, and never filled with numbers."""

import jax
import jax.numpy as jnp
import pytest

from peftjax.roles import Norm, Role, roles

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
IMAGE = jax.ShapeDtypeStruct((2, 3, 32, 32), jnp.float32)
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}  # as many heads as features of a head
SQUARE = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 12, "vocab_size": 30, **HEADS}
SEQUENCE = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDE = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 12, "vocab_size": 30}


def read(name, config, *names, inputs=(IDS,), **options):
    """The roles of one of the Flax models; `names` are those of its inputs."""
    config = getattr(transformers, config)(**options)
    model = getattr(transformers, f"Flax{name}")(config, _do_init=False)
    fn = lambda params, *args: model(**dict(zip(names, args)), params=params, train=False)[0]
    return roles(fn, model.params_shape_tree, *inputs)


def of(found, end):
    """The roles of the leaves whose paths end so."""
    return {path.removesuffix(end): role for path, role in found.items() if path.endswith(end)}


def check_biases(found):
    """Each kernel beside a bias is paired with it, and it alone."""
    pairs = {p: p.removesuffix("kernel") + "bias" for p in found if p.endswith("kernel")}
    assert {p: found[p].bias for p in pairs} == {p: bias if bias in found else None for p, bias in pairs.items()}
    kernels = {bias: kernel for kernel, bias in pairs.items()}
    assert all(found[b].kernel == kernels.get(b) for b in found if b.endswith("/bias") and "orm" not in b)


def residual(found):
    return {path for path, role in found.items() if role.residual}


def sublayers(found):
    """The last module of each residual kernel, by the sublayer that it ends."""
    named = lambda word: {p.split("/")[-2] for p in residual(found) if found[p].sublayer == word}
    assert not named("unknown")
    return named("attention"), named("feed-forward")


def heads(found):
    return [path for path, role in found.items() if role.head]


def test_bert():
    names = ("input_ids", "attention_mask")
    found = read("BertForSequenceClassification", "BertConfig", *names, inputs=(IDS, IDS), **SQUARE)
    check_biases(found)
    layers = [f"bert/encoder/layer/{i}" for i in (0, 1)]
    assert {role.axes for role in of(found, "kernel").values()} == {"io"}
    assert residual(found) == {f"{x}/{n}/dense/kernel" for x in layers for n in ("attention/output", "output")}
    for module in (f"{x}/{n}" for x in layers for n in ("attention/output", "output")):
        norm = Norm(f"{module}/LayerNorm/scale", f"{module}/LayerNorm/bias", 1e-12)
        assert found[f"{module}/dense/kernel"].norm == norm
    assert heads(found) == ["classifier/kernel"]
    tables = of(found, "_embeddings/embedding")
    assert {found[p].sublayer for p in residual(found) if "attention" in p} == {"attention"}
    assert {found[p].sublayer for p in residual(found) if "attention" not in p} == {"feed-forward"}
    assert len(tables) == 3 and {(r.op, r.axes, r.uses) for r in tables.values()} == {("embedding", "io", ("gather",))}
    assert found[f"{layers[0]}/attention/self/query/kernel"].order < found[f"{layers[1]}/output/dense/bias"].order


def test_bert_with_its_table_as_head():
    found = read("BertForMaskedLM", "BertConfig", "input_ids", "attention_mask", inputs=(IDS, IDS), **SQUARE)
    table = "bert/embeddings/word_embeddings/embedding"
    assert found[table].op == "embedding" and found[table].uses == ("gather", "dot_general") and heads(found) == [table]
    assert found["cls/predictions/bias"].kernel == table


def test_gpt2_keeps_its_kernels_transposed():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 12, "vocab_size": 30}
    found = read("GPT2LMHeadModel", "GPT2Config", "input_ids", "attention_mask", inputs=(IDS, IDS), **sizes)
    check_biases(found)
    assert {role.axes for role in of(found, "kernel").values()} == {"oi"}
    assert residual(found) == {f"transformer/h/{i}/{n}/c_proj/kernel" for i in (0, 1) for n in ("attn", "mlp")}
    assert not any(role.norm for role in found.values()) and heads(found) == ["transformer/wte/embedding"]
    named = {path.split("/")[-3]: found[path].sublayer for path in residual(found)}
    assert named == {"attn": "attention", "mlp": "feed-forward"}
    assert found["transformer/wpe/embedding"].uses == ("gather",)


def test_llama():
    found = read("LlamaForCausalLM", "LlamaConfig", "input_ids", "attention_mask", inputs=(IDS, IDS),
                 num_key_value_heads=2, **SQUARE)  # fmt: skip
    assert {role.axes for role in of(found, "kernel").values()} == {"io"} and heads(found) == ["lm_head/kernel"]
    modules = ("self_attn/o_proj", "mlp/down_proj")
    assert sublayers(found) == ({"o_proj"}, {"down_proj"})
    assert residual(found) == {f"model/layers/{i}/{n}/kernel" for i in (0, 1) for n in modules}
    assert not any(role.norm or role.bias for role in found.values())
    assert {(role.op, role.axes) for role in of(found, "norm/weight").values()} == {("scale", "o")}
    assert found["model/embed_tokens/embedding"] == Role("embedding", "io", 0, ("gather",))


def test_t5(monkeypatch):
    clip = jnp.clip
    older = lambda x, a_min=None, a_max=None: clip(x, min=a_min, max=a_max)  # names that JAX has dropped
    monkeypatch.setattr(jnp, "clip", older)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 30}
    found = read("T5ForConditionalGeneration", "T5Config", "input_ids", "decoder_input_ids", inputs=(IDS, IDS), **sizes)
    assert {role.axes for role in of(found, "kernel").values()} == {"io"}
    assert len(residual(found)) == 10 and all(path.endswith(("/o/kernel", "/wo/kernel")) for path in residual(found))
    assert sublayers(found) == ({"o"}, {"wo"})
    assert not any(role.norm for role in found.values()) and heads(found) == ["shared/embedding"]
    assert found["shared/embedding"].uses == ("gather", "gather", "dot_general")
    assert {role.op for role in of(found, "relative_attention_bias/embedding").values()} == {"embedding"}
    crossed = found["decoder/block/0/layer/1/EncDecAttention/k/kernel"]
    assert found["encoder/final_layer_norm/weight"].order < crossed.order


def test_bart():
    found = read("BartForConditionalGeneration", "BartConfig", "input_ids", "decoder_input_ids", inputs=(IDS, IDS),
                 d_model=16, **SEQUENCE, **WIDE)  # fmt: skip
    check_biases(found)
    after = {"self_attn/out_proj": "self_attn_layer_norm", "encoder_attn/out_proj": "encoder_attn_layer_norm",
             "fc2": "final_layer_norm"}  # fmt: skip
    norms = {path: role.norm for path, role in of(found, "/kernel").items() if role.norm}
    for path, norm in norms.items():
        layer = next(path.removesuffix(f"/{end}") for end in after if path.endswith(end))
        name = f"{layer}/{after[path.removeprefix(layer + '/')]}"
        assert norm == Norm(f"{name}/scale", f"{name}/bias", 1e-5)
    assert len(norms) == 5 and heads(found) == ["model/shared/embedding"]
    assert sublayers(found) == ({"out_proj"}, {"fc2"})
    assert found["final_logits_bias"].kernel == "model/shared/embedding"


def test_vit():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 32, "patch_size": 8, "num_labels": 3, **HEADS}
    found = read("ViTForImageClassification", "ViTConfig", "pixel_values", inputs=(IMAGE,), **sizes)
    check_biases(found)
    patches = found["vit/embeddings/patch_embeddings/projection/kernel"]
    assert (patches.op, patches.axes, patches.residual) == ("conv", "iiio", False)
    assert found["vit/embeddings/cls_token"].op == "other"
    assert found["vit/embeddings/position_embeddings"].kernel is None
    assert len(residual(found)) == 4 and not any(role.norm for role in found.values())
    assert heads(found) == ["classifier/kernel"]


def test_resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 3}
    found = read("ResNetForImageClassification", "ResNetConfig", "pixel_values", inputs=(IMAGE,), **sizes)
    kernels = of(found, "convolution/kernel")
    assert {(role.op, role.axes, role.bias) for role in kernels.values()} == {("conv", "iiio", None)}
    statistics = [role.op for path, role in found.items() if path.startswith("batch_stats")]
    assert set(statistics) == {"other"} and len(statistics) == 2 * len(kernels)
    assert {role.op for role in of(found, "normalization/scale").values()} == {"scale"}
    assert heads(found) == ["params/classifier/1/kernel"]
