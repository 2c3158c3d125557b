"""Convolutions under Hugging Face peft's own layers: its files give its outputs, and it reads what is written."""

import warnings

import numpy as np
import pytest
from test_peft_lycoris import CONVOLUTIONS, KEY, away, convolution

import peftjax as pj
from peftjax.interop import hf_peft

torch = pytest.importorskip("torch", reason="needs torch: pip install 'peftjax[interop]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'peftjax[interop]'")
pytestmark = pytest.mark.third_party

CASES = {
    "loha": (lambda: peft.LoHaConfig(r=2, alpha=6), lambda flat: pj.loha(2, 6, targets=("conv",))),
    "lokr": (
        lambda: peft.LoKrConfig(r=1, alpha=3, decompose_factor=2, decompose_both=True),
        lambda flat: pj.lokr(1, 3, factor=2, decompose_both=True, targets=("conv",)),
    ),
    "lokr_whole": (
        lambda: peft.LoKrConfig(r=4, alpha=8),
        lambda flat: pj.lokr(4, 8, outer="w2" if flat else "w1", targets=("conv",)),
    ),
    "lokr_tucker": (
        lambda: peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True),
        lambda flat: pj.lokr(1, 3, tucker=True, targets=("conv",)),
    ),
}
# Torch's own `kron` fails on the core of a window of one axis.
IN_BOTH = [(case, *c) for case in CASES for c in CONVOLUTIONS if (case, c[0]) != ("lokr_tucker", (3,))]


class Convolution(torch.nn.Module):
    """The convolution of some parameters of Flax, channels last."""

    def __init__(self, params, window, groups):
        super().__init__()
        kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[len(window)]
        self.conv = kind(4, 6, window, padding="same", groups=groups)
        kernel, bias = (torch.tensor(np.asarray(params["conv"][name])) for name in ("kernel", "bias"))
        self.conv.load_state_dict({"weight": kernel.moveaxis((-1, -2), (0, 1)), "bias": bias})

    def forward(self, x):
        return self.conv(x.moveaxis(-1, 1)).moveaxis(1, -1)


def outputs(model, x):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(x))).numpy()


def input_of(x):
    return np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)


@pytest.mark.parametrize("case,window,groups", IN_BOTH)
def test_peft_gives_what_is_written(case, window, groups, tmp_path):
    fn, params, roles, x = convolution(window, groups)
    x, tuned = input_of(x), away(CASES[case][1](len(window) == 1).init(KEY, params, roles))
    hf_peft.save(tmp_path / "a", tuned, roles)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(Convolution(params, window, groups), str(tmp_path / "a")).eval()
    want = np.asarray(pj.wrap(fn)(tuned, x))
    np.testing.assert_allclose(outputs(model, x), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("case,window,groups", IN_BOTH)
def test_what_peft_writes_gives_its_outputs(case, window, groups, tmp_path):
    fn, params, roles, x = convolution(window, groups)
    torch.manual_seed(0)
    config, x = CASES[case][0](), input_of(x)
    config.target_modules = {"conv"}
    model = peft.get_peft_model(Convolution(params, window, groups), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "a")
    want = outputs(model, x)
    got = pj.wrap(fn)(hf_peft.load(tmp_path / "a", params, roles), x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
