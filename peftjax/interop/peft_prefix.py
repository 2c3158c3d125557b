"""Prefixes as Hugging Face peft saves them: one tensor, the keys and values of all layers as attention reads them."""

from typing import Any, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.interop import config
from peftjax.interop.attentions import Layer, attentions
from peftjax.interop.base import Base, regex
from peftjax.interop.formats import Format, Options, Tuned, times_scale, trained_whole
from peftjax.interop.names import Spot
from peftjax.interop.peft_prompt import PREFIX, SEQ2SEQ, SHARED, TENSOR
from peftjax.interop.slots import Block, Part, Slot, constant
from peftjax.interop.turning import turned
from peftjax.method import Method
from peftjax.methods.prefix import prefix
from peftjax.overlay import atoms, layers
from peftjax.paths import flatten
from peftjax.prefixes import DeepPrefix, Prefix
from peftjax.tree import map_leaves, resolve

OPTIONS = {
    **SHARED,
    "encoder_hidden_size": config.whole(None, least=1),
    "prefix_projection": config.flag(False),  # peft saves what the network puts out
}


def method(options: Options, base: Base) -> list[Method]:
    """A prefix on every attention's keys and values, and training of the modules to save."""
    found, both = attentions(base)
    _check_sizes(options, found, both)
    spots = [spot for layer in found for spot in layer.kernels]
    paths = base.leaves(spots, "peft's prefix")
    width = found[0].width
    features = ((width, 3 * width),) if found[0].fused else None
    made = prefix(options["num_virtual_tokens"], targets=regex(paths), features=features)
    return [made, *trained_whole(options, base, ())]


def _check_sizes(options: Options, found: Sequence[Layer], both: bool) -> None:
    constant((layer.fused for layer in found), "some layers' kernels make keys alone, and others queries too: they")
    width = constant((layer.width for layer in found), "features of keys")
    count = options["num_transformer_submodules"] or (2 if options["task_type"] == SEQ2SEQ else 1)
    faults = {
        "num_layers": (options["num_layers"], len(found), "the layers with attention of this model"),
        "token_dim": (options["token_dim"], width, "the features of its keys"),
        "num_transformer_submodules": (count, 1 + both, "an encoder and a decoder" if both else "one stack of layers"),
    }
    wrong = [f"{k} is {x}, expected {y}, {what}" for k, (x, y, what) in faults.items() if x not in (None, y)]
    if (options["num_attention_heads"] or 1) > width or width % (options["num_attention_heads"] or 1):
        wrong.append(f"num_attention_heads is {options['num_attention_heads']}, expected a divisor of {width}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _check_turning(base: Base, found: Sequence[Layer]) -> None:
    """Raises where what projections put out cannot be told from what attention reads."""
    kernels = [spot for layer in found for spot in layer.kernels]
    if bent := [spot.name for spot in kernels if spot.role.bent]:
        raise ValueError(
            f"what {', '.join(bent[:3])} put out goes through something that is not linear before attention reads it, such "
            "as a norm of keys; peft's prefixes are what attention reads, which no output of these may give"
        )
    if rotary := [layer.kernels[-1].name for layer in found if layer.kernels[-1].role.rotary]:
        raise ValueError(f"{', '.join(rotary[:3])}: rotary positions turn more than the keys")
    turns = [spot.name for spot in kernels if spot.role.rotary]
    if turns and base.rope is None:
        raise ValueError(
            f"rotary positions turn what {', '.join(turns[:3])} put out, and peft's prefixes are what attention reads: "
            "pass `rope=`, the model's base of rotary positions (10000.0, say) or a function that turns keys"
        )
    if base.rope is not None and not turns:
        raise ValueError("rope: the trace shows no rotary positions in this model's keys; leave it out")


def parts(x: Prefix, spot: Spot) -> Iterator[Part]:
    """P of one projection is (n, features)."""
    yield Part("prefix", spot.of_module("prefix"), ("rows", "features" if x.features else "o"))


def placed(slots: list[Slot], base: Base, options: Options) -> list[Slot]:
    """The prefixes as parts of one tensor (n, 2 L features): of each layer its keys, then its values.

    Of a model with an encoder, peft hands the decoder's self-attention twice as many slots as there are, and takes
    every fourth and the one after it: layer l reads the slots 4 l and 4 l + 1, modulo 2 L.
    """
    found, both = attentions(base)
    blocks = {}
    for l, layer in enumerate(found):
        first = (4 * l) % (2 * len(found)) if both else 2 * l
        for k, spot in enumerate(layer.kernels):
            at = l if layer.fused else first + k
            blocks[f"{PREFIX}{spot.of_module('prefix')}"] = Block(1, at, len(found) * (1 if layer.fused else 2))
    return [s._replace(name=TENSOR, block=blocks[s.name]) if s.name in blocks else s for s in slots]


def restored(tuned: Any, base: Base, options: Options) -> Any:
    """The tree with keys as projections put them out."""
    _check_turning(base, attentions(base)[0])
    return _turned(tuned, base, options["num_attention_heads"], back=True)


def stored(tuned: Any, base: Base) -> Any:
    """The tree with prefixes at scale 1, without networks, and with keys as attention reads them."""
    found, both = attentions(base)
    if both:
        raise ValueError(
            "peft's files of a prefix for a model with an encoder and a decoder hold what it gives the decoder's layers in "
            "mixed places, two layers the same: they are read, and not written"
        )
    _check_turning(base, found)
    folded = map_leaves(lambda _, leaf: _plain(leaf), resolve(tuned))
    held = {path: x for path, leaf in flatten(folded) for x in layers(leaf) if isinstance(x, Prefix)}
    _check_held(held, found)
    return _turned(folded, base, base.heads, back=False)


def _plain(leaf: Any) -> Any:
    """A leaf whose prefixes have no network, and scale 1."""
    if not any(isinstance(x, (Prefix, DeepPrefix)) for x in layers(leaf)):
        return leaf
    x = leaf.replace(base=_plain(leaf.base))
    if isinstance(x, DeepPrefix):
        x = x.folded()
    if not isinstance(x, Prefix):
        return x
    return x.replace(prefix=times_scale(x, "prefix"), scale=jnp.ones_like(x.scale))


def _check_held(held: Mapping[str, Prefix], found: Sequence[Layer]) -> None:
    """Raises unless these are the prefixes of every layer, and of nothing else."""
    homes = {paths: (spot, layer) for layer in found for spot, paths in zip(layer.kernels, layer.homes)}
    if missing := [spot.name for paths, (spot, _) in homes.items() if not set(paths) & set(held)]:
        raise ValueError(
            f"peft's files hold a prefix of the keys and values of every layer; {', '.join(missing)} have none"
        )
    if more := set(held) - {path for paths in homes for path in paths}:
        raise ValueError(f"peft's files have no place for the prefixes at {', '.join(sorted(more))}")
    constant((x.length for x in held.values()), "lengths of prefixes")
    for paths, (spot, layer) in homes.items():
        features = next(held[path].features for path in paths if path in held)
        expected = ((layer.width, 3 * layer.width),) if layer.fused else None
        if features != expected:
            raise ValueError(f"the prefix of {spot.name} is for the features {features}, expected {expected}")


def _turned(tuned: Any, base: Base, heads: int | None, back: bool) -> Any:
    """The tree with the keys of every layer with rotary positions turned, or turned back."""
    keys = [layer for layer in attentions(base)[0] if layer.kernels[0].role.rotary]
    homes = {path: layer for layer in keys for path in layer.homes[0]}

    def change(path: str, leaf: Any) -> Any:
        if path not in homes or not any(isinstance(x, Prefix) for x in layers(leaf)):
            return leaf
        if not isinstance(leaf, Prefix):
            return leaf.replace(base=change(path, leaf.base))
        count = homes[path].heads or heads
        if count is None:
            raise ValueError(
                f"rotary positions turn each head, and into how many does the model cut {homes[path].kernels[0].name}? "
                "Expected num_attention_heads in a page, and `heads=` for `save`"
            )
        rows = np.asarray(leaf.prefix)
        lead = len(atoms(leaf.axes, "sb"))
        flat = rows.reshape(*rows.shape[: lead + 1], -1)
        made = turned(flat, count, base.rope, back).reshape(rows.shape)
        return leaf.replace(prefix=jax.device_put(made, getattr(leaf.prefix, "sharding", None)))

    return map_leaves(change, tuned)


def page(tuned: Sequence[Tuned], base: Base) -> dict[str, Any]:
    """The configuration of a prefix; what peft reads off its model is left out where it is not known."""
    found = attentions(base)[0]
    heads = found[0].heads or base.heads
    known = {"num_attention_heads": heads, "token_dim": found[0].width} if heads else {}
    length = next(x.length for _, x, _ in tuned if isinstance(x, Prefix))
    sizes = {"num_virtual_tokens": length, "num_layers": len(found), "num_transformer_submodules": 1, **known}
    return {**sizes, "prefix_projection": False, "peft_type": "PREFIX_TUNING"}


FORMAT = Format(
    options=OPTIONS,
    method=method,
    parts={Prefix: parts, DeepPrefix: parts},
    page=page,
    prefix=PREFIX,
    wraps=False,
    placed=placed,
    restored=restored,
    stored=stored,
)
