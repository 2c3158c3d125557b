"""`check` and `attach`: what they find on a reader's model, that a broken law is found, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from zoo import MODELS, arrays_only

import peftjax as pj
from peftjax.factored import Factor
from peftjax.method import Method, per_leaf
from peftjax.overlay import Output, Overlay, frozen, overlay, static, trained

TOKENS = {"ids": "0", "mask": "1", "positions": "2"}


def encoder():
    example = MODELS["pre_norm_encoder"].make()
    fn, args = arrays_only(example)
    return fn, example.params, args


MERGE = [pj.oft(block_size=2), pj.chain(pj.ia3(targets="all-linear"), pj.layer_norm())]
KEEP = [pj.chain(pj.adapter(bottleneck=2), pj.lora(rank=2)), pj.prefix(2)]


@pytest.mark.parametrize("method", MERGE + KEEP, ids=["oft", "ia3 and norms", "adapter and lora", "prefix"])
def test_the_laws_hold(method):
    fn, params, args = encoder()
    report = pj.check(method, fn, params, *args, tokens=TOKENS if method.name == "prefix" else None)
    assert report.ok, report
    laws = [finding.law for finding in report]
    assert ("1 identity at init" in laws) == method.identity_at_init
    assert ("2 merge" in laws) == (method in MERGE)
    assert laws[-5:] == ["3 gradients", "4 strip", "6 one compilation", "7 extract, insert", "every overlay acts"]


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
