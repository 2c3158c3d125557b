"""Prompts as Hugging Face peft saves them: prompt tuning, and P-tuning, of which it keeps what its network puts out."""

import dataclasses
from typing import Any, Iterator, Sequence

import jax.numpy as jnp

from peftjax.interop import config
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Format, Options, Tuned, trained_whole
from peftjax.interop.names import Spot
from peftjax.interop.slots import Block, Part, Slot
from peftjax.method import Method
from peftjax.methods.p_tuning import PTuning
from peftjax.methods.prompt import prompt
from peftjax.token_table import Prompt

TENSOR, PREFIX = "prompt_embeddings", "base_model."
SEQ2SEQ = "SEQ_2_SEQ_LM"
SHARED = {
    "num_virtual_tokens": config.whole(None, least=1, needed=True),
    "num_transformer_submodules": config.one_of(None, None, 1, 2),
    "token_dim": config.whole(None, least=1),
    "num_attention_heads": config.whole(None, least=1),
    "num_layers": config.whole(None, least=1),
    "modules_to_save": config.listed(),
    "task_type": config.text(),
}
# How a prompt started, and the network that made it: what trains goes on from the prompt itself.
OPTIONS = {
    **SHARED,
    "prompt_tuning_init": config.one_of("RANDOM", "RANDOM", "TEXT", "SAMPLE_VOCAB"),
    "prompt_tuning_init_text": config.text(),
    "tokenizer_name_or_path": config.text(),
    "tokenizer_kwargs": config.Option({}, lambda x: x is None or isinstance(x, dict), "a table"),
}
NETWORK = {
    **SHARED,
    "encoder_reparameterization_type": config.one_of("MLP", "MLP", "LSTM"),
    "encoder_hidden_size": config.whole(None, least=1),
    "encoder_num_layers": config.whole(2, least=1),
    "encoder_dropout": config.number(0.0),
}


def method(options: Options, base: Base) -> list[Method]:
    """A prompt on the table of words, and training of the modules to save."""
    spot, width = base.words("a prompt's rows"), options["token_dim"]
    features = spot.shape[spot.role.axes.index("o")]
    if width not in (None, features):
        raise ValueError(f"token_dim is {width}, expected {features}: {spot.name} has as many features")
    if options["num_transformer_submodules"] == 2 and options["task_type"] not in (None, SEQ2SEQ):
        raise ValueError(
            f"num_transformer_submodules is 2 with the task {options['task_type']}, expected 1: a model of this task "
            "reads one prompt"
        )
    made = prompt(options["num_virtual_tokens"], targets=regex([spot.path]))
    return [made, *trained_whole(options, base, ())]


def parts(x: Prompt, spot: Spot) -> Iterator[Part]:
    """P is (n, D)."""
    yield Part("prompt", TENSOR, ("rows", "o"))


def placed(slots: list[Slot], base: Base, options: Options) -> list[Slot]:
    """The prompt has no prefix; of a file with one for an encoder and one for a decoder, peft reads the first."""
    count = options.get("num_transformer_submodules") or 1
    block = Block(0, 0, count) if count > 1 else None
    return [s._replace(name=TENSOR, block=block) if s.name == PREFIX + TENSOR else s for s in slots]


def plain(x: Prompt | PTuning) -> Prompt:
    """The rows that the model reads, at scale 1."""
    kept = x.folded() if isinstance(x, PTuning) else x
    return kept.replace(prompt=kept.rows(), scale=jnp.ones_like(kept.scale))


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of a prompt."""
    if len(tuned) > 1:
        raise ValueError(f"prompts stand at {', '.join(path for path, _, _ in tuned)}; peft's files hold one")
    length, width = tuned[0][1].prompt.shape  # type: ignore[attr-defined]
    sizes = {"num_virtual_tokens": length, "token_dim": width, "num_transformer_submodules": 1}
    return {**sizes, "prompt_tuning_init": "RANDOM", "peft_type": "PROMPT_TUNING"}


def page_of_network(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of what a network put out."""
    shared = {key: value for key, value in page(tuned, base).items() if key in SHARED}
    return {**shared, "encoder_reparameterization_type": "MLP", "peft_type": "P_TUNING"}


FORMAT = Format(
    options=OPTIONS,
    method=method,
    parts={Prompt: parts},
    page=page,
    prefix=PREFIX,
    plain={Prompt: plain},
    wraps=False,
    placed=placed,
)
OF_NETWORKS = dataclasses.replace(
    FORMAT,
    options=NETWORK,
    parts={PTuning: parts, Prompt: parts},
    page=page_of_network,
    plain={PTuning: plain, Prompt: plain},
)
