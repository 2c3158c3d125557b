"""IA3: learned vectors that scale what layers put out, or what they read."""

import math
from typing import Any, Sequence

import jax
import jax.numpy as jnp

from peftjax.factored import Factor, Term
from peftjax.method import Leaf, Method, check_alone, chosen_leaves, laid, method
from peftjax.overlay import Overlay, Ref, frozen, overlay, static, trained, type_of
from peftjax.paths import flatten
from peftjax.roles import Role, Roles
from peftjax.targets import Targets

Lies = tuple[tuple[int, ...], ...]


@overlay
class IA3(Overlay):
    """`(1 + scale (l - 1)) W`, the vector l along some axes of W; a bias refers to the vector of its kernel."""

    base: Any = frozen()
    vector: Any = trained()
    scale: Any = frozen()
    lies: Lies = static()  # for each axis of the base, those of the vector that lie along it
    stacked: tuple[int, ...] = static(default=())  # the axes of the base along which the scale lies
    locked: tuple[str, ...] = static(default=())

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """The vector has the axes that it scales, and the stacked ones."""
        axes = sorted((j, k) for k, along in enumerate(self.lies) for j in along)
        return {"vector": tuple((k,) for _, k in axes), "scale": tuple((k,) for k in self.stacked)}

    def expand(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Every term of the base, scaled."""
        order = [j for along in self.lies for j in along]
        sizes = [math.prod(self.vector.shape[j] for j in along) for along in self.lies if along]
        vector = jnp.transpose(self.vector, order).reshape(sizes)
        where = [k for k, along in enumerate(self.lies) if along]
        scale = self.scale.reshape([n if k in self.stacked else 1 for n, k in zip(sizes, where)])
        factor = Factor(1 + scale * (vector - 1), tuple((k,) for k in where))
        return tuple(term.times(factor) for term in terms)


@method
def ia3(targets: Targets, feedforward: Targets = (), *, exclude: Targets = ()) -> Method:
    """Scales layers by trained vectors: `y = l * (W x + b)`, and `y = W (l * x) + b` for `feedforward` kernels.

    Args:
      targets: the kernels whose outputs are scaled, their biases with them; there is no default, for which layers make
        keys and values is a matter of names: ("key", "value") in the paper.
      feedforward: the kernels whose inputs are scaled instead, also where `targets` names them; none by default, for
        they are a matter of names, too. In the paper these are the second ones of the feed-forward blocks: their input is
        the inner activation. The channels of a convolution are scaled, not the taps of its window.
      exclude: kernels to leave out; wins over both.

    Returns:
      The method. The vectors are float32 and start at one, so the model starts as it was, exactly. `peftjax.scale`
      moves them towards one; stacked layers, and experts, have a scale each. A kernel and its biases share one vector,
      and `peftjax.merge` scales them all.

    Raises:
      ValueError: no roles, which find the biases; a pattern that matches no kernel; a kernel that trains an IA3 already,
        or without the axes to scale; a bias that is added to something else too, or that does not lie along its kernel's
        outputs; inputs of a grouped convolution or of a lookup.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> fn = lambda params, x: x @ params["key"]["kernel"] + params["key"]["bias"][None]
      >>> params = {"key": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
      >>> apply, tuned = pj.attach(pj.ia3(("key",)), fn, params, jnp.ones((1, 4)), key=jax.random.key(0))
      >>> apply(pj.insert(tuned, {"key/kernel/vector": jnp.array([1.0, 2.0, 0.0])}), jnp.ones((1, 4)))
      Array([[ 5., 10.,  0.]], dtype=float32)

    Reference: Liu et al. 2022, arXiv 2205.05638. Hugging Face's `feedforward_modules` are `feedforward` here, and need not
    be among `targets`.
    """

    def start(key: jax.Array, params: Any, roles: Roles | None) -> Any:
        if roles is None:
            raise ValueError("ia3 scales biases with their kernels: pass `roles=peftjax.roles(fn, params, batch)`")
        find = lambda which: chosen_leaves(key, params, roles, which, exclude, kernels=True) if which else []
        inputs = {leaf.path: leaf for leaf in find(feedforward)}
        outputs = {leaf.path: leaf for leaf in find(targets) if leaf.path not in inputs}
        values, made = dict(flatten(params)), {}
        for path, leaf in {**outputs, **inputs}.items():
            made[path] = _on_kernel(leaf, _read(leaf) if path in inputs else _written(leaf))
        for path, leaf in outputs.items():
            for bias in _biases(leaf, roles):
                shape, vector = type_of(values[bias]).shape, Ref.above(path, leaf.value, "vector")
                lies = _along(leaf, made[path].vector.shape, bias, roles[bias], shape)
                made[bias] = IA3(base=values[bias], vector=vector, lies=lies, **_scale(roles[bias].axes, shape))
        return laid(params, made)

    return Method(name="", options={}, start=start)


def _scale(axes: str, shape: Sequence[int]) -> dict[str, Any]:
    """A scale for each layer and expert of a leaf."""
    stacked = tuple(k for k, letter in enumerate(axes) if letter in "sb")
    return {"scale": jnp.ones([shape[k] for k in stacked], jnp.float32), "stacked": stacked}


def _on_kernel(leaf: Leaf, axes: Sequence[int]) -> IA3:
    check_alone("ia3", leaf, IA3)
    lies = tuple((axes.index(k),) if k in axes else () for k in range(len(leaf.axes)))
    vector = jnp.ones([leaf.type.shape[k] for k in axes], jnp.float32)
    return IA3(base=leaf.value, vector=vector, lies=lies, **_scale(leaf.axes, leaf.type.shape))


def _written(leaf: Leaf) -> list[int]:
    """The axes of a kernel's outputs."""
    return _having(leaf, "o", [k for k, letter in enumerate(leaf.axes) if letter == "o"])


def _read(leaf: Leaf) -> list[int]:
    """The axes of a kernel's inputs; of a convolution, its channels."""
    assert leaf.role is not None
    if leaf.role.op == "embedding":
        raise ValueError(
            f"ia3: {leaf.path} is looked up, and reads no features; expected a linear kernel or a convolution"
        )
    if leaf.role.groups > 1:
        raise ValueError(
            f"ia3: {leaf.path} is a convolution of {leaf.role.groups} groups, whose kernel is too small to scale each "
            "input channel by itself; name it in `targets` alone to scale its outputs, or in `exclude`"
        )
    channels = [k for k, letter in enumerate(leaf.axes) if letter == "i" and k not in leaf.role.window]
    return _having(leaf, "i", channels)


def _having(leaf: Leaf, letter: str, found: Sequence[int]) -> list[int]:
    if not found or "?" in leaf.axes:
        said = f" ({leaf.unclear})" if leaf.unclear else ""
        raise ValueError(
            f"ia3: {leaf.path} has axes {leaf.axes!r}{said}; expected a kernel with axes {letter!r} to scale"
        )
    return [k for k, x in enumerate(leaf.axes) if x in "sb" or k in found]


def _biases(leaf: Leaf, roles: Roles) -> list[str]:
    """The biases that are added to a kernel's output."""
    assert leaf.role is not None
    own = [path for path, role in roles.items() if role.op == "bias" and role.kernel == leaf.path]
    bias = leaf.role.bias
    return own if bias is None or bias in own else [*own, bias]


def _along(leaf: Leaf, vector: Sequence[int], path: str, role: Role, shape: Sequence[int]) -> Lies:
    """For each axis of a bias, the vector's axes that lie along it."""
    axes = [k for k, letter in enumerate(leaf.axes) if letter in "sbo"]
    stacked = iter(axes.index(k) for k, letter in enumerate(leaf.axes) if letter == "s")
    follows = role.follows if role.kernel == leaf.path and role.follows else ()
    lies = [
        (next(stacked, -1),) if letter == "s" else tuple(axes.index(k) for k in along)
        for letter, along in zip(role.axes, follows)
    ]
    if lies:  # an axis of one entry may lie anywhere
        lies[-1] += tuple(j for j, n in enumerate(vector) if n == 1 and j not in sum(lies, ()))
    covered = sorted(sum(lies, ())) == list(range(len(vector)))
    if not covered or any(math.prod(vector[j] for j in along) != n for along, n in zip(lies, shape)):
        raise ValueError(
            f"ia3: {path} {list(shape)} cannot scale with its kernel {leaf.path} {list(leaf.type.shape)}: it is added "
            f"to something else too, or does not lie along the kernel's outputs; leave {leaf.path} out with `exclude`, "
            "or name it in `feedforward` to scale its inputs"
        )
    return tuple(lies)
