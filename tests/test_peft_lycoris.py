"""LoHa and LoKr in Hugging Face peft's files: convolutions, ranks and alphas by module, and what cannot be read or written."""

import json
import shutil

import flax.linen as nn
import golden_models as golden
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from trees import away
from peftjax.interop import hf_peft
from safetensors.numpy import load_file

pytest.importorskip("transformers")
pytestmark = pytest.mark.third_party

KEY = jax.random.key(0)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# window, groups
CONVOLUTIONS = [((3, 2), 1), ((1, 1), 1), ((3,), 1), ((3, 3), 2)]


def convolution(window, groups=1):
    """One convolution of 4 channels to 6: the function, its parameters, roles and an input."""
    conv, x = nn.Conv(6, window, feature_group_count=groups), jnp.ones((2, *(5 for _ in window), 4))
    params = {"conv": conv.init(KEY, x)["params"]}
    fn = lambda params, x: conv.apply({"params": params["conv"]}, x)
    return fn, params, pj.roles(fn, params, x), x


def change(tuned):
    """What the update adds to the kernel, as torch holds it."""
    merged = np.asarray(pj.merge(tuned)["conv"]["kernel"]) - np.asarray(pj.strip(tuned)["conv"]["kernel"])
    return np.moveaxis(merged, (-1, -2), (0, 1))


def written(tuned, roles, folder):
    """The tensors of a convolution's adapter by their last names, and its configuration."""
    hf_peft.save(folder, tuned, roles)
    prefix = "base_model.model.conv."
    return {k.removeprefix(prefix): x for k, x in load_file(folder / TENSORS).items()}, json.loads(
        (folder / CONFIG).read_text()
    )


@pytest.mark.parametrize("window,groups", CONVOLUTIONS)
def test_loha_of_a_convolution_is_written_as_torch_has_it(window, groups, tmp_path):
    _, params, roles, _ = convolution(window, groups)
    tuned = away(pj.loha(rank=2, alpha=6, targets=("conv",)).init(KEY, params, roles), by=1.0)
    t, page = written(tuned, roles, tmp_path / "a")
    assert t["hada_w1_a"].shape == (6, 2) and (page["r"], page["alpha"]) == (2, 6)
    delta = 3 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    np.testing.assert_allclose(change(tuned), delta.reshape(6, 4 // groups, *window), rtol=1e-4, atol=1e-4)
    again = hf_peft.load(tmp_path / "a", params, roles)
    jax.tree.map(np.testing.assert_array_equal, again, tuned)


@pytest.mark.parametrize("window,groups", CONVOLUTIONS)
@pytest.mark.parametrize("rank,tucker", [(1, False), (1, True), (4, False)])
def test_lokr_of_a_convolution_is_written_as_torch_has_it(rank, tucker, window, groups, tmp_path):
    _, params, roles, _ = convolution(window, groups)
    flat, core, whole = len(window) == 1, tucker and np.prod(window) > 1, rank == 4
    options = dict(tucker=tucker, outer="w2" if flat and whole else "w1", targets=("conv",))
    tuned = away(pj.lokr(rank=rank, alpha=3, **options).init(KEY, params, roles), by=1.0)
    t, page = written(tuned, roles, tmp_path / "a")
    assert (page["r"], page["alpha"], page["use_effective_conv2d"]) == (rank, 3, bool(core))
    assert (page["decompose_factor"], page["decompose_both"]) == (-1, False)
    if whole:
        w2 = t["lokr_w2"]
    elif core:
        assert t["lokr_t2"].shape == (rank, rank, *window, *([1] if flat else []))
        w2 = np.einsum("ij...,ik,jn->kn...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    w1, w2 = t["lokr_w1"], w2.reshape(3, -1, *window)
    pair = (
        (w2, w1.reshape(*w1.shape, *(1 for _ in window)))
        if flat and whole
        else (w1[(..., *(None for _ in window))], w2)
    )
    np.testing.assert_allclose(change(tuned), 3 / rank * np.kron(*pair), rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles), tuned)


def test_the_order_that_peft_has_in_one_dimension_is_asked_for(tmp_path):
    _, params, roles, _ = convolution((3,))
    for options, message in (
        (dict(rank=4), "conv has the outer index of its product in w1, and peft has it there in w2"),
        (dict(rank=1, outer="w2"), "use peftjax.lokr\\(outer='w1'\\) for it"),
    ):
        tuned = pj.lokr(targets=("conv",), **options).init(KEY, params, roles)
        with pytest.raises(ValueError, match=message):
            hf_peft.save(tmp_path / "a", tuned, roles)


def test_cuts_of_several_kinds_are_refused(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    one, other = (pj.lokr(rank=9, factor=f, targets=(name,)) for f, name in ((2, "query"), (4, "value")))
    with pytest.raises(ValueError, match="the factors that axes are cut by differ: \\['2', '4'\\]"):
        hf_peft.save(tmp_path / "a", pj.chain(one, other).init(KEY, params, roles), roles)
    one, other = (pj.lokr(rank=1, decompose_both=b, targets=(name,)) for b, name in ((True, "query"), (False, "value")))
    with pytest.raises(ValueError, match="whole and low-rank w1 of modules where both can be: they differ"):
        hf_peft.save(tmp_path / "a", pj.chain(one, other).init(KEY, params, roles), roles)


@pytest.mark.parametrize(
    "page,message",
    [
        (dict(decompose_factor=0), "decompose_factor is 0, expected a positive integer, or -1"),
        (dict(decompose_factor=4), r"shape: .*query.lokr_w1_a is \[8,1\], expected \[4,1\]"),
        (dict(decompose_both=False), r"missing: .*query.lokr_w1 \[8,8\]"),
        (dict(rank_dropout=0.5), "rank_dropout is 0.5, expected 0"),
        (dict(r=9), "missing: .*query.lokr_w1 "),
        (dict(target_modules=["word_embeddings"]), "word_embeddings is a table; peft has LoKr for linear layers"),
    ],
)
def test_pages_of_lokr_that_do_not_fit(page, message, tmp_path):
    folder = tmp_path / "a"
    golden.repaged("bert", "lokr", folder, **page)
    _, params, roles, _, _ = golden.model("bert")
    with pytest.raises(ValueError, match=message):
        hf_peft.load(folder, params, roles)


def test_ranks_and_alphas_of_other_modules_are_named(tmp_path):
    _, params, roles, _, _ = golden.model("bert")
    query, value = (pj.loha(rank=r, alpha=6, targets=(name,)) for r, name in ((2, "query"), (3, "value")))
    tuned = pj.scale(pj.chain(query, value).init(KEY, params, roles), 0.5)
    hf_peft.save(tmp_path / "a", tuned, roles)
    page = json.loads((tmp_path / "a" / CONFIG).read_text())
    other = {2: "query", 3: "value"}[5 - page["r"]]
    assert page["rank_pattern"] == {other: 5 - page["r"]} and page["alpha"] == 3 and not page["alpha_pattern"]
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles), tuned)


def test_windows_of_three_axes_are_refused(tmp_path):
    _, params, roles, _ = convolution((2, 2, 2))
    tuned = pj.loha(rank=2, targets=("conv",)).init(KEY, params, roles)
    with pytest.raises(ValueError, match="conv is a convolution over 3 axes; peft has LoHa for one and two"):
        hf_peft.save(tmp_path / "a", tuned, roles)


def test_windows_that_are_factored_by_themselves_are_refused(tmp_path):
    _, params, roles, _ = convolution((3, 3))
    hf_peft.save(tmp_path / "a", pj.loha(rank=2, targets=("conv",)).init(KEY, params, roles), roles)
    page = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**page, "use_effective_conv2d": True}))
    with pytest.raises(ValueError, match="use_effective_conv2d factors the window of conv by itself"):
        hf_peft.load(tmp_path / "a", params, roles)


@pytest.mark.parametrize(
    "page,message",
    [
        (dict(rank_dropout=0.1), "rank_dropout is 0.1, expected 0: .*set it to 0 to use the adapter"),
        (dict(module_dropout=0.1), "module_dropout is 0.1, expected 0"),
        (dict(alpha="8"), "alpha is '8', expected a finite number"),
        (dict(r=4), r"shape: .*hada_w1_a is \[16,3\], expected \[16,4\]"),
        (dict(rank_pattern={"value": 0}), "rank_pattern"),
        (dict(target_modules=["word_embeddings"]), "word_embeddings is a table; peft has LoHa for linear layers"),
        (dict(bias="all"), "bias='all' is not supported"),
    ],
)
def test_pages_that_do_not_fit(page, message, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(golden.GOLDEN / "bert" / "loha", folder)
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **page}))
    _, params, roles, _, _ = golden.model("bert")
    with pytest.raises(ValueError, match=message):
        hf_peft.load(folder, params, roles)


def test_layers_of_a_stack_that_differ_are_refused(tmp_path):
    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"]["kernel"])[0]

    params = {"w": {"kernel": jnp.ones((2, 4, 4))}}
    roles, names = pj.roles(fn, params, jnp.ones((1, 4))), {"w/kernel": "model.layers.{layer}.w.weight"}
    tuned = away(pj.loha(rank=2, alpha=6, targets=("w",)).init(KEY, params, roles), by=1.0)
    hf_peft.save(tmp_path / "a", tuned, roles, names)
    jax.tree.map(np.testing.assert_array_equal, hf_peft.load(tmp_path / "a", params, roles, names), tuned)
    page = json.loads((tmp_path / "a" / CONFIG).read_text())
    for change, message in (
        (
            dict(alpha_pattern={"layers.1.w": 3}),
            "the layers that w/kernel stacks have a rank and an alpha: they differ",
        ),
        (dict(layers_to_transform=[1]), "w/kernel stacks several parameters; target_modules names some of them"),
    ):
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**page, **change}))
        with pytest.raises(ValueError, match=message):
            hf_peft.load(tmp_path / "a", params, roles, names)
