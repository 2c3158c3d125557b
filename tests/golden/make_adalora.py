"""Writes `llama/adalora_pruned` and `adalora_steps.npz`: Hugging Face peft's AdaLoRA, trained for some steps.

    python tests/golden/make_adalora.py      # with torch, transformers 4.57 and peft 0.21.2

The steps hold the start (`start/<tensor>`), and after each step the entries of E (`e/<step>/<module>`) and the ranks that
peft keeps (`kept/<step>/<module>`). Plain gradient descent at `LR` on the base's own ids, from random numbers; `CONFIG`
says the rest.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from peft import AdaLoraConfig, get_peft_model
from safetensors.numpy import load_file

GOLDEN = pathlib.Path(__file__).parent
LR, STEPS = 0.3, 14
CONFIG = dict(init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=STEPS, lora_alpha=8, beta1=0.7, beta2=0.8)


def main() -> None:
    given = np.load(GOLDEN / "llama" / "base" / "ref.npz")
    ids = torch.tensor(given["input_ids"])
    base = transformers.LlamaForCausalLM.from_pretrained(GOLDEN / "llama" / "base")
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **CONFIG)
    tuned = get_peft_model(base, config)
    with torch.no_grad():
        for name, p in tuned.named_parameters():  # far from where they start, so that every rank matters
            if ".lora_" in name:
                p.normal_(0, 0.3)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        steps = {f"start/{k}": x for k, x in load_file(pathlib.Path(folder) / "adapter_model.safetensors").items()}
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], LR)
    for step in range(STEPS):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        tuned.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        for name, e in tuned.named_parameters():
            if ".lora_E." in name:
                module = name.removeprefix("base_model.model.").partition(".lora_E")[0]
                steps[f"e/{step}/{module}"] = e.detach().numpy().ravel().copy()
                flags = (tuned.peft_config["default"].rank_pattern or {}).get(f"{module}.lora_E.default")
                steps[f"kept/{step}/{module}"] = np.array(flags if flags else [True] * CONFIG["init_r"])
    np.savez_compressed(GOLDEN / "adalora_steps.npz", **steps)
    folder = GOLDEN / "llama" / "adalora_pruned"
    tuned.eval()
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)
    page = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(page, indent=2, sort_keys=True))
    logits = {}
    for kind in ("full", "rightpad", "leftpad"):
        with torch.no_grad():
            logits[f"logits_{kind}"] = tuned(ids, attention_mask=torch.tensor(given[f"mask_{kind}"])).logits.numpy()
    np.savez(folder / "ref.npz", **logits)
    print(page["rank_pattern"])


if __name__ == "__main__":
    main()
