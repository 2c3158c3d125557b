"""Writes the adapters of trained tokens: Hugging Face peft's TrainableTokens, and LoRA with `trainable_token_indices`.

    python tests/golden/make_tokens.py      # with torch, transformers 4.57 and peft 0.21.2

`llama/tokens`, `llama/lora_tokens` (a list) and `llama/lora_tokens_head` (a table and a head) are for the base that lies
there. `tied/base` is a smaller Llama whose head is its table, `tied/tokens` and `tied/lora_tokens` are for it. What trains
is moved by random numbers, so that none is a no-op.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file

GOLDEN = pathlib.Path(__file__).parent
LLAMA = transformers.LlamaForCausalLM
MASKS = ("full", "rightpad", "leftpad")
LORA = dict(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ADAPTERS = {
    "llama/tokens": TrainableTokensConfig(token_indices=[7, 0, 30], task_type="CAUSAL_LM"),
    "llama/lora_tokens": LoraConfig(trainable_token_indices=[5, 2], **LORA),
    "llama/lora_tokens_head": LoraConfig(
        trainable_token_indices={"embed_tokens": [1, 9], "lm_head": [9, 3, 4]}, **LORA
    ),
    "tied/tokens": TrainableTokensConfig(token_indices=[4, 11], task_type="CAUSAL_LM"),
    "tied/lora_tokens": LoraConfig(trainable_token_indices=[11, 3, 0], **LORA),
}


def main() -> None:
    make_tied()
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        base = GOLDEN / name.partition("/")[0] / "base"
        model = LLAMA.from_pretrained(base)
        tuned = get_peft_model(model, config)
        with torch.no_grad():
            for p in tuned.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.3)
        write(GOLDEN / name, tuned.eval(), np.load(base / "ref.npz"))


def make_tied() -> None:
    """A base whose head is its table, with ids, masks and its own logits."""
    torch.manual_seed(100)
    folder, llama = GOLDEN / "tied" / "base", GOLDEN / "llama" / "base"
    sizes = dict(vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    config = transformers.LlamaConfig.from_pretrained(llama, tie_word_embeddings=True, **sizes, **heads)
    model = LLAMA(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    given = np.load(llama / "ref.npz")
    ids = torch.tensor(np.random.default_rng(0).integers(0, 12, given["input_ids"].shape))
    masks = {f"mask_{kind}": given[f"mask_{kind}"] for kind in MASKS}
    np.savez(folder / "ref.npz", input_ids=ids.numpy(), **masks, **logits(model, {"input_ids": ids.numpy(), **masks}))


def write(folder: pathlib.Path, tuned, given) -> None:
    """The adapter as peft saves it, without where its base lay, and its logits."""
    shutil.rmtree(folder, ignore_errors=True)
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)
    page = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(page, indent=2, sort_keys=True))
    np.savez(folder / "ref.npz", **logits(tuned, given))
    print(folder.name, {k: list(v.shape) for k, v in load_file(folder / "adapter_model.safetensors").items()})


def logits(model, given) -> dict[str, np.ndarray]:
    """The logits under each mask."""
    ids, made = torch.tensor(given["input_ids"]), {}
    for kind in MASKS:
        with torch.no_grad():
            made[f"logits_{kind}"] = model(ids, attention_mask=torch.tensor(given[f"mask_{kind}"])).logits.numpy()
    return made


if __name__ == "__main__":
    main()
