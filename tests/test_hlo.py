"""What is read from compiled programs and from jaxprs: loops counted in full, collectives by kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.flops import flops
from peftjax.hlo import Program, Traffic
from peftjax.sharding_rules import make_mesh

TEXT = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gathered (p: bf16[8,16]) -> bf16[8,64] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={1}
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]) parameter(0)
  %fusion.1 = f32[4]{0} fusion(%s), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"100"}
  %all-reduce.1 = f32[4]{0} all-reduce(%fusion.1), channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[4]) tuple(%s, %all-reduce.1)
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %s = (s32[], f32[4]) parameter(0)
  %constant.7 = s32[]{:T(128)} constant(32)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %constant.7), direction=LT
}

ENTRY %main (x: bf16[8,16]) -> (s32[], f32[4]) {
  %x = bf16[8,16]{1,0} parameter(0)
  %async = bf16[8,64] fusion(%x), kind=kCustom, calls=%gathered, backend_config={"estimated_cycles":"7"}
  %copy = bf16[8,64] fusion(%x), kind=kCustom, calls=%gathered
  %w = (s32[], f32[4]) while(%x), condition=%condition, body=%body
  ROOT %out = (s32[], f32[4]) tuple(%w)
}
"""


def test_loops_count_in_full_and_copies_of_a_collective_once():
    program = Program(TEXT)
    assert (program.cycles, program.cycles_once) == (7 + 32 * 100, 107)
    assert program.collectives == {"all-gather": Traffic(1, 8 * 64 * 2), "all-reduce": Traffic(32, 32 * 16)}


def test_what_begins_counts_what_it_will_give():
    """Not its operands, which stand before it in its type."""
    permuted = (
        "(bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) collective-permute-start(%x)"
    )
    gathered = "((bf16[8,16]{1,0}, f32[2]{0}), (bf16[8,64]{1,0}, f32[8]{0})) all-gather-start(%x, %y)"
    lines = [f"  %p = {permuted}, channel_id=5", f"  %g = {gathered}", "  %r = f32[4]{0} all-reduce-start(%z)"]
    begins = TEXT.replace("  %async =", "\n".join([*lines, "  %async ="]))
    found = Program(begins).collectives
    assert found["collective-permute"] == Traffic(1, 8 * 16 * 2)
    assert found["all-gather"] == Traffic(2, 2 * 8 * 64 * 2 + 8 * 4)
    assert found["all-reduce"] == Traffic(33, 33 * 16)


def test_the_compilers_own_number_of_trips_goes_first():
    noted = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert Program(noted).collectives["all-reduce"].count == 5


def test_a_real_program():
    mesh = make_mesh("data:2,model:4")
    lies = lambda *spec: NamedSharding(mesh, P(*spec))
    w = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32, sharding=lies(None, "model", None))
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=lies("data", "model"))

    def fn(x, ws):
        step = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), lies("data", "model")), None)
        return jax.lax.scan(step, x, ws)[0]

    found = Program(jax.jit(fn).lower(x, w).compile().as_text()).collectives
    assert sum(t.count for t in found.values()) >= 3 and set(found) <= {
        "all-reduce",
        "reduce-scatter",
        "all-gather",
        "all-to-all",
    }


def test_no_program():
    with pytest.raises(ValueError, match="expected the text of a compiled program"):
        Program("nothing")


def test_products_convolutions_and_loops():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 3))
    assert flops(lambda x, w: x @ w, x, w) == 2 * 2 * 3 * 3
    assert flops(lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0], x, w) == 5 * 36
    assert flops(jax.jit(lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)), x, w) == 72
    assert flops(jax.grad(lambda w: (x @ w).sum()), w) == 72
    image, kernel = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 2, 6))
    conv = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert flops(conv, image, kernel) == 2 * (3 * 3 * 6) * (3 * 3 * 2)
    sizes = jnp.array([1, 2], jnp.int32)
    ragged = lambda x, w: jax.lax.ragged_dot(x, w, sizes)
    assert flops(ragged, jnp.ones((3, 4)), jnp.ones((2, 4, 5))) == 2 * 3 * 4 * 5


def test_what_is_computed_again_counts_again():
    w = jnp.ones((4, 4))
    layer = lambda x: jnp.sin(jnp.sin(x @ w) @ w)
    plain = flops(jax.grad(lambda x: layer(x).sum()), jnp.ones((2, 4)))
    again = flops(jax.grad(lambda x: jax.checkpoint(layer)(x).sum()), jnp.ones((2, 4)))
    product = 2 * 2 * 4 * 4
    assert plain == 4 * product and again in (6 * product, 5 * product)


def test_agrees_with_xla_on_a_program_without_loops():
    x, w = np.ones((16, 32), np.float32), np.ones((32, 64), np.float32)
    fn = jax.grad(lambda w: ((jnp.sin(x @ w) @ w.T) ** 2).sum())
    counted = jax.jit(fn).lower(w).compile().cost_analysis()["flops"]
    assert 0.8 < flops(fn, w) / counted < 1.2
