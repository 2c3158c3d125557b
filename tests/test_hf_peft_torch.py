"""What peftjax writes, Hugging Face peft loads without a warning, and gives the same logits: needs torch and peft."""

import json
import os
import warnings

import golden_models as golden
import jax
import numpy as np
import peftjax as pj
import pytest
from test_hf_peft import CONFIG, WRITTEN, loaded

from peftjax.interop import hf_peft

torch = pytest.importorskip("torch", reason="needs torch: pip install 'peftjax[interop]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'peftjax[interop]'")
pytestmark = pytest.mark.third_party


def torch_model(name):
    """The base in torch."""
    import transformers

    kind = getattr(transformers, golden.KINDS[name][1].removeprefix("Flax"))
    return kind.from_pretrained(golden.GOLDEN / name / "base").eval()


@pytest.mark.parametrize("model,adapter", WRITTEN)
def test_peft_loads_what_is_written(model, adapter, tmp_path):
    _, _, roles, ids, masks = golden.model(model)
    task = json.loads((golden.GOLDEN / model / adapter / CONFIG).read_text())["task_type"]
    known = dict(heads=golden.KEY_HEADS.get(model), **golden.known(model, adapter))
    hf_peft.save(tmp_path / "a", loaded(model, adapter), roles, task_type=task, **known)
    base = torch_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if adapter == "ln":  # what peft says of every norm that it trains
            warnings.filterwarnings("ignore", "Unsupported layer type")
        # Peft takes AdaLoRA's pattern, in its own files too, for one of LoRA's ranks; what it reads is right.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys .*lora_E")
        tuned = peft.PeftModel.from_pretrained(base, os.fspath(tmp_path / "a")).eval()
    given = np.load(golden.GOLDEN / model / "base" / "ref.npz")
    more = {k: torch.tensor(v) for k, v in given.items() if k in ("input_ids", "decoder_input_ids", "pixel_values")}
    reference = np.load(golden.GOLDEN / model / adapter / "ref.npz")
    for kind, mask in masks.items():
        masked = {} if mask is None else {"attention_mask": torch.tensor(np.asarray(mask))}
        with torch.no_grad():
            got = tuned(**more, **masked).logits.numpy()
        want = reference[f"logits_{kind}"]
        assert got.shape == want.shape
        decoder = want.ndim == 3 and model not in golden.SEQ2SEQ
        if decoder:  # peft keeps the rows of prompts
            got, want = (x[:, x.shape[1] - ids.shape[1] :] for x in (got, want))
        real = np.asarray(mask)[:, :, None] if decoder else 1
        assert np.abs((got - want) * real).max() <= 1e-5 * np.abs(want).max(), kind


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["prompt", "ptuning", "prefix", "prefix of a network"])
def test_peft_runs_virtual_tokens_that_were_trained_here(model, kind, tmp_path):
    _, params, roles, ids, masks = golden.model(model)
    table = {"bert": "word_embeddings", "llama": "embed_tokens", "gpt2": "wte"}[model]
    more = dict(targets=("c_attn",), features=((16, 48),)) if model == "gpt2" else {}
    method = {
        "prompt": lambda: pj.prompt(4, targets=(table,)),
        "ptuning": lambda: pj.p_tuning(4, 6, targets=(table,)),
        "prefix": lambda: pj.prefix(4, std=1.0, **more),
        "prefix of a network": lambda: pj.prefix(4, hidden=6, std=1.0, **more),
    }[kind]()
    tuned = pj.scale(method.init(jax.random.key(0), params, roles), 0.5)
    adapter, known = kind.split()[0], golden.known(model, kind.split()[0])
    task = "SEQ_CLS" if model == "bert" else "CAUSAL_LM"
    hf_peft.save(tmp_path / "a", tuned, roles, task_type=task, heads=golden.KEY_HEADS[model], **known)
    base = torch_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(base, os.fspath(tmp_path / "a")).eval()
    for mask in masks.values():
        with torch.no_grad():
            got = theirs(torch.tensor(np.asarray(ids)), attention_mask=torch.tensor(np.asarray(mask))).logits.numpy()
        want = np.asarray(golden.wrapped(model, adapter)(tuned, ids, mask))
        got, real = (got[:, -ids.shape[1] :], np.asarray(mask)[..., None]) if got.ndim == 3 else (got, 1)
        assert np.abs((got - want) * real).max() <= 1e-5 * np.abs(want).max()
