"""EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946; the Lite variant: no squeeze-and-excitation, ReLU6) in Flax NNX.

Shapes: B images, H rows, W columns, C channels. A convolution and its norm are one layer: `blocks/3/expand/conv/kernel`.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec

from peftjax.interop.pickles import read_pickle

# Where the parameters lie on a mesh; what no rule names is replicated.
RULES = (
    (r".*/expand/conv/kernel|head/conv/kernel", PartitionSpec(None, None, "fsdp", "model")),
    (r".*/project/conv/kernel", PartitionSpec(None, None, "model", "fsdp")),
    (r"classifier/kernel", PartitionSpec("fsdp", None)),
)

he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Stage(NamedTuple):
    """Blocks of one kind: how many, how wide inside (a multiple of the input), out channels, window, first stride."""

    blocks: int
    expand: int
    channels: int
    window: int
    stride: int


LITE0 = (
    Stage(1, 1, 16, 3, 1),
    Stage(2, 6, 24, 3, 2),
    Stage(2, 6, 40, 5, 2),
    Stage(3, 6, 80, 3, 2),
    Stage(3, 6, 112, 5, 1),
    Stage(4, 6, 192, 5, 2),
    Stage(1, 6, 320, 3, 1),
)


def by_shifts(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str, **options: Any) -> jax.Array:
    """A depthwise convolution as a sum over the window of shifted images, each times its row of the kernel.

    XLA compiles it to one loop; on a CPU, it is 10 to 100 times faster than XLA's own convolution of that many groups.

    Args:
      x: (B, H, W, C).
      kernel: (h, w, 1, C).
      strides, padding, options: as `jax.lax.conv_general_dilated` takes them.

    Returns:
      (B, H', W', C).
    """
    (h, w, _, _), (s, t) = kernel.shape, strides
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (h, w), (s, t), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (x.shape[1] - h) // s + 1, (x.shape[2] - w) // t + 1
    shifted = lambda i, j: x[:, i : i + (rows - 1) * s + 1 : s, j : j + (columns - 1) * t + 1 : t]
    return functools.reduce(
        jnp.add, (shifted(i, j) * kernel[i, j, 0][None, None, None] for i in range(h) for j in range(w))
    )


class ConvNorm(nnx.Module):
    """A convolution without a bias, and batch normalisation; no activation."""

    def __init__(self, ins: int, outs: int, window: int, stride: int = 1, groups: int = 1, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            ins,
            outs,
            (window, window),
            stride,
            padding="SAME",
            feature_group_count=groups,
            use_bias=False,
            kernel_init=he_normal,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(outs, use_running_average=True, epsilon=1e-3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Wide, convolved per channel, narrow again; added to its input where both have the same shape."""

    def __init__(self, ins: int, outs: int, expand: int, window: int, stride: int, *, rngs: nnx.Rngs):
        wide = ins * expand
        self.expand = nnx.data(ConvNorm(ins, wide, 1, rngs=rngs) if expand > 1 else None)
        self.depthwise = ConvNorm(wide, wide, window, stride, groups=wide, rngs=rngs)
        self.project = ConvNorm(wide, outs, 1, rngs=rngs)
        self.residual = stride == 1 and ins == outs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else nnx.relu6(self.expand(x))
        y = self.project(nnx.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """Images (B, H, W, 3), as `scaled` makes them, to logits (B, classes).

    Args:
      classes: how many.
      stages: the kinds of blocks.
      stem, features: channels of the first and of the last convolution.
      rngs: of the initial parameters.
    """

    def __init__(
        self,
        classes: int = 1000,
        stages: Sequence[Stage] = LITE0,
        stem: int = 32,
        features: int = 1280,
        *,
        rngs: nnx.Rngs,
    ):
        self.stem = ConvNorm(3, stem, 3, 2, rngs=rngs)
        blocks, ins = [], stem
        for s in stages:
            for k in range(s.blocks):
                blocks.append(Block(ins, s.channels, s.expand, s.window, 1 if k else s.stride, rngs=rngs))
                ins = s.channels
        self.blocks = nnx.List(blocks)
        self.head = ConvNorm(ins, features, 1, rngs=rngs)
        self.classifier = nnx.Linear(features, classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """What the classifier reads, (B, F): the last convolution's output, averaged over the image."""
        if x.ndim != 4 or x.shape[3] != 3:
            raise ValueError(f"images {x.shape}: expected (B, H, W, 3), three channels last")
        x = nnx.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return nnx.relu6(self.head(x)).mean((1, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.classifier(self.features(x))


def scaled(pixels: jax.Array) -> jax.Array:
    """Pixels in [0, 255] as the pretrained weights expect them."""
    return (pixels - 127.0) / 128.0


def read(path: Path) -> dict[str, Any]:
    """The pretrained tree in a `.pth` file with the names of `efficientnet_lite_pytorch`, parameters and statistics.

    Args:
      path: what `torch.save` wrote; it is read without torch, and nothing in it is run.

    Returns:
      Arrays by the paths of `EfficientNet`, kernels as (H, W, in, out); `peftjax.graft` lays them into a model and lists
      whatever does not fit.

    Raises:
      ValueError: the file is damaged, holds more than tensors, or a tensor with a name of another model.
    """
    tensors = {name: x for name, x in read_pickle(path).items() if not name.endswith(".num_batches_tracked")}
    return unflatten_dict({_path(name): _laid(x) for name, x in tensors.items()}, sep="/")


LAYERS = {"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project"}
NORMS = {"_bn0": "expand", "_bn1": "depthwise", "_bn2": "project"}
OUTSIDE = {"_conv_stem": "stem/conv", "_bn0": "stem/norm", "_conv_head": "head/conv", "_bn1": "head/norm"}


def _path(name: str) -> str:
    """`_blocks.3._bn1.running_mean` is `blocks/3/depthwise/norm/mean`."""
    *at, module, last = name.split(".")
    inside = {f: f"{to}/conv" for f, to in LAYERS.items()} | {f: f"{to}/norm" for f, to in NORMS.items()}
    known = inside if at else {**OUTSIDE, "_fc": "classifier"}
    if module not in known or last not in ("weight", "bias", "running_mean", "running_var"):
        raise ValueError(f"{name!r} is no tensor of an EfficientNet-Lite")
    weight = "scale" if known[module].endswith("norm") else "kernel"
    return "/".join([*at, known[module], weight if last == "weight" else last]).replace("running_", "").lstrip("_")


def _laid(x: np.ndarray) -> np.ndarray:
    """Torch's (out, in, H, W) and (out, in), as Flax has them."""
    return np.ascontiguousarray(x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T)
