"""Which kinds of models a tree may be, by the torch names of its modules; what is not known says nothing."""

from peftjax.flat import near
from peftjax.interop.base import Base

# Where the models of Hugging Face make queries, and the `model_type` of those that do it there.
QUERIES = {
    "attention.self.query": ("bert", "bert-generation", "roberta", "xlm-roberta", "electra"),
    "attention.attention.query": ("vit", "beit"),
    "attention.query": ("albert",),
    "attention.q_lin": ("distilbert",),
    "attention.self.in_proj": ("deberta",),
    "attention.self.query_proj": ("deberta-v2",),
    "self_attn.q_proj": ("llama", "mistral", "bart", "mbart", "plbart", "whisper", "clip"),
    "attn.q_proj": ("gptj",),
    "attn.c_attn": ("gpt2",),
    "SelfAttention.q": ("t5", "mt5"),
}
KNOWN = {kind for kinds in QUERIES.values() for kind in kinds}


def model_types(base: Base) -> set[str]:
    """The types that this model may be of: by its queries, and by the first word of its names where that is a type's."""
    ends = lambda end: any(f".{module}".endswith(f".{end}") for module in base.modules)
    found = {kind for end, kinds in QUERIES.items() if ends(end) for kind in kinds}
    first = {name.partition(".")[0] for name in base.spots}
    return {kind for kind in found if first & set(kind.split("-"))} or found


def unlike(kind: str | None, base: Base) -> list[str]:
    """A line where a model of this type has other modules than the model at hand, as far as both are known."""
    found = model_types(base)
    if kind not in KNOWN or not found or kind in found:
        return []
    return [f"model_type is {kind!r}, expected one of {', '.join(sorted(found))} (nearest: {near(kind, found)})"]
