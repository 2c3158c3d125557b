"""Writes golden adapters with Hugging Face peft: `python tests/golden/make_peft.py [name ...]`, in a place that has torch.

Each is trained by nobody: its tensors are moved by random numbers, so that none changes nothing. Beside the adapter lies
`ref.npz`, the logits of the adapted model for the ids and under the masks of its base.
"""

import pathlib
import sys

import numpy as np
import peft
import torch
import transformers
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig

GOLDEN = pathlib.Path(__file__).parent
BASES = {
    "bert": transformers.BertForSequenceClassification,
    "llama": transformers.LlamaForCausalLM,
    "roberta": transformers.RobertaForSequenceClassification,
    "gpt2": transformers.GPT2LMHeadModel,
    "t5": transformers.T5ForConditionalGeneration,
    "bart": transformers.BartForConditionalGeneration,
}
BERT, LLAMA, TWO = dict(task_type="SEQ_CLS"), dict(task_type="CAUSAL_LM"), dict(task_type="SEQ_2_SEQ_LM")
FUSED = dict(r=2, lora_alpha=6, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, **LLAMA)
CASES = {
    "bert/vera": VeraConfig(r=5, target_modules=["query", "intermediate.dense"], bias="vera_only", **BERT),
    "bert/loha": LoHaConfig(
        r=3,
        alpha=6,
        target_modules=["query", "value", "intermediate.dense"],
        rank_pattern={"value": 2},
        alpha_pattern={"layer.1.attention.self.query": 7},
        **BERT,
    ),
    "bert/lora_b_bias": LoraConfig(
        r=2, lora_alpha=6, target_modules=["query", "output.dense"], rank_pattern={"query": 3}, lora_bias=True, **BERT
    ),
    "bert/lokr": LoKrConfig(
        r=1,
        alpha=3,
        target_modules=["query", "value", "intermediate.dense"],
        decompose_factor=8,
        decompose_both=True,
        rank_pattern={"value": 4},
        alpha_pattern={"layer.1.attention.self.query": 7},
        **BERT,
    ),
    "llama/lokr": LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "v_proj", "down_proj"], **LLAMA),
    "llama/loha": LoHaConfig(r=2, alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], **LLAMA),
    "bert/oft": OFTConfig(
        oft_block_size=12,  # which divides neither 16 nor 32: peft takes 8
        target_modules=["query", "output.dense"],
        use_cayley_neumann=False,
        bias="oft_only",
        **BERT,
    ),
    "llama/oft": OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj", "embed_tokens"], **LLAMA),
    "llama/oft_constrained": OFTConfig(
        oft_block_size=4,
        target_modules=["q_proj", "v_proj"],
        use_cayley_neumann=False,
        coft=True,
        eps=0.5,
        block_share=True,
        **LLAMA,
    ),
    "bert/ln": LNTuningConfig(target_modules=["LayerNorm"], **BERT),
    "llama/ln": LNTuningConfig(target_modules=["input_layernorm", "norm"], **LLAMA),
    "roberta/lora": LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], **BERT),
    "roberta/dora": LoraConfig(r=2, lora_alpha=6, target_modules=["query", "output.dense"], use_dora=True, **BERT),
    "roberta/ia3": IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], **BERT
    ),
    "gpt2/lora": LoraConfig(**FUSED),
    "gpt2/dora": LoraConfig(use_dora=True, **FUSED),
    "gpt2/ia3": IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True, **LLAMA
    ),
    # The table is the head as well; peft updates where it is looked up, and not the head.
    "gpt2/lora_tied": LoraConfig(r=2, lora_alpha=6, target_modules=["wte", "c_fc"], fan_in_fan_out=True, **LLAMA),
    "t5/lora": LoraConfig(r=2, lora_alpha=6, target_modules=["q", "v"], **TWO),
    "bart/lora": LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], **TWO),
}


def make(case: str) -> None:
    """Writes one adapter."""
    name, folder = case.split("/")[0], GOLDEN / case
    torch.manual_seed(0)
    base = BASES[name].from_pretrained(GOLDEN / name / "base")
    base.name_or_path = None
    model = peft.get_peft_model(base, CASES[case]).eval()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    given = np.load(GOLDEN / name / "base" / "ref.npz")
    ids = {k: torch.tensor(given[k]) for k in ("input_ids", "decoder_input_ids") if k in given}
    logits = {}
    for mask in ("full", "rightpad", "leftpad"):
        with torch.no_grad():
            out = model(**ids, attention_mask=torch.tensor(given[f"mask_{mask}"]))
        logits[f"logits_{mask}"] = out.logits.numpy()
    np.savez(folder / "ref.npz", **logits)


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
