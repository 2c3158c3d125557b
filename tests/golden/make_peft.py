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
    "resnet": transformers.ResNetForImageClassification,
}
BERT, LLAMA, TWO = dict(task_type="SEQ_CLS"), dict(task_type="CAUSAL_LM"), dict(task_type="SEQ_2_SEQ_LM")
CONVOLUTIONS = dict(target_modules=["convolution"], modules_to_save=["classifier"])
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
    "llama/dora_embed": LoraConfig(
        r=2, lora_alpha=6, target_modules=["embed_tokens", "q_proj"], use_dora=True, **LLAMA
    ),
    "llama/lora_layers": LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        exclude_modules=["v_proj"],
        layers_to_transform=[1],
        **LLAMA,
    ),
    "resnet/lora": LoraConfig(r=2, lora_alpha=6, rank_pattern={"shortcut.convolution": 3}, **CONVOLUTIONS),
    "resnet/dora": LoraConfig(r=2, lora_alpha=6, use_dora=True, **CONVOLUTIONS),
    "resnet/ia3": IA3Config(
        target_modules=["0.convolution", "1.convolution"],
        feedforward_modules=["1.convolution"],
        modules_to_save=["classifier"],
    ),
    "resnet/loha": LoHaConfig(r=2, alpha=6, **CONVOLUTIONS),
    "resnet/lokr": LoKrConfig(r=2, alpha=6, **CONVOLUTIONS),
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
    if "pixel_values" in given:
        with torch.no_grad():
            np.savez(folder / "ref.npz", logits_full=model(torch.tensor(given["pixel_values"])).logits.numpy())
        return
    ids = {k: torch.tensor(given[k]) for k in ("input_ids", "decoder_input_ids") if k in given}
    logits = {}
    for mask in ("full", "rightpad", "leftpad"):
        with torch.no_grad():
            out = model(**ids, attention_mask=torch.tensor(given[f"mask_{mask}"]))
        logits[f"logits_{mask}"] = out.logits.numpy()
    np.savez(folder / "ref.npz", **logits)


def make_resnet() -> None:
    """Writes the base of convolutions, with statistics of its norms that are not those of a fresh one."""
    sizes = dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=3)
    torch.manual_seed(0)
    model, folder = BASES["resnet"](transformers.ResNetConfig(**sizes)), GOLDEN / "resnet" / "base"
    pixels = torch.randn(4, 3, 32, 32)
    model.train()(pixels)
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        np.savez(folder / "ref.npz", pixel_values=pixels.numpy(), logits_full=model(pixels).logits.numpy())


if __name__ == "__main__":
    if not (GOLDEN / "resnet" / "base").exists():
        make_resnet()
    for case in sys.argv[1:] or CASES:
        make(case)
