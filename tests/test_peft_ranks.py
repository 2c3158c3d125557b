"""Ranks above a kernel's smaller side: files of other libraries have them, and they are read and written."""

import golden_models as golden
import jax
import numpy as np
import peftjax as pj
import pytest
from peftjax.interop import hf_peft
from trees import away

pytestmark = pytest.mark.third_party
WIDE = {
    "lora": lambda **k: pj.lora(rank=40, alpha=8, **k),
    "dora": lambda **k: pj.dora(rank=40, **k),
    "adalora": lambda **k: pj.adalora(rank=40, target_rank=9, total_steps=9, **k),
    "loha": lambda **k: pj.loha(rank=40, **k),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_rank_above_the_smaller_side_is_read(name, tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    targets = ".*layer/0/attention/self/query"
    with pytest.raises(ValueError, match="rank 40 at .*expected 1 to"):
        WIDE[name](targets=targets).init(jax.random.key(0), params, roles)
    tuned = away(WIDE[name](targets=targets, any_rank=True).init(jax.random.key(0), params, roles))
    hf_peft.save(tmp_path / "a", tuned, roles, task_type="SEQ_CLS")
    got, want = pj.extract(hf_peft.load(tmp_path / "a", params, roles)), pj.extract(tuned)
    assert set(got) >= set(want) and any(40 in x.shape for x in got.values())
    for key, x in want.items():
        np.testing.assert_array_equal(got[key], x)


def test_a_start_by_factors_of_the_weight_has_no_more_ranks_than_it():
    with pytest.raises(ValueError, match="rank 5 at w .*expected 1 to 3"):
        pj.lora(rank=5, init="pissa", any_rank=True).init(jax.random.key(0), {"w": np.ones((4, 3), np.float32)})
