"""Adapters: AdapterHub's saved files on unmodified models, the equations at tiny sizes, and what is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax as pj
from peftjax.paths import flatten

GOLDEN = pathlib.Path(__file__).parent / "golden" / "adapterhub"
KINDS = {"double_seq_bn": "houlsby", "seq_bn": "pfeiffer", "par_bn": "parallel", "scaled_par_bn": "scaled_parallel"}
MODELS = {
    "bert": ("BertConfig", "FlaxBertModel", "last_hidden_state"),
    "llama": ("LlamaConfig", "FlaxLlamaForCausalLM", "logits"),
}


def loaded(name):
    """A model of transformers as a function of its saved parameters, and the arguments of the saved results."""
    transformers = pytest.importorskip("transformers")
    config, model, output = MODELS[name]
    config = getattr(transformers, config).from_json_file(GOLDEN / name / "base" / "config.json")
    model = getattr(transformers, model)(config, _do_init=False)
    saved = load_file(GOLDEN / name / "base" / "model.safetensors")

    def weight(keys, leaf):
        *module, last = (key.key for key in keys)
        w = saved[".".join((*module, "bias" if last == "bias" else "weight"))]
        return jnp.asarray(w.T if last == "kernel" else w)

    params = jax.tree_util.tree_map_with_path(weight, model.params_shape_tree)
    base = np.load(GOLDEN / name / "base" / "ref.npz")
    fn = lambda params, ids, mask: model(ids, attention_mask=mask, params=params, train=False)[output]
    return fn, params, (jnp.asarray(base["input_ids"]), jnp.asarray(base["mask"]))


def filled(name, tuned, tensors):
    """The tree with the tensors of a file of AdapterHub's, each of which has to be used."""
    flat, used = {}, set()
    for key in pj.extract(tuned):
        path, _, field = key.rpartition("/")
        *module, _ = path.split("/")
        if name == "bert":
            module = [*module[:-1], "adapters", "t"]
        else:
            module = [
                *module[:-2],
                {"o_proj": "attention", "down_proj": "output"}[module[-1]] + "_adapters",
                "adapters",
                "t",
            ]
        end = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias", "up": "adapter_up.weight",
               "up_bias": "adapter_up.bias", "gate": "scaling"}[field]  # fmt: skip
        saved = ".".join((*module, end))
        used.add(saved)
        flat[key] = tensors[saved].reshape(()) if field == "gate" else tensors[saved].T
    assert used == set(tensors)
    return pj.insert(tuned, flat)


@pytest.mark.third_party
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_adapterhub(name, kind):
    fn, params, args = loaded(name)
    folder = GOLDEN / name / kind
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    reduction, activation = config["reduction_factor"], config["non_linearity"]
    scale = config["scaling"] if config["scaling"] != "learned" else None
    method = pj.adapter(KINDS[kind], reduction=reduction, activation=activation, scale=scale)
    apply, fresh = pj.attach(method, fn, params, *args, key=jax.random.key(0))
    tuned = filled(name, fresh, load_file(folder / "adapter.safetensors"))
    want = np.load(folder / "ref.npz")["output"]
    error = np.abs(np.asarray(jax.jit(apply)(tuned, *args)) - want).max() / np.abs(want).max()
    assert error < 1e-5
    base = fn(params, *args)
    assert np.abs(want - base).max() > 1e-2 * np.abs(want).max()
    np.testing.assert_allclose(jax.jit(apply)(pj.disable(tuned), *args), base, atol=1e-6 * np.abs(base).max())
