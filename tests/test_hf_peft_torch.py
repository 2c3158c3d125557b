"""What peftjax writes, Hugging Face peft loads without a warning, and gives the same logits: needs torch and peft."""

import json
import os
import warnings

import golden_models as golden
import numpy as np
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
    known = dict(heads=golden.KEY_HEADS.get(model), **golden.rotary(model, adapter))
    hf_peft.save(tmp_path / "a", loaded(model, adapter), roles, task_type=task, **known)
    base = torch_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Unsupported layer type")  # what peft says of every norm that it trains
        # Peft takes AdaLoRA's pattern, in its own files too, for one of LoRA's ranks; what it reads is right.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys .*lora_E")
        tuned = peft.PeftModel.from_pretrained(base, os.fspath(tmp_path / "a")).eval()
    given = np.load(golden.GOLDEN / model / "base" / "ref.npz")
    more = {"decoder_input_ids": torch.tensor(given["decoder_input_ids"])} if model in golden.SEQ2SEQ else {}
    reference = np.load(golden.GOLDEN / model / adapter / "ref.npz")
    for kind, mask in masks.items():
        with torch.no_grad():
            got = tuned(
                torch.tensor(np.asarray(ids)), attention_mask=torch.tensor(np.asarray(mask)), **more
            ).logits.numpy()
        want = reference[f"logits_{kind}"]
        assert got.shape == want.shape
        decoder = want.ndim == 3 and model not in golden.SEQ2SEQ
        if decoder:  # peft keeps the rows of prompts
            got, want = (x[:, x.shape[1] - ids.shape[1] :] for x in (got, want))
        real = np.asarray(mask)[:, :, None] if decoder else 1
        assert np.abs((got - want) * real).max() <= 1e-5 * np.abs(want).max(), kind
