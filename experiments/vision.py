"""A classifier of images on a pretrained convolutional network: what the scripts share."""

import dataclasses
from typing import Any, Callable, Collection, Mapping

import dm_pix as pix
import jax
import jax.numpy as jnp
from flax import nnx

import peftjax as pj
from experiments.assets import EFFICIENTNET, SQUEEZENET, fetch
from experiments.batches import Batch
from experiments.models import efficientnet, squeezenet
from peftjax.sharding_rules import Rules


@dataclasses.dataclass(frozen=True)
class Net:
    """A network whose head is called "classifier".

    Attributes:
      make: `make(classes, rngs)`.
      scaled: pixels as it expects them.
      read: its pretrained tree, with statistics.
      lora: what LoRA targets by default: its dense convolutions.
      adapters: what adapters target by default: the convolutions at the ends of its blocks.
      rules: where its parameters lie on a mesh, as `peftjax.sharding_rules.by_rules` reads them.
    """

    make: Callable[[int, nnx.Rngs], nnx.Module]
    scaled: Callable[[jax.Array], jax.Array]
    read: Callable[[], Mapping[str, Any]]
    lora: str
    adapters: str
    rules: Rules


NETS = {
    "efficientnet": Net(
        lambda classes, rngs: efficientnet.EfficientNet(classes, rngs=rngs),
        efficientnet.scaled,
        lambda: efficientnet.read(fetch(EFFICIENTNET) / "efficientnet-lite0.pth"),
        lora=".*/(expand|project|head)/conv",
        adapters=".*/project/conv",
        rules=efficientnet.RULES,
    ),
    "squeezenet": Net(
        lambda classes, rngs: squeezenet.SqueezeNet(classes, rngs=rngs),
        squeezenet.scaled,
        lambda: squeezenet.read(fetch(SQUEEZENET) / "squeezenet.pkl"),
        lora="fire.*",
        adapters=r"fire\d/expand\dx\d",
        rules=squeezenet.RULES,
    ),
}


@dataclasses.dataclass(frozen=True)
class Augment:
    """How training images are drawn anew: pixels to move by, a factor of contrast, a turn, and whether sides are swapped.

    Attributes:
      shift: in pixels, at most, either way; what comes in is the border again.
      contrast: the factor lies in [1 - contrast, 1 + contrast].
      turn: in degrees, at most, either way.
      flip: left and right, every other time. Not for digits.
    """

    shift: int = 0
    contrast: float = 0.0
    turn: float = 0.0
    flip: bool = False

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Each image (H, W, C) of (B, H, W, C) drawn anew, by a key of its own."""
        return jax.vmap(self._one)(images, jax.random.split(key, len(images)))

    def _one(self, image: jax.Array, key: jax.Array) -> jax.Array:
        move, change, turn, flip = jax.random.split(key, 4)
        if self.turn:
            angle: Any = jnp.deg2rad(jax.random.uniform(turn, minval=-self.turn, maxval=self.turn))
            image = pix.rotate(image, angle)
        if self.shift:
            around = ((self.shift, self.shift), (self.shift, self.shift), (0, 0))
            image = pix.random_crop(move, jnp.pad(image, around, mode="edge"), image.shape)
        if self.contrast:
            image = pix.random_contrast(change, image, 1 - self.contrast, 1 + self.contrast)
        return pix.random_flip_left_right(flip, image) if self.flip else image


class Classifier:
    """A network under a new head, as functions of its parameters, and of the statistics of its norms.

    A norm of batches normalises by the batch, and moves its statistics, where its own arrays train and a key says that
    this is training; everywhere else it uses its statistics, which stay as they are to the bit.

    Args:
      net: which.
      classes: of the new head.
      augment: how training images are drawn anew.
      momentum: how much of its statistics a norm keeps at each step of training.
    """

    def __init__(self, net: Net, classes: int, augment: Augment = Augment(), momentum: float = 0.9):
        self.net, self.classes, self.augment, self.momentum = net, classes, augment, momentum
        self._initial = jax.jit(lambda key: nnx.state(net.make(classes, nnx.Rngs(key)), (nnx.Param, nnx.BatchStat)))

    def initial(self, seed: int) -> tuple[nnx.State, nnx.State]:
        """Parameters and statistics before any training."""
        params, stats = nnx.split_state(self._initial(jax.random.key(seed)), nnx.Param, nnx.BatchStat)
        return params, stats

    def pretrained(self, seed: int) -> tuple[nnx.State, nnx.State]:
        """The pretrained parameters and statistics, under a head that is fresh."""
        grafted = pj.graft(self.net.read(), self._initial(jax.random.key(seed)), replace="classifier")
        params, stats = nnx.split_state(jax.tree.map(jnp.asarray, grafted), nnx.Param, nnx.BatchStat)
        return params, stats

    def graph(self, live: Collection[str] = (), shifts: bool = False) -> nnx.GraphDef:
        """The network without its arrays.

        Args:
          live: the paths of the norms that normalise by the batch.
          shifts: whether depthwise convolutions run as sums of shifted images, which is the faster way on a CPU.
        """
        module = nnx.eval_shape(lambda: self.net.make(self.classes, nnx.Rngs(0)))
        for at, part in nnx.iter_graph(module):
            if isinstance(part, nnx.BatchNorm):
                part.use_running_average = "/".join(map(str, at)) not in live
                part.momentum = self.momentum
            if shifts and isinstance(part, nnx.Conv) and 1 < part.feature_group_count == part.in_features:
                part.conv_general_dilated = efficientnet.by_shifts
        return nnx.split(module)[0]

    def roles(self, params: Any, stats: Any, size: int) -> pj.Roles:
        """What each parameter does, told from images of (size, size) pixels."""
        graph, image = self.graph(), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        return pj.roles(lambda params, x, stats: nnx.merge(graph, params, stats)(x), params, image, stats)

    def applied(self, live: Collection[str] = ()) -> Callable[..., tuple[jax.Array, Any]]:
        """Makes `apply(tuned, batch, key=None, model_state=stats) -> (logits, statistics)`; a key means training."""
        shifts = jax.default_backend() == "cpu"
        ways = [self._run(self.graph(live if training else (), shifts)) for training in (False, True)]

        def apply(tuned: Any, batch: Batch, key: Any = None, model_state: Any = None) -> tuple[jax.Array, Any]:
            return ways[key is not None](tuned, self.inputs(batch["image"], key), model_state)

        return apply

    def _run(self, graph: nnx.GraphDef) -> Callable[..., tuple[jax.Array, Any]]:
        def run(params: Any, x: jax.Array, stats: Any) -> tuple[jax.Array, Any]:
            module = nnx.merge(graph, params, stats, copy=True)
            return module(x), nnx.state(module, nnx.BatchStat)

        return pj.wrap(run)

    def features(self, model: tuple[Any, Any], batch: Batch) -> jax.Array:
        """What the head reads, (B, F), of parameters and statistics without overlays."""
        graph = self.graph(shifts=jax.default_backend() == "cpu")
        return nnx.merge(graph, *model).features(self.inputs(batch["image"]))

    def inputs(self, pixels: Any, key: jax.Array | None = None) -> jax.Array:
        """Pixels (B, S, S, 1 or 3) uint8 as the network takes them; drawn anew where there is a key."""
        if pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
            raise ValueError(f"images {pixels.shape}: expected (B, H, W, C) of 1 channel or 3")
        x = jnp.asarray(pixels, jnp.float32) / 255
        x = x if key is None else self.augment(x, key)
        return self.net.scaled(255 * jnp.broadcast_to(x, (*x.shape[:3], 3)))


def live(tuned: Any) -> frozenset[str]:
    """The modules of a tuned tree whose own arrays train, which norms among them normalise by the batch."""
    return frozenset(name.rpartition("/")[0].rpartition("/")[0] for name in pj.extract(tuned))
