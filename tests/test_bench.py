"""What a LoRA step costs, by XLA's own count: times are for `experiments/bench/step.py` to measure."""

import re

import jax
import jax.numpy as jnp
import peftjax as pj
import pytest

from experiments.bench.step import steps


@pytest.mark.third_party
def test_a_lora_step_costs_less_than_full_fine_tuning():
    made = steps()
    full, lora = made["full"].cost, made["lora"].cost
    assert lora.flops <= 0.71 * full.flops
    assert lora.temp_bytes <= 1.05 * full.temp_bytes


@pytest.mark.third_party
def test_a_product_holds_no_more_than_plain_autodiff_and_turns_no_activation():
    x, w = jnp.ones((16, 128, 384)), jnp.ones((384, 384))
    tuned = pj.lora(rank=8).init(jax.random.key(0), {"w": w})
    trainable, frozen = pj.partition(tuned)
    apply = pj.wrap(lambda params, x: x @ params["w"])
    ours = lambda trainable, x: (jax.nn.gelu(apply(pj.combine(trainable, frozen), x)) ** 2).sum()
    plain = lambda factors, x: (jax.nn.gelu(x @ w + (x @ factors[0]) @ factors[1]) ** 2).sum()
    compiled = lambda f, *args: jax.jit(jax.grad(f, (0, 1))).lower(*args).compile()
    mine, theirs = compiled(ours, trainable, x), compiled(plain, (tuned["w"].a, tuned["w"].b), x)
    assert mine.memory_analysis().temp_size_in_bytes <= theirs.memory_analysis().temp_size_in_bytes
    assert not re.search(r"f32\[384,(2048|16,128|128,16)\]", mine.as_text())
