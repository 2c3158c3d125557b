"""Writes `imagenet.npz`: logits of the pretrained networks, in torch: `python make_imagenet.py efficientnet.pth squeezenet.pkl`.

EfficientNet-Lite0 is the package efficientnet-lite-pytorch's own model; SqueezeNet 1.1 is written here.
"""

import importlib
import pathlib
import pickle
import sys

import numpy as np


def images():
    """Two images without any noise, (2, 224, 224, 3) uint8: waves, and a disc."""
    y, x, c = np.mgrid[0:224, 0:224, 0:3].astype(np.float64)
    waves = 127 + 60 * np.sin(x / 9 + 2 * c) + 50 * np.cos(y / (7 + 3 * c)) + 15 * np.sin(x * y / 800)
    disc = np.where((x - 112) ** 2 + (y - 100) ** 2 < 70**2, 220 - 40 * c, 30 + 25 * c)
    return np.stack([waves, disc]).clip(0, 255).round().astype(np.uint8)


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        known = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
        assert (module, name) in known, (module, name)
        return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)


def squeezenet(w, x):
    import torch
    from torch.nn.functional import conv2d, max_pool2d

    w = {k: (torch.tensor(kernel).permute(3, 2, 0, 1), torch.tensor(bias)) for k, (kernel, bias) in w.items()}

    def fire(n, x):
        x = conv2d(x, *w[f"fire{n}/squeeze1x1"]).relu()
        wide = conv2d(x, *w[f"fire{n}/expand1x1"]), conv2d(x, *w[f"fire{n}/expand3x3"], padding=1)
        return torch.cat(wide, 1).relu()

    x = max_pool2d(conv2d(x, *w["conv1"], stride=2).relu(), 3, 2)
    x = max_pool2d(fire(3, fire(2, x)), 3, 2)
    x = max_pool2d(fire(5, fire(4, x)), 3, 2)
    for n in (6, 7, 8, 9):
        x = fire(n, x)
    return conv2d(x, *w["conv10"]).relu().mean((2, 3))


def main(efficientnet, squeezed):
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    pixels = torch.tensor(images().astype(np.float32)).permute(0, 3, 1, 2)
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(efficientnet, weights_only=True))
    with open(squeezed, "rb") as file:
        weights = Unpickler(file).load()
    means = torch.tensor([103.939, 116.779, 123.68])[:, None, None]
    with torch.no_grad():
        made = {
            "efficientnet": model.eval()((pixels - 127) / 128).numpy(),
            "squeezenet": squeezenet(weights, pixels.flip(1) - means).numpy(),
        }
    np.savez_compressed(pathlib.Path(__file__).parent / "imagenet.npz", **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
