"""What a LoRA step costs beside a step of full fine-tuning, on a BERT of 6 layers and 384 features.

    python experiments/bench/step.py             # XLA's own count of operations and memory
    python experiments/bench/step.py --rounds 9  # and times, the two steps taken in turn

Batch 16 x 128, AdamW, float32, no dropout; LoRA of rank 8 on every linear layer and a fresh head. Times on a shared
machine wobble: read the median of the ratios and their spread, not the seconds.

Measured on two shared cores, jax 0.10.2: 0.699 of the FLOPs, 1.037 of the memory, 0.74 of the time (median of 21 rounds,
0.51 to 0.94; of 9 rounds at other times 0.67 and 0.77); jax 0.12: 0.700, 1.041 and 0.73 (15 rounds, 0.67 to 0.81). What
limits it: of a full step's time about two thirds are matrix products, of which LoRA saves the third
that makes the gradients of weights; attention's softmax, GELU and the norms cost the same in both. Two things that XLA on
CPU does had to be kept from happening: turning the activations for the gradient of A and B (0.94 of the time with it),
and holding both `x W` and `(x A) B` for the backward pass of what follows (1.16 of the memory), which summing the weights
first avoids where there are more rows than weights (on one device: on a mesh that splits the weights, a sum would be
gathered beside what it is the sum of). DoRA's step: 1.004 of LoRA's FLOPs and 1.10 of its memory; the
gradient of a magnitude reads the output below it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

import peftjax as pj
from experiments.models.bert import Classifier, Config

BATCH, LENGTH, CLASSES = 16, 128, 2


class Cost(NamedTuple):
    """What XLA says of one compiled step."""

    flops: float
    temp_bytes: int


class Step(NamedTuple):
    """A compiled train step and the arguments it is called with."""

    program: Any
    args: tuple[Any, ...]

    @property
    def cost(self) -> Cost:
        """Its operations and the bytes of its temporaries."""
        analysis = self.program.cost_analysis()
        return Cost(analysis["flops"], self.program.memory_analysis().temp_size_in_bytes)

    def seconds(self) -> float:
        """The time of one call."""
        start = time.perf_counter()
        jax.block_until_ready(self.program(*self.args))
        return time.perf_counter() - start


METHODS = {"lora": pj.lora(rank=8, alpha=16), "dora": pj.dora(rank=8, alpha=16)}


def steps(names: Sequence[str] = ("full", "lora"), layers: int = 6, width: int = 384) -> dict[str, Step]:
    """The steps of these names, compiled: "full", and those of `METHODS`."""
    config = Config(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = Classifier(config, CLASSES)
    ids, mask = jnp.ones((BATCH, LENGTH), jnp.int32), jnp.ones((BATCH, LENGTH), bool)
    labels = jnp.zeros(BATCH, jnp.int32)
    params = model.init(jax.random.key(0), ids, mask)["params"]
    fn = lambda params, ids, mask: model.apply({"params": params}, ids, mask)
    tx = optax.adamw(1e-3)

    def compiled(model: Any, trainable: Any, frozen: Any) -> Step:
        def loss(trainable: Any, frozen: Any) -> Any:
            logits = model(trainable, frozen, ids, mask)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(trainable: Any, frozen: Any, state: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(trainable, frozen)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        args = (trainable, frozen, tx.init(trainable))
        return Step(jax.jit(step).lower(*args).compile(), args)

    def made(name: str) -> Step:
        if name == "full":
            return compiled(lambda params, _, *batch: fn(params, *batch), params, None)
        method = pj.chain(METHODS[name], pj.unfreeze("classifier"))
        apply, tuned = pj.attach(method, fn, params, ids, mask, key=jax.random.key(1))
        tuned_model = lambda trainable, frozen, *batch: apply(pj.combine(trainable, frozen), *batch)
        return compiled(tuned_model, *pj.partition(tuned))

    return {name: made(name) for name in names}


def main() -> None:
    """Prints both steps and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=0, help="how often each step is timed, in turn")
    rounds = parser.parse_args().rounds
    made = steps()
    for name, step in made.items():
        print(f"{name}: {step.cost.flops / 1e9:.1f} GFLOP, {step.cost.temp_bytes / 2**20:.0f} MiB of temporaries")
    full, lora = made["full"].cost, made["lora"].cost
    print(
        f"lora / full: {lora.flops / full.flops:.3f} of the FLOPs, {lora.temp_bytes / full.temp_bytes:.3f} of the memory"
    )
    if not rounds:
        return
    for step in made.values():
        step.seconds()
    pairs = [(made["full"].seconds(), made["lora"].seconds()) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    times = {name: statistics.median(p[k] for p in pairs) for k, name in enumerate(made)}
    print(f"median seconds: full {times['full']:.3f}, lora {times['lora']:.3f}")
    print(
        f"lora / full, taken in turn {rounds} times: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
