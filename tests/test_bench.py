"""What a LoRA step costs, by XLA's own count: times are for `experiments/bench/step.py` to measure."""

import pytest

from experiments.bench.step import steps


@pytest.mark.third_party
def test_a_lora_step_costs_less_than_full_fine_tuning():
    made = steps()
    full, lora = made["full"].cost, made["lora"].cost
    assert lora.flops <= 0.71 * full.flops
    assert lora.temp_bytes <= 1.05 * full.temp_bytes
