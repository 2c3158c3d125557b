"""AdapterHub's bottleneck adapters: their files give the outputs that AdapterHub gave; what does not fit is named."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from experiments.models import bert
from peftjax.interop import adapterhub
from safetensors.numpy import load_file, save_file

pytest.importorskip("transformers")
from test_adapter import GOLDEN, KINDS, MODELS, loaded

pytestmark = pytest.mark.third_party


@pytest.fixture(scope="module")
def models():
    """Each model with its roles."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = {name: loaded(name) for name in MODELS}
        return {name: (fn, params, args, pj.roles(fn, params, *args)) for name, (fn, params, args) in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_gives_what_adapterhub_gives(name, kind, models):
    fn, params, args, roles = models[name]
    tuned = adapterhub.load(GOLDEN / name / kind, params, roles)
    want = np.load(GOLDEN / name / kind / "ref.npz")["output"]
    error = np.abs(np.asarray(jax.jit(pj.wrap(fn))(tuned, *args)) - want).max() / np.abs(want).max()
    print(f"{name:6} {kind:16} {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_bert_gives_what_adapterhub_gives(kind):
    """Its hidden states, with the adapters on the same paths."""
    folder = GOLDEN / "bert"
    _, params, args = loaded("bert")
    model = bert.Bert(bert.read_config(folder / "base" / "config.json"), "each")
    fn = lambda params, ids, mask: model.apply({"params": params}, ids, mask)[0]
    roles = pj.roles(fn, params, *args)
    tuned = adapterhub.load(folder / kind, params, roles)
    want = np.load(folder / kind / "ref.npz")["output"]
    assert np.abs(np.asarray(jax.jit(pj.wrap(fn))(tuned, *args)) - want).max() <= 1e-5 * np.abs(want).max()


def page(**changes):
    def damage(folder):
        found = json.loads((folder / "adapter_config.json").read_text())
        found["config"].update(changes)
        (folder / "adapter_config.json").write_text(json.dumps(found))

    return damage


def whole_page(**changes):
    def damage(folder):
        found = {**json.loads((folder / "adapter_config.json").read_text()), **changes}
        (folder / "adapter_config.json").write_text(json.dumps(found))

    return damage


def tensors(change):
    def damage(folder):
        found = load_file(folder / "adapter.safetensors")
        change(found, sorted(found)[0])
        save_file(found, folder / "adapter.safetensors")

    return damage


DAMAGES = {
    "an option that is not supported": (page(ln_before=True), "ln_before is True, expected False"),
    "an option that is not known": (page(ln_befor=True), "ln_befor=True is not supported .nearest that is: ln_before"),
    "a Compacter": (page(phm_layer=True), "phm_layer is True, expected False"),
    "a placement of its own": (page(mh_adapter=True, is_parallel=True), r"expected one of \[\(True, False, False\)"),
    "an unknown activation": (page(non_linearity="mish"), "non_linearity is 'mish', expected one of relu"),
    "a reduction for each layer": (page(reduction_factor={"default": 16}), "expected a positive number for all layers"),
    "a width beyond all memory": (page(reduction_factor=1e-300), "reduction_factor is 1e-300, expected a positive number"),
    "another reduction": (page(reduction_factor=2), r"shape: .*adapter_down.0.bias is \[2\], expected \[16\]"),
    "a learned scale of a serial adapter": (page(scaling="learned"), "scaling is 'learned', expected a number"),
    **{f"an activation {v!r}": (page(non_linearity=v), "non_linearity is .*, expected one of") for v in ([], {}, 1)},
    **{
        f"{key} is {v!r}": (page(**{key: v}), f"{key} is {v!r}, expected true or false")
        for key in ("mh_adapter", "is_parallel", "original_ln_before")
        for v in (1, 0, "true", None)
    },
    **{
        f"{key} is {v!r}": (page(**{key: v}), f"{key} is {v!r}, expected ")
        for key, v in (("output_adapter", 1), ("ln_after", 0), ("phm_layer", None), ("stochastic_depth", False))
    },
    **{f"a scale {v!r}": (page(scaling=v), "scaling is .*, expected a number") for v in ("learnt", True, None)},
    "another width": (whole_page(hidden_size=64), "hidden_size is 64, expected 32, the model's features"),
    **{
        f"a width of {v!r}": (whole_page(hidden_size=v), f"hidden_size is {v!r}, expected an integer")
        for v in ("32", 0, True, 32.0)
    },
    **{
        f"an adapter of {v}": (whole_page(model_type=v), f"model_type is '{v}', expected one of bert, .*roberta")
        for v in ("llama", "gpt2", "distilbert", "deberta-v2", "vit", "albert")
    },
    "a type that is no text": (whole_page(model_type=3), "model_type is 3, expected a text"),
    "a layer left out": (page(leave_out=[0]), "unknown: encoder.layer.0"),
    "a layer of a wrong kind": (page(leave_out=["0"]), "leave_out is"),
    "no tensors": (lambda folder: (folder / "adapter.safetensors").unlink(), "is missing"),
    "truncated": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-9]),
        "is damaged",
    ),
    "a missing tensor": (tensors(lambda t, first: t.pop(first)), "missing: encoder.layer.0.output.adapters.t"),
    "a further tensor": (tensors(lambda t, first: t.__setitem__("x", np.ones(2, np.float32))), "unknown: x"),
    "a tensor under two names": (
        tensors(lambda t, first: t.__setitem__(f"bert.{first}", t[first] + 1)),
        "with and without 'bert.' before the name",
    ),
    "a NaN": (tensors(lambda t, first: t.__setitem__(first, t[first] * np.float32("nan"))), "not finite: encoder"),
    "another library's page": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r": 2}'),
        "no adapter's of AdapterHub",
    ),
    "a pickle": (lambda f: (f / "adapter.safetensors").rename(f / "pytorch_adapter.bin"), "`pickles=True` reads it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_clear_error(damage, models, tmp_path):
    _, params, _, roles = models["bert"]
    shutil.copytree(GOLDEN / "bert" / "seq_bn", tmp_path / "a")
    change, message = DAMAGES[damage]
    change(tmp_path / "a")
    with pytest.raises(ValueError, match=message) as caught:
        adapterhub.load(tmp_path / "a", params, roles)
    assert str(tmp_path / "a") in str(caught.value)


def test_faults_of_page_and_tensors_are_one_error(models, tmp_path):
    _, params, _, roles = models["bert"]
    broken = tensors(lambda t, first: t.__setitem__(first, t[first] * np.float32("nan")))
    known, unknown = page(ln_before=True, reduction_factor=2), page(non_linearity=[], ln_before=True)
    for k, (changes, said) in enumerate(
        (
            ([known, whole_page(hidden_size=64)], ["ln_before is True", "hidden_size is 64", "shape: "]),
            ([unknown, broken], ["ln_before is True", "non_linearity is []", "not finite: "]),
        )
    ):
        shutil.copytree(GOLDEN / "bert" / "seq_bn", tmp_path / str(k))
        for change in changes:
            change(tmp_path / str(k))
        with pytest.raises(ValueError) as caught:
            adapterhub.load(tmp_path / str(k), params, roles)
        assert [fault for fault in said if fault not in str(caught.value)] == []


@pytest.mark.parametrize("first,kind", [("bert", "roberta"), ("roberta", "bert"), ("roberta", "electra")])
def test_names_that_begin_with_a_type_say_the_model(first, kind, models, tmp_path):
    """BERT, RoBERTa and ELECTRA have the same modules; what cannot be told apart, or is not known, is read."""
    fn, params, args, _ = models["bert"]
    params = {first: params}
    roles = pj.roles(lambda params, *args: fn(params[first], *args), params, *args)
    shutil.copytree(GOLDEN / "bert" / "seq_bn", tmp_path / "a")
    tensors(lambda t, _: [t.__setitem__(f"{first}.{k}", t.pop(k)) for k in list(t)])(tmp_path / "a")
    for fits in (first, "a-model-of-tomorrow", None):
        whole_page(model_type=fits)(tmp_path / "a")
        assert pj.extract(adapterhub.load(tmp_path / "a", params, roles))
    whole_page(model_type=kind)(tmp_path / "a")
    with pytest.raises(ValueError, match=f"model_type is '{kind}', expected one of .*{first}"):
        adapterhub.load(tmp_path / "a", params, roles)


def test_layers_left_out_hold_no_adapter(models, tmp_path):
    _, params, _, roles = models["bert"]
    shutil.copytree(GOLDEN / "bert" / "seq_bn", tmp_path / "a")
    page(leave_out=[0])(tmp_path / "a")
    tensors(lambda t, _: [t.pop(k) for k in list(t) if ".layer.0." in k])(tmp_path / "a")
    tuned = adapterhub.load(tmp_path / "a", params, roles)
    assert pj.extract(tuned) and all("/layer/1/" in f"/{key}" for key in pj.extract(tuned))
    assert all(jnp.issubdtype(x.dtype, jnp.float32) for x in pj.extract(tuned).values())
