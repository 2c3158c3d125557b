"""Files of Hugging Face peft: read, they give its logits; written, its tensors bit for bit; damaged, one clear error."""

import json
import re
import shutil

import flax.linen as nn
import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from covers import some
from peftjax.interop import hf_peft
from safetensors.numpy import load_file, save_file

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

LATER = ("roberta", "t5", "bart")  # whose LoRA, of the same formats, is judged before a change lands
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CASES = [(m, a) for m in golden.KINDS for a in golden.adapters(m)]
WRITTEN = [case for case in CASES if case not in (("t5", "prefix"), ("bart", "prefix"))]


def loaded(model, adapter):
    _, params, roles, _, _ = golden.model(model)
    return hf_peft.load(golden.GOLDEN / model / adapter, params, roles, **golden.known(model, adapter))


@pytest.mark.parametrize("model", [pytest.param(m, marks=pytest.mark.ci if m in LATER else ()) for m in golden.KINDS])
def test_every_row_of_the_golden_table_holds(model):
    """The logits of each adapter are those that peft gives, under each mask: `pytest -s` prints the errors."""
    table = {}
    for adapter in golden.adapters(model):
        run, folder = golden.wrapped(model, adapter), golden.GOLDEN / model / adapter
        table[adapter] = golden.errors(model, folder, run, loaded(model, adapter))
    print(f"\n{model + ', max|difference| / max|logits|':44}", *(f"{mask:>9}" for mask in golden.MASKS))
    for adapter, found in table.items():
        print(f"  {adapter:42}", *(f"{found[mask]:9.1e}" for mask in golden.MASKS if mask in found))
    wrong = {adapter: found for adapter, found in table.items() if not max(found.values()) <= 1e-5}
    assert table and not wrong, wrong


@pytest.mark.parametrize("model,adapter", WRITTEN)
def test_writes_back_what_it_read(model, adapter, tmp_path):
    _, params, roles, _, _ = golden.model(model)
    task = json.loads((golden.GOLDEN / model / adapter / CONFIG).read_text())["task_type"]
    known = golden.known(model, adapter)
    hf_peft.save(
        tmp_path / "a", loaded(model, adapter), roles, task_type=task, heads=golden.KEY_HEADS.get(model), **known
    )
    want, got = load_file(golden.GOLDEN / model / adapter / TENSORS), load_file(tmp_path / "a" / TENSORS)
    assert set(got) == set(want)
    same = lambda x, y, name="": np.testing.assert_allclose(
        x, y, rtol=0, atol=1e-6 if "rope" in known else 0, err_msg=name
    )
    if model in golden.SEQ2SEQ and adapter == "prompt":  # peft holds a second prompt, and reads the first
        want["prompt_embeddings"] = want["prompt_embeddings"][:5]
    for name, tensor in want.items():
        same(got[name], tensor, name)
    again = hf_peft.load(tmp_path / "a", params, roles, **known)
    jax.tree.map(same, pj.extract(again), pj.extract(loaded(model, adapter)))


SCALED = [case for case in WRITTEN if case[1] not in golden.SOFT]


@pytest.mark.parametrize("model,adapter", some(SCALED, 9))
def test_a_scaled_tree_is_written_as_it_acts(model, adapter, tmp_path):
    """What a file cannot say is folded into its tensors, or refused."""
    fn, params, roles, ids, masks = golden.model(model)
    half, known = pj.scale(loaded(model, adapter), 0.5), golden.known(model, adapter)
    if "oft" in adapter:
        with pytest.raises(ValueError, match="no scale"):
            hf_peft.save(tmp_path / "a", half, roles)
        return
    task = json.loads((golden.GOLDEN / model / adapter / CONFIG).read_text())["task_type"]
    hf_peft.save(tmp_path / "a", half, roles, task_type=task, **known)
    again = hf_peft.load(tmp_path / "a", params, roles, **known)
    # A tied table has one overlay for the table and another for the head, which no one leaf can hold.
    acts = (lambda tree: jax.jit(pj.wrap(fn))(tree, ids, masks["full"])) if "tied" in adapter else pj.merge
    got, want, whole = (jax.tree.leaves(acts(tree)) for tree in (again, half, loaded(model, adapter)))
    apart = lambda x, y: float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-30))
    assert max(map(apart, got, want)) <= 1e-6
    assert max(map(apart, whole, want)) > 1e-4


def test_methods_that_are_not_read_are_refused_by_name(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    (tmp_path / CONFIG).write_text('{"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 5}')
    with pytest.raises(
        ValueError, match="peft_type is 'MULTITASK_PROMPT_TUNING', expected one of LORA, .*PREFIX_TUNING"
    ):
        hf_peft.load(tmp_path, params, roles)


def test_the_method_of_a_file_trains_on():
    _, params, roles, _, _ = golden.model("bert")
    method = hf_peft.method(golden.GOLDEN / "bert" / "rslora_pattern", params, roles)
    tuned = method.init(jax.random.key(0), params, roles)
    assert set(pj.extract(tuned)) == set(pj.extract(loaded("bert", "rslora_pattern")))


def test_pissa_is_written_as_further_ranks(tmp_path):
    fn, params, roles, ids, masks = golden.model("llama")
    method = pj.lora(rank=2, alpha=6, targets=("q_proj", "v_proj"), init="pissa")
    tuned = method.init(jax.random.key(0), params, roles)
    moved = pj.insert(tuned, {k: np.asarray(x) + 0.1 for k, x in pj.extract(tuned).items()})
    hf_peft.save(tmp_path / "a", moved, roles)
    again = hf_peft.load(tmp_path / "a", params, roles)
    run = jax.jit(pj.wrap(fn))
    np.testing.assert_allclose(run(again, ids, masks["full"]), run(moved, ids, masks["full"]), atol=2e-5)


def test_names_map_a_stacked_leaf_to_numbered_modules(tmp_path):
    def fn(params, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(step, x, params["layers"]["dense"]["kernel"])[0]

    params = {"layers": {"dense": {"kernel": jax.random.normal(jax.random.key(0), (3, 4, 4))}}}
    roles = pj.roles(fn, params, jnp.ones((2, 4)))
    names = {"layers/dense/kernel": "model.layers.{layer}.dense.weight"}
    tuned = pj.lora(rank=2, alpha=6).init(jax.random.key(1), params, roles)
    tuned = pj.insert(tuned, {k: np.asarray(x) + 0.1 for k, x in pj.extract(tuned).items()})
    hf_peft.save(tmp_path / "a", tuned, roles, names)
    tensors = load_file(tmp_path / "a" / TENSORS)
    a = tuned["layers"]["dense"]["kernel"].a
    np.testing.assert_array_equal(tensors["base_model.model.model.layers.1.dense.lora_A.weight"], a[1].T)
    again = hf_peft.load(tmp_path / "a", params, roles, names)
    jax.tree.map(np.testing.assert_array_equal, pj.extract(again), pj.extract(tuned))


@pytest.mark.parametrize("window", [(3, 2), (1, 1), (3,)])
def test_a_convolution_is_written_as_torch_has_it(window, tmp_path):
    conv = nn.Conv(5, window)
    x = jnp.ones((2, *(6 for _ in window), 4))
    params = {"conv": conv.init(jax.random.key(0), x)["params"]}
    fn = lambda params, x: conv.apply({"params": params["conv"]}, x)
    roles = pj.roles(fn, params, x)
    tuned = pj.lora(rank=2, alpha=6, targets=("conv",)).init(jax.random.key(1), params, roles)
    tuned = pj.insert(tuned, {k: np.asarray(v) + 0.1 for k, v in pj.extract(tuned).items()})
    hf_peft.save(tmp_path / "a", tuned, roles)
    tensors = load_file(tmp_path / "a" / TENSORS)
    a, b = (tensors[f"base_model.model.conv.lora_{k}.weight"] for k in "AB")
    assert a.shape == (2, 4, *window) and b.shape == (5, 2, *(1 for _ in window))
    delta = np.einsum("or,ri...->oi...", b.reshape(5, 2), a) * 3  # alpha / rank
    merged = np.asarray(pj.merge(tuned)["conv"]["kernel"]) - np.asarray(params["conv"]["kernel"])
    np.testing.assert_allclose(np.moveaxis(merged, (-1, -2), (0, 1)), delta, atol=1e-5)
    again = hf_peft.load(tmp_path / "a", params, roles)
    jax.tree.map(np.testing.assert_array_equal, pj.extract(again), pj.extract(tuned))


@pytest.mark.parametrize(
    "names,message",
    [
        ({"bert/.*": "one.weight"}, "is the name of two parameters"),
        ({"nowhere": "one.weight", "(.*)": r"\1"}, "'nowhere' matches no path"),
        ({"bert/(.*)": r"bert.\1"}, "classifier/kernel is named by no entry"),
        ({"(.*": "x"}, "is no regex"),
    ],
)
def test_names_are_one_to_one(names, message):
    _, params, roles, _, _ = golden.model("bert")
    with pytest.raises(ValueError, match=message):
        hf_peft.load(golden.GOLDEN / "bert" / "lora", params, roles, names)


def test_refuses_to_write_what_peft_has_no_file_for(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    tuned = pj.lora(rank=2, targets=("query",)).init(jax.random.key(0), params, roles)
    broken = pj.insert(tuned, pj.extract(tuned))
    flat = {k: np.full_like(x, np.nan) for k, x in pj.extract(broken).items()}
    trainable, frozen = pj.partition(tuned)
    diverged = pj.combine(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), trainable), frozen)
    with pytest.raises(ValueError, match="NaN"):
        hf_peft.save(tmp_path / "a", diverged, roles)
    with pytest.raises(ValueError, match="peft has no file for"):
        hf_peft.save(tmp_path / "a", params, roles)
    assert flat and not (tmp_path / "a").exists()


# Damaged folders: one error each, that says what is wrong


def edited(change):
    def damage(folder):
        tensors = load_file(folder / TENSORS)
        first = sorted(tensors)[0]
        change(tensors, first)
        save_file(tensors, folder / TENSORS)

    return damage


def put(name, value):
    return lambda tensors, first: tensors.__setitem__(name or first, value(tensors[first]))


def page(**changes):
    def damage(folder):
        found = json.loads((folder / CONFIG).read_text())
        for key, value in changes.items():
            found.pop(key) if value is ... else found.__setitem__(key, value)
        (folder / CONFIG).write_text(json.dumps(found))

    return damage


def cut(file, share):
    def damage(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return damage


def overwrite(file, at, data):
    def damage(folder):
        found = bytearray((folder / file).read_bytes())
        found[at : at + len(data)] = data
        (folder / file).write_bytes(bytes(found))

    return damage


def twice(folder):
    """A tensor stands in the header a second time, with the same numbers."""
    data = (folder / TENSORS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().rstrip()
    at = re.search(r'"base_model[^{]*[{][^}]*[}]', header)
    more = "{" + at[0] + "," + header[1:]
    (folder / TENSORS).write_bytes(len(more).to_bytes(8, "little") + more.encode() + data[8 + size :])


def twice_apart(folder):
    """A tensor stands in the header a second time, with numbers of its own."""
    tensors = load_file(folder / TENSORS)
    save_file(tensors | {"a" * len(Q + "lora_A.weight"): tensors[Q + "lora_A.weight"] + 1}, folder / TENSORS)
    data = (folder / TENSORS).read_bytes()
    name = Q + "lora_A.weight"
    (folder / TENSORS).write_bytes(data.replace(b"a" * len(name), name.encode()))


Q = "base_model.model.bert.encoder.layer.0.attention.self.query."
DAMAGES = {
    **{f"tensors cut to {k} of 24": cut(TENSORS, k / 24) for k in range(24)},
    **{f"page cut to {k} of 24": cut(CONFIG, k / 24) for k in range(24)},
    **{f"header length {n}": overwrite(TENSORS, 0, n.to_bytes(8, "little")) for n in (0, 1, 7, 2**20, 2**40, 2**63)},
    **{f"byte {k} of the header is wrong": overwrite(TENSORS, k, b"\xff") for k in range(8, 40, 4)},
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "no page": lambda folder: (folder / CONFIG).unlink(),
    "empty tensors": lambda folder: (folder / TENSORS).write_bytes(b""),
    "tensors are text": lambda folder: (folder / TENSORS).write_text("git-lfs pointer"),
    "page is a list": lambda folder: (folder / CONFIG).write_text("[]"),
    "page is a number": lambda folder: (folder / CONFIG).write_text("3"),
    "page is no JSON": lambda folder: (folder / CONFIG).write_text("r: 2"),
    "page is bytes": lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"),
    "page of another library": lambda folder: (folder / CONFIG).write_text('{"model_type": "bert", "hidden_size": 16}'),
    "page with a key twice": lambda folder: (folder / CONFIG).write_text('{"r": 2, "r": 4}'),
    "page nested deeply": lambda folder: (folder / CONFIG).write_text("[" * 100_000),
    "a tensor that stands twice": twice,
    "a tensor that stands twice, with other numbers": twice_apart,
    **{f"{n} tensors missing": edited(lambda t, _, n=n: [t.pop(k) for k in sorted(t)[:n]]) for n in (1, 2, 5)},
    "all tensors missing": edited(lambda t, _: t.clear()),
    "a tensor too many": edited(put(Q + "lora_C.weight", np.copy)),
    "a tensor of a layer that is not there": edited(put(Q.replace("layer.0", "layer.9") + "lora_A.weight", np.copy)),
    "no prefix": edited(lambda t, f: t.__setitem__(f.removeprefix("base_model.model."), t.pop(f))),
    "the adapter's name inside": edited(lambda t, f: t.__setitem__(f.replace(".weight", ".default.weight"), t.pop(f))),
    "a NaN": edited(put(None, lambda x: np.full_like(x, np.nan))),
    "an infinity": edited(put(None, lambda x: np.full_like(x, np.inf))),
    "turned": edited(lambda t, f: t.__setitem__(Q + "lora_A.weight", np.ascontiguousarray(t[Q + "lora_A.weight"].T))),
    "flat": edited(put(None, np.ravel)),
    "an axis more": edited(put(None, lambda x: x[None])),
    "empty": edited(put(None, lambda x: x[:0])),
    "a scalar": edited(put(None, lambda x: np.array(x.ravel()[0]))),
    "A and B exchanged": edited(
        lambda t, f: t.update(
            {Q + "lora_A.weight": t[Q + "lora_B.weight"], Q + "lora_B.weight": t[Q + "lora_A.weight"]}
        )
    ),
    **{
        f"numbers of {d}": edited(put(None, lambda x, d=d: x.astype(d)))
        for d in ("int32", "int8", "bool", "float64", "uint8")
    },
    **{f"r is {v!r}": page(r=v) for v in (0, -1, 17, 3, 4, 2.5, "2", None, True, [2], 10**12)},
    **{f"lora_alpha is {v!r}": page(lora_alpha=v) for v in ("8", None, [], True, float("nan"), float("inf"), 1e300)},
    **{f"peft_type is {v!r}": page(peft_type=v) for v in (..., None, "LORRA", "lora", 3, [], "XLORA")},
    **{
        f"target_modules is {v!r}": page(target_modules=v)
        for v in (..., None, [], "", ["qurey"], "(", 3, [3], ["dropout"])
    },
    "target_modules names more": page(target_modules=["query", "value", "key"]),
    "target_modules names fewer": page(target_modules=["query"]),
    "modules_to_save names more": page(modules_to_save=["classifier", "pooler"]),
    "modules_to_save names fewer": page(modules_to_save=[]),
    "modules_to_save is a number": page(modules_to_save=3),
    **{f"bias is {v!r}": page(bias=v) for v in ("some", None, True, "all", "lora_only")},
    **{
        f"rank_pattern is {v!r}": page(rank_pattern=v)
        for v in ({"query": 4}, {"query": "2"}, ["query"], {"query": 0}, {"(": 2})
    },
    **{f"alpha_pattern is {v!r}": page(alpha_pattern=v) for v in ({"(": 2}, {"query": None}, "query")},
    **{f"{k} is '('": page(**{k: "("}) for k in ("exclude_modules", "layers_pattern")},
    **{f"layers_to_transform is {v!r}": page(layers_to_transform=v) for v in ([0], 1, "0", [9])},
    **{f"init is {v!r}": page(init_lora_weights=v) for v in ("corda", "loftq", 1, 0)},
    **{k: page(**{k: True}) for k in ("use_qalora", "use_bdlora", "lora_bias_of_mine", "trainable_things")},
    "a setting of another method": page(loftq_config={"bits": 4}),
    "another base": lambda folder: None,
}


# What is no regex where peft reads one: an adapter, the key, and its value.
BROKEN = {
    **{
        f"{adapter}'s {key}": (adapter, key, {"(": 2})
        for adapter in ("lora", "loha", "lokr")
        for key in ("rank_pattern", "alpha_pattern")
    },
    **{
        f"{adapter}'s {key}": (adapter, key, "(")
        for adapter in ("lora", "ia3", "ln", "vera", "oft")
        for key in ("target_modules", "exclude_modules")
    },
    **{f"LoRA's layers_pattern {v!r}": ("lora", "layers_pattern", v) for v in ("(", ["layer", "("])},
    **{f"{adapter}'s modules_to_save": (adapter, "modules_to_save", ["("]) for adapter in ("lora", "ia3", "ln")},
    "IA3's feedforward_modules": ("ia3", "feedforward_modules", "("),
    "a flag in the middle": ("lora", "rank_pattern", {"(?i)query": 2}),
    "a number that is too large": ("lora", "alpha_pattern", {"q{99999999999}": 2}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_regex_is_named(case, tmp_path):
    adapter, key, value = BROKEN[case]
    _, params, roles, _, _ = golden.model("bert")
    golden.repaged("bert", adapter, tmp_path / "a", **{key: value})
    for read in (hf_peft.load, hf_peft.method):
        with pytest.raises(ValueError, match=f"{key} has .*, which is no regex: ") as caught:
            read(tmp_path / "a", params, roles)
        assert str(tmp_path / "a") in str(caught.value)


def test_there_are_enough_of_them():
    assert len(DAMAGES) > 130


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_clear_error(damage, tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    folder = tmp_path / "adapter"
    shutil.copytree(golden.GOLDEN / "bert" / "lora", folder)
    DAMAGES[damage](folder)
    if damage == "another base":
        _, params, roles, _, _ = golden.model("llama")
    with pytest.raises(ValueError) as caught:
        hf_peft.load(folder, params, roles)
    assert str(folder) in str(caught.value)


def test_all_faults_of_a_file_are_listed_at_once(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    shutil.copytree(golden.GOLDEN / "bert" / "lora", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / TENSORS)
    tensors[Q + "lora_A.wieght"] = tensors.pop(Q + "lora_A.weight")
    tensors[Q + "lora_B.weight"] = tensors[Q + "lora_B.weight"].T.copy()
    tensors["base_model.model.classifier.bias"][:] = np.nan
    save_file(tensors, tmp_path / "a" / TENSORS)
    with pytest.raises(ValueError) as caught:
        hf_peft.load(tmp_path / "a", params, roles)
    for fault in (
        "missing: " + Q + "lora_A.weight [2,16]",
        "unknown: " + Q + "lora_A.wieght",
        "shape: " + Q + "lora_B.weight is [2,16], expected [16,2]",
        "not finite",
    ):
        assert fault in str(caught.value)


def both(*damages):
    def damage(folder):
        for each in damages:
            each(folder)

    return damage


TURNED = edited(lambda t, f: t.__setitem__(Q + "lora_B.weight", t[Q + "lora_B.weight"].T.copy()))
TOGETHER = {
    "an option that is not supported, and another rank": (
        page(use_qalora=True, r=4),
        ["use_qalora=True is not supported", "shape: " + Q + "lora_A.weight is [2,16], expected [4,16]"],
    ),
    "an option of a wrong type, and a NaN": (
        both(page(r="2", qlora=True), edited(put(None, lambda x: np.full_like(x, np.nan)))),
        ["r is '2', expected an integer", "qlora=True is not supported", "fits no model:\n  not finite: "],
    ),
    "an option of a wrong type, and no tensors": (
        both(page(bias=3), lambda folder: (folder / TENSORS).unlink()),
        ["bias is 3, expected one of", "adapter_model.safetensors is missing"],
    ),
    "no page, and no tensors": (
        lambda folder: [(folder / name).unlink() for name in (TENSORS, CONFIG)],
        ["has no adapter_config.json", "adapter_model.safetensors is missing"],
    ),
    "another method, and a tensor that stands twice": (
        both(page(peft_type="LORRA"), twice),
        ["peft_type is 'LORRA'", "more than once"],
    ),
    "modules that are not there, and a tensor that stands twice": (
        both(page(target_modules=["qurey"]), twice),
        ["target_modules=['qurey'] names no module", "more than once"],
    ),
    **{
        f"{damage.__name__}, and a tensor that is turned": (
            both(TURNED, damage, page(use_qalora=True)),
            ["use_qalora", "stands in the file more than once", "shape: " + Q + "lora_B.weight is [2,16]"],
        )
        for damage in (twice, twice_apart)
    },
}


@pytest.mark.parametrize("case", TOGETHER)
def test_faults_of_page_and_tensors_are_one_error(case, tmp_path):
    damage, said = TOGETHER[case]
    _, params, roles, _, _ = golden.model("bert")
    shutil.copytree(golden.GOLDEN / "bert" / "lora", tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError) as caught:
        hf_peft.load(tmp_path / "a", params, roles)
    assert [fault for fault in said if fault not in str(caught.value)] == []
    assert "missing: " not in str(caught.value)


HEAD = "base_model.classifier.weight"
SOFT_DAMAGES = {
    **{f"tensors cut to {k} of 6": cut(TENSORS, k / 6) for k in range(6)},
    **{f"page cut to {k} of 6": cut(CONFIG, k / 6) for k in range(6)},
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "no page": lambda folder: (folder / CONFIG).unlink(),
    "no embeddings": edited(lambda t, f: t.pop("prompt_embeddings")),
    "no head": edited(lambda t, f: t.pop(HEAD)),
    "a prefix": edited(lambda t, f: t.__setitem__("base_model.prompt_embeddings", t.pop("prompt_embeddings"))),
    "a longer prefix": edited(lambda t, f: t.__setitem__(HEAD.replace(".", ".model.", 1), t.pop(HEAD))),
    "the network's weights": edited(put("prompt_encoder.default.embedding.weight", np.copy)),
    **{
        f"embeddings are {what}": edited(put("prompt_embeddings", change))
        for what, change in {
            "of a token more": lambda x: np.ones((6, 16), np.float32),
            "of as many features as tokens": lambda x: np.ones((5, 5), np.float32),
            "turned": lambda x: np.ones((16, 5), np.float32),
            "flat": lambda x: np.ones(80, np.float32),
            "empty": lambda x: np.ones((0, 16), np.float32),
            "not finite": lambda x: np.full((5, 16), np.nan, np.float32),
            "whole numbers": lambda x: np.ones((5, 16), np.int32),
        }.items()
    },
    **{
        f"{key} is {v!r}": page(**{key: v})
        for key, values in {
            "num_virtual_tokens": (..., None, 0, -1, 4, 10, 2.5, "5", True, [5]),
            "num_transformer_submodules": (0, 2, 3, "1", True),
            "token_dim": (8, 0, "16", 2.0),
            "peft_type": (..., None, "PROMPT", "prompt_tuning", "CPT", "MULTITASK_PROMPT_TUNING"),
            "modules_to_save": ([], ["classifier", "pooler"], 3, ["nothing"]),
            "task_type": (3, ["SEQ_CLS"]),
            "num_layers": (0, "2"),
            "num_attention_heads": (-1, 4.0),
            "target_modules": (["query"],),
        }.items()
        for v in values
    },
    "another base": lambda folder: None,
}


@pytest.mark.parametrize("damage", SOFT_DAMAGES)
@pytest.mark.parametrize("adapter", golden.SOFT)
def test_a_damaged_folder_of_virtual_tokens_is_one_clear_error(adapter, damage, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(golden.GOLDEN / "bert" / adapter, folder)
    SOFT_DAMAGES[damage](folder)
    _, params, roles, _, _ = golden.model("llama" if damage == "another base" else "bert")
    with pytest.raises(ValueError) as caught:
        hf_peft.load(folder, params, roles)
    assert str(folder) in str(caught.value)
