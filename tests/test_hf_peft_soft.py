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


@pytest.mark.parametrize("adapter", golden.SOFT)
def test_our_own_bert_gives_the_logits_that_peft_gives(adapter):
    config = bert.read_config(golden.GOLDEN / "bert" / "base" / "config.json")
    _, params, _, ids, masks = golden.model("bert")
    model = bert.Classifier(config, 3, "first")

    def fn(params, input_ids, attention_mask, position_ids=None):
        return model.apply({"params": params}, input_ids, attention_mask, positions=position_ids)

    roles = pj.roles(fn, params, ids, masks["full"])
    tuned = hf_peft.load(golden.GOLDEN / "bert" / adapter, params, roles)
    options = {"shift": True} if adapter == "prefix" else {"side": "first", "check": False}
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    apply = jax.jit(lambda *args: pj.wrap_tokens(fn, **options)(*args, positions))
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


# Prefixes


def layer(p, x, mask, turn=lambda keys: keys):
    """An attention of two heads of four features."""
    heads = lambda name: (x @ p[name]["kernel"].reshape(8, -1)).reshape(*x.shape[:2], 2, 4)
    scores = jnp.einsum("bqhk,bthk->bhqt", heads("q_proj"), turn(heads("k_proj")))
    weights = jax.nn.softmax(jnp.where(mask[:, None, None] > 0, scores, -1e9), -1)
    return x + jnp.einsum("bhqt,bthk->bqhk", weights, heads("v_proj")).reshape(x.shape)


def rope(keys, positions):
    """Pairs of neighbours, as some models have them."""
    angles = positions[:, None, None] / 100.0 ** (jnp.arange(2, dtype=jnp.float32) / 2)[None, None]
    a, b = keys[..., ::2], keys[..., 1::2]
    made = a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)
    return jnp.stack(made, -1).reshape(keys.shape)


TURNS = {
    "plain": lambda keys: keys,
    "rotary": lambda keys: rope(
        keys.reshape(-1, *keys.shape[2:]), jnp.tile(jnp.arange(keys.shape[1]), len(keys))
    ).reshape(keys.shape),
    "normed": lambda keys: keys * jax.lax.rsqrt((keys**2).mean(-1, keepdims=True) + 1e-6),
    "clipped": lambda keys: jnp.clip(keys, -1, 1),
}


def small(turn="plain", stacked=False, heads=False):
    """A model of three layers, and its parameters: also stacked, or with an axis for heads."""
    draw = lambda *shape: jax.random.normal(jax.random.fold_in(KEY, sum(shape)), shape)
    out = (2, 4) if heads else (8,)
    one = lambda: {name: {"kernel": draw(8, *out)} for name in ("q_proj", "k_proj", "v_proj")}
    params = {"words": draw(11, 8), "layers": [one() for _ in range(3)]}
    if stacked:
        params["layers"] = jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])

    def fn(params, input_ids, attention_mask):
        x, step = params["words"][input_ids], lambda x, p: (layer(p, x, attention_mask, TURNS[turn]), None)
        if stacked:
            return jax.lax.scan(step, x, params["layers"])[0]
        for p in params["layers"]:
            x = step(x, p)[0]
        return x

    names = {"layers/(.*)": r"layers.{layer}.\1" if stacked else r"layers.\1", "words": "words.weight"}
    ids = jnp.array([[1, 4, 2, 9]])
    mask = jnp.ones_like(ids)
    return fn, params, pj.roles(fn, params, ids, mask), names, (ids, mask)


def folder_of(path, n=3, layers=3, width=8, heads=2, **page):
    """A prefix of numbers in order, as peft writes it."""
    path.mkdir()
    rows = np.arange(n * 2 * layers * width, dtype=np.float32).reshape(n, -1) / 10
    save_file({"prompt_embeddings": rows}, path / TENSORS)
    known = dict(num_virtual_tokens=n, num_layers=layers, token_dim=width, num_attention_heads=heads)
    (path / CONFIG).write_text(json.dumps({"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", **known, **page}))
    return rows.reshape(n, layers, 2, width)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_each_layer_has_its_keys_then_its_values(stacked, heads, tmp_path):
    _, params, roles, names, _ = small(stacked=stacked, heads=heads)
    rows = folder_of(tmp_path / "a")
    tuned = hf_peft.load(tmp_path / "a", params, roles, names)
    flat = pj.extract(tuned)
    for l in range(3):
        for k, name in enumerate(("k_proj", "v_proj")):
            got = flat[f"layers/{name}/kernel/prefix"][l] if stacked else flat[f"layers/{l}/{name}/kernel/prefix"]
            assert got.shape == ((3, 2, 4) if heads else (3, 8))
            np.testing.assert_array_equal(got.reshape(3, 8), rows[:, l, k])
    hf_peft.save(tmp_path / "b", tuned, roles, names)
    both = [load_file(tmp_path / name / TENSORS) for name in "ab"]
    jax.tree.map(np.testing.assert_array_equal, *both)
    page = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert (page.get("num_attention_heads"), page.get("token_dim")) == ((2, 8) if heads else (None, None))


def test_keys_are_turned_back_by_a_function_and_again_on_the_way_out(tmp_path):
    fn, params, roles, names, args = small("rotary")
    rows = folder_of(tmp_path / "a")
    with pytest.raises(ValueError, match="rotary positions turn what layers.0.k_proj.weight.*pass `rope=`"):
        hf_peft.load(tmp_path / "a", params, roles, names)
    tuned = hf_peft.load(tmp_path / "a", params, roles, names, rope=rope)
    keys = pj.extract(tuned)["layers/1/k_proj/kernel/prefix"]
    np.testing.assert_allclose(rope(keys.reshape(3, 2, 4), jnp.arange(3)).reshape(3, 8), rows[:, 1, 0], atol=1e-5)
    np.testing.assert_array_equal(pj.extract(tuned)["layers/1/v_proj/kernel/prefix"], rows[:, 1, 1])
    hf_peft.save(tmp_path / "b", tuned, roles, names, rope=rope, heads=2)
    both = [load_file(tmp_path / name / TENSORS)["prompt_embeddings"] for name in "ab"]
    np.testing.assert_allclose(*both, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="rope: .*expected a rotation"):
        hf_peft.load(tmp_path / "a", params, roles, names, rope=lambda keys, positions: keys + positions[:, None, None])
    with pytest.raises(ValueError, match="into how many does the model cut layers.0.k_proj.weight.*`heads=`"):
        hf_peft.save(tmp_path / "c", tuned, roles, names, rope=rope)


def test_a_prefix_that_was_read_acts_as_keys_after_their_positions(tmp_path):
    """Against attention with real keys and values, at positions from n on."""
    fn, params, roles, names, (ids, mask) = small("rotary")
    rows = folder_of(tmp_path / "a") / 20
    save_file({"prompt_embeddings": rows.reshape(3, -1)}, tmp_path / "a" / TENSORS)
    tuned = hf_peft.load(tmp_path / "a", params, roles, names, rope=rope)
    got = pj.wrap_tokens(fn, side="first")(tuned, ids, mask)
    x = params["words"][ids[0]]
    for l, p in enumerate(params["layers"]):
        heads = lambda name: (x @ p[name]["kernel"]).reshape(-1, 2, 4)
        keys = jnp.concatenate([rows[:, l, 0].reshape(-1, 2, 4), rope(heads("k_proj"), 3 + jnp.arange(4))])
        values = jnp.concatenate([rows[:, l, 1].reshape(-1, 2, 4), heads("v_proj")])
        weights = jax.nn.softmax(jnp.einsum("qhk,thk->hqt", heads("q_proj"), keys), -1)
        x = x + jnp.einsum("hqt,thk->qhk", weights, values).reshape(x.shape)
    np.testing.assert_allclose(got[0], x, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("turn", ["normed", "clipped"])
def test_keys_that_go_through_more_than_sums_are_refused(turn, tmp_path):
    _, params, roles, names, _ = small(turn)
    folder_of(tmp_path / "a")
    with pytest.raises(
        ValueError, match="what layers.0.k_proj.weight, .* put out goes through something that is not linear"
    ):
        hf_peft.load(tmp_path / "a", params, roles, names)
    tuned = pj.prefix(3).init(KEY, params, roles)  # which trains well
    with pytest.raises(ValueError, match="not linear"):
        hf_peft.save(tmp_path / "b", tuned, roles, names)


@pytest.mark.parametrize(
    "page, message",
    [
        ({"layers": 2}, "num_layers is 2, expected 3"),
        ({"width": 4}, "token_dim is 4, expected 8"),
        ({"heads": 3}, "num_attention_heads is 3, expected a divisor of 8"),
        ({"heads": 16}, "num_attention_heads is 16, expected a divisor of 8"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2, expected 1, one stack"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "num_transformer_submodules is 2, expected 1"),
        ({"prefix_projection": 1}, "prefix_projection is 1, expected true or false"),
    ],
)
def test_sizes_that_are_not_the_models_are_listed(page, message, tmp_path):
    _, params, roles, names, _ = small()
    folder_of(tmp_path / "a", **page)
    with pytest.raises(ValueError, match=message):
        hf_peft.load(tmp_path / "a", params, roles, names)


def test_rope_where_nothing_turns_is_refused(tmp_path):
    _, params, roles, names, _ = small()
    folder_of(tmp_path / "a")
    with pytest.raises(ValueError, match="the trace shows no rotary positions"):
        hf_peft.load(tmp_path / "a", params, roles, names, rope=1e4)
    with pytest.raises(ValueError, match="no projections are called key and value"):
        hf_peft.load(
            tmp_path / "a", params, roles, {r"layers/(\d)/(.)_.*": r"layers.\1.\2q.weight", "words": "words.weight"}
        )
    _, params, roles, _, _ = golden.model("llama")
    with pytest.raises(ValueError, match="rope=10000.0 says nothing of PROMPT_TUNING"):
        hf_peft.load(golden.GOLDEN / "llama" / "prompt", params, roles, rope=1e4)


def test_what_a_network_makes_of_a_prefix_is_written(tmp_path):
    fn, params, roles, names, args = small("rotary")
    tuned = drawn(pj.prefix(3, hidden=4).init(KEY, params, roles))
    hf_peft.save(tmp_path / "a", pj.scale(tuned, 0.5), roles, names, rope=rope, heads=2)
    again = hf_peft.load(tmp_path / "a", params, roles, names, rope=rope)
    run = pj.wrap_tokens(fn, side="first")
    np.testing.assert_allclose(run(again, *args), run(pj.scale(tuned, 0.5), *args), atol=1e-4)


@pytest.mark.parametrize(
    "methods, message",
    [
        ([pj.prefix(3, targets="layers/[01]/[kv].*")], "every layer; layers.2.k_proj.weight, layers.2.v_proj.weight have none"),
        ([pj.prefix(3, targets="layers/./[qkv].*")], "no place for the prefixes at layers/0/q_proj/kernel"),
        ([pj.prefix(3, targets="layers/[01]/[kv].*"), pj.prefix(2, targets="layers/2/[kv].*")], "lengths of prefixes differ"),
        ([pj.prefix(3, targets="layers/./[kv].*", features=((0, 4),))], r"is for the features \(\(0, 4\),\), expected None"),
        ([pj.prefix(3), pj.lora(rank=2, targets="layers/./q.*")], "peft has no file for LoRA, Prefix"),
    ],
)  # fmt: skip
def test_prefixes_that_peft_has_no_file_for(methods, message, tmp_path):
    _, params, roles, names, _ = small()
    tuned = pj.chain(*methods).init(KEY, params, roles)
    with pytest.raises(ValueError, match=message):
        hf_peft.save(tmp_path / "a", tuned, roles, names)


@pytest.mark.parametrize("model", golden.SEQ2SEQ)
def test_what_peft_gives_a_decoder_is_read_and_not_written(model, tmp_path):
    """Layer l reads the slots 4 l and 4 l + 1 of 2 L, from the first again after the last."""
    _, params, roles, _, _ = golden.model(model)
    folder = golden.GOLDEN / model / "prefix"
    tuned = hf_peft.load(folder, params, roles)
    slots = load_file(folder / TENSORS)["prompt_embeddings"].reshape(5, -1, 16)
    path = {
        "t5": "decoder/block/{}/layer/0/SelfAttention/k/kernel",
        "bart": "model/decoder/layers/{}/self_attn/k_proj/bias",
    }
    for l, at in enumerate({"t5": (0, 4, 2), "bart": (0, 0)}[model]):
        np.testing.assert_array_equal(pj.extract(tuned)[path[model].format(l) + "/prefix"], slots[:, at])
    assert not any("encoder" in key for key in pj.extract(tuned))
    with pytest.raises(ValueError, match="in mixed places, two layers the same: they are read, and not written"):
        hf_peft.save(tmp_path / "a", tuned, roles)
