"""Writes golden folders with torch and Hugging Face peft: `python tests/golden_write.py [name ...]`.

    gpt2, t5, bart    tiny models of random numbers, with a prompt and a prefix each
    roberta           another, for `golden/make_peft.py`

`base` holds `config.json`, `model.safetensors`, and the inputs in `ref.npz`; an adapter's `ref.npz` holds its logits under
each mask. Trained tensors are moved away from where they start.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

HERE = pathlib.Path(__file__).parent / "golden"
VOCAB, LENGTH, SHORT, N = 40, 7, 5, 5
MODELS = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=24),
        "CAUSAL_LM",
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, relative_attention_num_buckets=8,
            relative_attention_max_distance=12, decoder_start_token_id=0
        ),
        "SEQ_2_SEQ_LM",
    ),
    "bart": (
        transformers.BartForConditionalGeneration,
        transformers.BartConfig(
            vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24
        ),
        "SEQ_2_SEQ_LM",
    ),
    "roberta": (
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=24, type_vocab_size=1, num_labels=3
        ),
        "SEQ_CLS",
    ),
}  # fmt: skip
SOFT = (("prompt", PromptTuningConfig), ("prefix", PrefixTuningConfig))


def masks() -> dict[str, np.ndarray]:
    """No padding, padding after, and padding before."""
    full = np.ones((2, LENGTH), np.int64)
    right, left = full.copy(), full.copy()
    right[1, 4:], left[1, :3] = 0, 0
    return {"full": full, "rightpad": right, "leftpad": left}


def logits(model, ids, mask, decoder_ids):
    """The model's logits; padding of a decoder's own ids does not occur."""
    more = {} if decoder_ids is None else {"decoder_input_ids": torch.tensor(decoder_ids)}
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **more).logits.numpy()


def write(name: str) -> None:
    """The folders of one model."""
    kind, config, task = MODELS[name]
    torch.manual_seed(0)
    base, rng = kind(config).eval(), np.random.default_rng(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ids = rng.integers(3, VOCAB, (2, LENGTH))
    decoder_ids = rng.integers(3, VOCAB, (2, SHORT)) if task == "SEQ_2_SEQ_LM" else None
    folder = HERE / name / "base"
    base.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    inputs = {"input_ids": ids, **{f"mask_{k}": mask for k, mask in masks().items()}}
    inputs |= {} if decoder_ids is None else {"decoder_input_ids": decoder_ids}
    np.savez(
        folder / "ref.npz", **inputs, **{f"logits_{k}": logits(base, ids, m, decoder_ids) for k, m in masks().items()}
    )
    for adapter, options in () if task == "SEQ_CLS" else SOFT:
        torch.manual_seed(1)
        tuned = get_peft_model(kind.from_pretrained(folder), options(task_type=task, num_virtual_tokens=N)).eval()
        tuned.save_pretrained(HERE / name / adapter)
        (HERE / name / adapter / "README.md").unlink()
        found = {f"logits_{k}": logits(tuned, ids, mask, decoder_ids) for k, mask in masks().items()}
        np.savez(HERE / name / adapter / "ref.npz", **found)
        page = HERE / name / adapter / "adapter_config.json"
        page.write_text(
            json.dumps(json.loads(page.read_text()) | {"base_model_name_or_path": None}, indent=2, sort_keys=True)
        )


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        write(name)
