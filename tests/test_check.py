"""`check` and `attach`: what they find on a reader's model, that a broken law is found, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.factored import Factor
from peftjax.method import Method, per_leaf
from peftjax.overlay import Output, Overlay, frozen, overlay, static, trained

def block(params, x):
    """A residual block, its norm, and a head."""
    h = x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
    h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * params["norm"]["scale"][None]
    return h @ params["head"]["kernel"]


def attention(params, input_ids, attention_mask):
    x = params["words"][input_ids]
    scores = jnp.where(attention_mask[:, None] > 0, x @ (x @ params["key"]).mT, -1e9)
    return jax.nn.softmax(scores) @ (x @ params["value"])


def drawn(**shapes):
    tree = jax.tree.map(lambda shape: np.random.default_rng(len(shape)).standard_normal(shape), shapes, is_leaf=is_shape)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def is_shape(x):
    return isinstance(x, tuple)


KERNELS = {"up": {"kernel": (4, 6)}, "down": {"kernel": (6, 4)}, "head": {"kernel": (4, 2)}}
PARAMS = drawn(norm={"scale": (4,)}, **KERNELS)
MERGE = [pj.oft(block_size=2), pj.chain(pj.ia3(targets="all-linear"), pj.layer_norm())]
KEEP = [pj.chain(pj.adapter(bottleneck=2), pj.lora(rank=2)), pj.reft(rank=2)]
LAST = ["3 gradients", "4 strip", "6 one compilation", "7 extract, insert", "every overlay acts"]


@pytest.mark.parametrize("method", MERGE + KEEP, ids=["oft", "ia3 and norms", "adapter and lora", "reft"])
def test_the_laws_hold(method):
    report = pj.check(method, block, PARAMS, drawn(x=(3, 4))["x"])
    assert report.ok, report
    first = ["1 identity at init"] * method.identity_at_init + ["2 merge"] * (method in MERGE)
    assert [finding.law for finding in report] == first + LAST


def test_the_laws_hold_of_what_acts_on_tokens():
    ids, mask = jnp.array([[1, 2, 3]]), jnp.ones((1, 3))
    params = drawn(words=(5, 2), key=(2, 2), value=(2, 3))
    report = pj.check(pj.prefix(2), attention, params, ids, mask, tokens={"side": "last"})
    assert report.ok and [finding.law for finding in report] == LAST, report
    with pytest.raises(ValueError, match="expected `peftjax.wrap_tokens"):
        pj.check(pj.prefix(2), attention, params, ids, mask)


@overlay
class Gain(Overlay):
    """`W diag(1 + g)`, with a field that nothing reads, and a sum that starts away from W."""

    base: Any = frozen()
    g: Any = trained()
    unread: Any = trained()
    scale: Any = frozen()
    locked: tuple[str, ...] = static(default=())

    def labels(self):
        return {"g": ((1,),), "unread": (), "scale": ()}

    def expand(self, terms):
        return tuple(term.times(Factor(2 + self.scale * self.g, ((1,),))) for term in terms)


@overlay
class Shifted(Output):
    """`y + c`, which claims that a weight can say so."""

    base: Any = frozen()
    c: Any = trained()
    scale: Any = frozen()
    kernel: Any = static(default=None)
    where: str = static(default="output")
    locked: tuple[str, ...] = static(default=())
    merges = True

    def labels(self):
        return {"c": ((1,),), "scale": ()}

    def on_output(self, y, site):
        return y + (self.scale * self.c)[None]


ONES = {"w": jnp.ones((3, 2)), "v": jnp.ones((3, 2))}


def broken(make):
    return per_leaf(lambda leaf: make(base=leaf.value, scale=jnp.ones(())), "w")


@pytest.mark.parametrize(
    "make, fails",
    [
        (lambda **x: Gain(g=jnp.zeros(2), unread=jnp.zeros(()), **x), ["1 identity at init", "3 gradients"]),
        (lambda **x: Shifted(c=jnp.zeros(2), **x), ["2 merge"]),
    ],
)
def test_a_broken_law_is_found(make, fails):
    report = pj.check(broken(make), lambda params, x: x @ params["w"], ONES, jnp.ones((4, 3)))
    assert not report.ok and [f.law for f in report if not f.holds] == fails
    assert all(f"FAIL  {law}" in repr(report) for law in fails)


def test_an_overlay_that_does_nothing_is_found():
    on_both = lambda key, params, roles: pj.lora(rank=1).init(key, params)
    with pytest.warns(UserWarning, match="the overlays at v do nothing"):
        report = pj.check(Method("", {}, on_both), lambda params, x: x @ params["w"], ONES, jnp.ones((4, 3)))
    assert [f.law for f in report if not f.holds] == ["3 gradients", "every overlay acts"]
    assert "unused: v" in repr(report)


def test_what_is_no_mapping_of_options():
    fn = lambda params, x, tokens: x @ params["w"] + tokens
    with pytest.raises(TypeError, match=r"attach: tokens=float32\[4,2\]; expected the options of `peftjax.wrap_tokens`"):
        pj.check(pj.lora(rank=1), fn, ONES, jnp.ones((4, 3)), tokens=jnp.ones((4, 2)))
    with pytest.raises(TypeError, match="attach: tokens='first'; expected the options"):
        pj.attach(pj.lora(rank=1), fn, ONES, jnp.ones((4, 3)), key=jax.random.key(0), tokens="first")
