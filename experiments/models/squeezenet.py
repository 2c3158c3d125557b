"""SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360) in Flax NNX: small, and without batch normalisation."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec

from experiments.models.array_pickles import read_arrays

MEANS = (103.939, 116.779, 123.68)  # of blue, green and red

# Where the parameters lie on a mesh; what no rule names is replicated.
RULES = (
    (r"fire\d/squeeze1x1/kernel", PartitionSpec(None, None, "model", "fsdp")),
    (r"fire\d/expand\dx\d/kernel", PartitionSpec(None, None, "fsdp", "model")),
    (r"classifier/kernel", PartitionSpec(None, None, "fsdp", None)),
)


class Fire(nnx.Module):
    """Squeezed to few channels, then widened by windows of 1 and of 3, side by side."""

    def __init__(self, ins: int, squeezed: int, wide: int, *, rngs: nnx.Rngs):
        self.squeeze1x1 = nnx.Conv(ins, squeezed, (1, 1), rngs=rngs)
        self.expand1x1 = nnx.Conv(squeezed, wide, (1, 1), rngs=rngs)
        self.expand3x3 = nnx.Conv(squeezed, wide, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.squeeze1x1(x))
        return nnx.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], -1))


class SqueezeNet(nnx.Module):
    """Images (B, H, W, 3), as `scaled` makes them, to logits (B, classes); the classifier is a convolution, averaged.

    Args:
      classes: how many.
      rngs: of the initial parameters.
    """

    def __init__(self, classes: int = 1000, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 64, (3, 3), 2, padding="VALID", rngs=rngs)
        self.fire2, self.fire3 = Fire(64, 16, 64, rngs=rngs), Fire(128, 16, 64, rngs=rngs)
        self.fire4, self.fire5 = Fire(128, 32, 128, rngs=rngs), Fire(256, 32, 128, rngs=rngs)
        self.fire6, self.fire7 = Fire(256, 48, 192, rngs=rngs), Fire(384, 48, 192, rngs=rngs)
        self.fire8, self.fire9 = Fire(384, 64, 256, rngs=rngs), Fire(512, 64, 256, rngs=rngs)
        self.classifier = nnx.Conv(512, classes, (1, 1), rngs=rngs)

    def maps(self, x: jax.Array) -> jax.Array:
        """What the classifier reads, (B, H', W', 512)."""
        if x.ndim != 4 or x.shape[3] != 3:
            raise ValueError(f"images {x.shape}: expected (B, H, W, 3), three channels last")
        pool = lambda x: nnx.max_pool(x, (3, 3), (2, 2))
        x = pool(nnx.relu(self.conv1(x)))
        x = pool(self.fire3(self.fire2(x)))
        x = pool(self.fire5(self.fire4(x)))
        return self.fire9(self.fire8(self.fire7(self.fire6(x))))

    def features(self, x: jax.Array) -> jax.Array:
        """The maps averaged over the image, (B, 512)."""
        return self.maps(x).mean((1, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.classifier(self.maps(x))).mean((1, 2))


def scaled(pixels: jax.Array) -> jax.Array:
    """Pixels in [0, 255], red, green and blue, as the pretrained weights expect them."""
    return pixels[..., ::-1] - jnp.array(MEANS)[None, None, None]


def read(path: Path) -> dict[str, Any]:
    """The pretrained tree in a pickle of the package ndf, {layer: [kernel, bias]}; nothing in it is run.

    Raises:
      ValueError: the file is damaged, or holds more than arrays.
    """
    found: dict[str, np.ndarray] = {}
    for name, pair in read_arrays(path).items():
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(f"{path}: {name} holds {type(pair).__name__}; expected a list of a kernel and a bias")
        module = "classifier" if name == "conv10" else name
        found |= {f"{module}/kernel": pair[0], f"{module}/bias": pair[1]}
    return unflatten_dict(found, sep="/")
