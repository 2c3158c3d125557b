"""What the README shows runs, and its diffs are as short as they claim."""

import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import peftjax as pj
from peftjax.interop import hf_peft

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.S)


def test_the_first_table_is_of_the_committed_rows():
    rows = (pathlib.Path(__file__).parents[1] / "experiments/results/reviews.jsonl").read_text().splitlines()
    by_seed = {row["config"]["seed"]: row["results"]["test"] for row in map(json.loads, rows)}
    for one in by_seed[0]:
        (accuracy, f1, mcc), name = one["scores"].values(), one["name"]
        cells = (f"{accuracy:.3f} ± {one['error']:.3f}", f"{f1:.3f}", f"{mcc:.3f}", f"{one['trainable']:,}", f"{one['seconds']:.1f}")
        assert re.search(rf"│ {re.escape(name)} *│ +{' +│ +'.join(map(re.escape, cells))} │", README), name
    mine = [by_seed[seed][-1]["scores"]["accuracy"] for seed in (0, 1, 2)]
    assert f"(seeds 1 and 2: {mine[1]:.3f} and {mine[2]:.3f};" in README
    words = {one["name"]: one["scores"]["accuracy"] for one in by_seed[0]}["TF-IDF + logistic regression"]
    assert np.mean(mine) >= max(0.835, words + 0.04)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(12, name="down")(nn.relu(nn.Dense(16, name="up")(x)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 16, rngs=rngs)
        self.down = nnx.Linear(16, 12, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def names():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    y = x.sum(1, keepdims=True)
    return dict(globals(), x=x, y=y, losses=[])


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, ids, mask):
        h = nn.Embed(11, 8, name="words")(ids)
        seen = nn.combine_masks(nn.make_causal_mask(ids), nn.make_attention_mask(mask, mask))
        h += nn.MultiHeadDotProductAttention(2, name="attention")(h, mask=seen)
        return nn.Dense(11, name="out")(nn.LayerNorm(name="norm")(h))


@pytest.mark.third_party
def test_the_examples_run(tmp_path, monkeypatch):
    """One after the other, as a reader would: the model of the first is that of the train step, too."""
    monkeypatch.chdir(tmp_path)
    linen, loop, flax_nnx, virtual, step, peft = BLOCKS
    scope = names()
    scope["model"] = Model()
    scope["params"] = base = scope["model"].init(jax.random.key(0), scope["x"])["params"]
    exec(linen, scope)
    assert scope["grads"]["up"]["kernel"].b.shape == (8, 16) and scope["grads"]["down"]["kernel"] is None
    loss = lambda params: float(((scope["fn"](params, scope["x"]) - scope["y"]) ** 2).mean())
    exec(loop, scope)
    assert loss(scope["params"]) < loss(base) and (tmp_path / "adapter/adapter.safetensors").is_file()
    roles = pj.roles(scope["fn"], scope["params"], scope["x"])
    hf_peft.save("adapter-folder", scope["tuned"], roles)
    exec(peft, scope | {"roles": roles})
    assert (tmp_path / "other-folder/adapter_model.safetensors").is_file()
    exec(step, scope)
    assert int(scope["state"].step) == 3 and scope["data"] == {"batch": 3}
    scope["nnx_model"] = NNXModel(nnx.Rngs(0))
    before = scope["nnx_model"](scope["x"])
    exec(flax_nnx, scope)
    np.testing.assert_allclose(scope["nnx_model"](scope["x"]), before, rtol=1e-6)
    words = scope["words"] = jnp.arange(12).reshape(2, 6) % 11
    real = scope["real"] = jnp.ones_like(words)
    scope["decoder"] = Decoder()
    scope["params"] = scope["decoder"].init(jax.random.key(0), words, real)["params"]
    exec(virtual, scope)
    assert scope["logits"].shape == (2, 6, 11)


@pytest.mark.third_party
@pytest.mark.parametrize("diff", DIFFS, ids=["TrainState", "nnx.Optimizer"])
def test_an_existing_loop_turned_into_lora(diff):
    lines = diff.splitlines()
    assert 0 < sum(line.startswith("+") for line in lines) <= 6
    runs = {}
    for sign in "-+":
        scope = names()
        exec("\n".join(line[1:] for line in lines if not line or line[0] in (" ", sign)), scope)
        runs[sign] = scope
        assert scope["losses"][-1] < scope["losses"][0]
    if "state" in runs["+"]:
        trained = runs["+"]["state"].params
        fresh = runs["+"]["model"].init(jax.random.key(0), runs["+"]["x"])["params"]
        jax.tree.map(np.testing.assert_array_equal, pj.strip(trained), fresh)
        assert pj.count(trained).trainable == (16 + 16) * 2
