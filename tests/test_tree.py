"""The tuned tree: taking it apart, putting it together, merging, switching, counting, grafting."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peftjax as pj
import pytest
from flax import nnx
from flax.core import FrozenDict

from peftjax.evaluate import wrap
from peftjax.flat import extract, insert
from peftjax.gradient import value_and_grad
from peftjax.grafting import graft
from peftjax.merging import merge
from peftjax.methods.lora import LoRA
from peftjax.copies import Full
from peftjax.overlay import Overlay, Ref, frozen, is_overlay, overlay, static, trained
from peftjax.summary import count, describe
from peftjax.switches import disable, lock, scale, with_key
from peftjax.tree import combine, labels, mask, partition, resolve, strip


@overlay
class Shift(Overlay):
    """An output overlay that shares its network with others."""

    base: Any = frozen()
    net: Any = trained()
    scale: Any = frozen()
    locked: tuple[str, ...] = static(default=())

    merges = False


def lora_on(w: Any, seed: int = 0, dropout: float = 0.0, stacked: int = 0) -> LoRA:
    """A LoRA of rank 2 whose B is not zero."""
    lead = (stacked,) if stacked else ()
    n_in, n_out = (w.type if is_overlay(w) else w).shape[-2:]
    a = jax.random.normal(jax.random.key(seed), (*lead, n_in, 2))
    b = jax.random.normal(jax.random.key(seed + 1), (*lead, 2, n_out))
    axes = "sio" if stacked else "io"
    return LoRA(base=w, a=a, b=b, scale=jnp.full(lead, 0.5, jnp.float32), axes=axes, dropout=dropout)


def full_on(w: Any) -> Full:
    """A trained copy."""
    return Full(base=w, value=jnp.array(w, jnp.float32, copy=True), scale=jnp.ones(()), axes="io"[-w.ndim :])


def kernel(seed: int = 9, dtype: Any = jnp.float32) -> jax.Array:
    """A kernel of shape (4, 3)."""
    return jax.random.normal(jax.random.key(seed), (4, 3)).astype(dtype)


def plain() -> dict[str, Any]:
    """Pretrained parameters, one of them absent, one an integer, one a negative zero."""
    return {
        "layers": [{"kernel": kernel(), "bias": -jnp.zeros(3)}],
        "step": jnp.int32(7),
        "none": None,
        "t": (kernel(1),),
    }


def tree() -> dict[str, Any]:
    """They, tuned."""
    params = plain()
    layer = params["layers"][0]
    return params | {"layers": [{"kernel": lora_on(layer["kernel"]), "bias": full_on(layer["bias"])}]}


def boxed(x: Any) -> Any:
    """An array, or an overlay, in a box with names."""
    return nn.Partitioned(x, names=("in", "out"))


def state(x: Any) -> Any:
    """An NNX state that holds x."""
    return nnx.State({"dense": nnx.State({"kernel": nnx.Param(x)}), "count": nnx.Param(jnp.ones(2))})


CONTAINERS = {
    "dict": tree,
    "frozen_dict": lambda: FrozenDict(tree()),
    "partitioned": lambda: {"kernel": boxed(lora_on(kernel())), "plain": boxed(kernel())},
    "nnx_state": lambda: state(lora_on(kernel())),
    "nested": lambda: [lora_on(lora_on(kernel()), 5)],
    "leaf": lambda: lora_on(kernel()),
    "nothing": lambda: {"w": kernel(), "n": None},
}


def same(x: Any, y: Any) -> bool:
    """Whether two trees have one structure and the very same leaves."""
    leaves = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return jax.tree.structure(x) == jax.tree.structure(y) and all(a is b for a, b in leaves)


@pytest.mark.parametrize("name", CONTAINERS)
def test_parts_make_the_whole(name):
    tuned = CONTAINERS[name]()
    trainable, frozen = partition(tuned)
    assert same(combine(trainable, frozen), tuned)
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(tuned))
    assert same(partition(trainable)[0], trainable) and not jax.tree.leaves(partition(frozen)[0])
    assert jax.tree.leaves(trainable) == [x for x, m in zip(jax.tree.leaves(tuned), jax.tree.leaves(mask(tuned))) if m]
    assert jax.tree.structure(labels(tuned)) == jax.tree.structure(mask(tuned)) == jax.tree.structure(tuned)
    assert {"train": True, "freeze": False}[jax.tree.leaves(labels(tuned))[-1]] == jax.tree.leaves(mask(tuned))[-1]
    assert same(insert(tuned, extract(tuned)), tuned)


def test_combine_refuses_the_whole_tree_as_a_part():
    with pytest.raises(ValueError, match="both parts hold an array at .*layers.*bias"):
        combine(partition(tree())[0], tree())


def test_a_part_in_the_place_of_the_whole_names_combine(tmp_path):
    params = {"b": jnp.ones(2), "w": jnp.ones((3, 2))}
    fn = lambda p, x: x @ p["w"]
    tuned = pj.chain(pj.lora(rank=1), pj.unfreeze("b")).init(jax.random.key(0), params)
    for part, said in zip(pj.partition(tuned), ("b holds a Full without its base", "b holds a Full without its value")):
        for use in (
            lambda: pj.merge(part),
            lambda: pj.wrap(fn)(part, jnp.ones((1, 3))),
            lambda: pj.save(tmp_path / "adapter", part, pj.lora()),
        ):
            with pytest.raises(ValueError, match=f"{said}.*peftjax.combine"):
                use()
    with pytest.raises(ValueError, match="'b/value': array.*found NoneType.*`combine"):
        pj.insert(tuned, None)
    assert not list(tmp_path.iterdir())


def test_strip_returns_the_very_buffers():
    w = kernel()
    assert strip({"k": lora_on(lora_on(w), 4), "v": w})["k"] is w
    assert strip(state(lora_on(w)))["dense"]["kernel"].get_value() is w
    assert strip({"k": boxed(lora_on(w))})["k"].value is w


def test_donating_what_trains_leaves_the_weights_alive():
    params = {"w": kernel(), "b": jnp.ones(3)}
    tuned = {"w": lora_on(params["w"]), "b": full_on(params["b"])}
    trainable, frozen = partition(tuned)
    step = jax.jit(lambda t, f: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    after = combine(step(trainable, frozen), frozen)
    assert after["w"].base is params["w"] and not params["w"].is_deleted() and not params["b"].is_deleted()
    np.testing.assert_array_equal(after["b"].value, params["b"] + 1)


def test_jit_once_over_the_parts():
    trainable, frozen = partition(tree())
    step = jax.jit(lambda t, f: jax.tree.map(lambda x: x * 2, t))
    for f in (frozen, partition(disable(tree()))[1], partition(scale(tree(), 0.3))[1]):
        trainable = step(trainable, f)
    assert step._cache_size() == 1


def test_names_of_nested_overlays_and_of_field_trees():
    tuned = {"k": lora_on(lora_on(kernel()), 4), "s": Shift(base=kernel(), net={"up": jnp.ones(2)}, scale=jnp.ones(()))}
    assert list(extract(tuned)) == ["k/base/a", "k/base/b", "k/a", "k/b", "s/net/up"]
    assert list(extract(boxed(lora_on(kernel())))) == ["a", "b"]
    assert list(extract(state(lora_on(kernel())))) == ["dense/kernel/a", "dense/kernel/b"]
    assert list(extract({"v": full_on(kernel())})) == ["v/value"]


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two arrays of this tree have the path 'a/b/a'"):
        extract({"a": {"b": lora_on(kernel())}, "a/b": lora_on(kernel())})


def test_insert_lists_everything_that_is_wrong():
    flat = extract({"k": lora_on(kernel()), "v": lora_on(kernel())})
    flat["k/aa"] = flat.pop("k/a")
    flat["k/b"] = flat["k/b"].T
    flat["v/a"] = np.asarray(flat["v/a"]).astype(np.float16)
    flat["v/b"] = flat["v/b"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError) as error:
        insert({"k": lora_on(kernel()), "v": lora_on(kernel())}, flat)
    for line in (
        "missing: k/a",
        "unknown: k/aa (nearest: k/a",
        "shape: k/b is (3, 2), expected (2, 3)",
        "dtype: v/a is float16, expected float32",
        "not finite: v/b",
    ):
        assert line in str(error.value)
    with pytest.raises(ValueError, match="not an array: a is a float"):
        insert(lora_on(kernel()), {"a": 1.0, "b": flat["v/b"]})


def test_insert_copies_numpy_arrays():
    given = {k: np.array(x) for k, x in extract(lora_on(kernel())).items()}
    tuned = insert(lora_on(kernel()), given)
    before = np.array(tuned.a)
    given["a"][:] = 0
    np.testing.assert_array_equal(tuned.a, before)


def test_insert_under_jit():
    tuned = lora_on(kernel())
    np.testing.assert_array_equal(jax.jit(lambda f: insert(tuned, f).a)(extract(tuned)), tuned.a)


def test_merge_is_the_sum_in_float32():
    w = kernel(dtype=jnp.bfloat16)
    x = lora_on(lora_on(w), 4)
    merged, report = merge({"k": x, "t": kernel()}, report=True)
    exact = w.astype(jnp.float32) + 0.5 * (x.base.a @ x.base.b) + 0.5 * (x.a @ x.b)
    assert merged["k"].dtype == jnp.bfloat16 and list(report) == ["k"]
    np.testing.assert_array_equal(merged["k"], exact.astype(jnp.bfloat16))
    np.testing.assert_allclose(
        report["k"].error,
        jnp.linalg.norm(merged["k"].astype(jnp.float32) - exact) / jnp.linalg.norm(exact),
        rtol=1e-4,
    )
    assert 0 < report["k"].error < 2**-8 and "rounding" in str(report["k"])


def test_merge_reports_changes_that_rounding_undid():
    base = jnp.ones((4, 3), jnp.bfloat16)
    delta = jnp.zeros((4, 3)).at[0].set(2**-12).at[1].set(1.0)
    tuned = {"w": Full(base=base, value=base.astype(jnp.float32) + delta, scale=jnp.ones(()), axes="io"[-base.ndim :])}
    merged, report = merge(tuned, report=True)
    assert float(report["w"].unchanged) == 0.5
    assert merge({"w": full_on(kernel())}, report=True)[1]["w"] == (0.0, 0.0)


def test_merge_keeps_the_boxes_and_works_under_jit():
    x = lora_on(kernel())
    expected = x.base + 0.5 * (x.a @ x.b)
    np.testing.assert_allclose(merge({"k": boxed(x)})["k"].value, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(merge)(state(x))["dense"]["kernel"].get_value(), expected, rtol=1e-6)
    np.testing.assert_array_equal(merge({"k": with_key(lora_on(kernel(), 0, 0.5), jax.random.key(0))})["k"], merge(x))


def test_merge_lies_where_the_base_lay():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    assert merge(lora_on(jax.device_put(kernel(), where))).sharding == where


def test_merge_refuses_by_path():
    shift = Shift(base=kernel(), net=jnp.ones(3), scale=jnp.ones(()))
    with pytest.raises(ValueError, match=r"no weight can say what these overlays do: q/k \(Shift\).*wrap\(fn\)"):
        merge({"q": {"k": shift, "v": lora_on(kernel())}})
    x = lora_on(kernel())
    with pytest.raises(ValueError, match="NaN or an infinity: v/b"):
        merge({"v": x.replace(b=x.b.at[0, 0].set(jnp.inf))})
    with pytest.raises(ValueError, match="NaN or an infinity: v/base"):
        merge({"v": lora_on(kernel().at[0, 0].set(jnp.nan))})
    narrow = lora_on(jnp.full((3, 4), 6e4, jnp.float16))
    with pytest.raises(ValueError, match="beyond what their dtype holds: v"):
        merge({"v": narrow.replace(a=jnp.ones_like(narrow.a), b=jnp.full_like(narrow.b, 1e4))})


def test_references_share_one_array_and_one_gradient():
    first = Shift(base=kernel(), net=jnp.arange(3.0), scale=jnp.ones(()))
    tuned = {"a": first, "b": Shift(base=kernel(), net=Ref("a", "net"), scale=jnp.ones(()))}
    assert list(extract(tuned)) == ["a/net"] and same(combine(*partition(tuned)), tuned)
    assert resolve(tuned)["b"].net is first.net and resolve({"a": first})["a"] is first

    def loss(tuned: Any) -> Any:
        whole = resolve(tuned)
        return (whole["a"].net * whole["b"].net).sum()

    grads = value_and_grad(loss)(tuned)[1]
    np.testing.assert_array_equal(grads["a"].net, 2 * first.net)
    assert len(jax.tree.leaves(grads)) == 1


def test_a_reference_to_a_leaf_is_what_the_leaf_stands_for():
    """An array is itself; under an overlay that trains, both uses of the leaf add to its one gradient."""
    shift = Shift(base=kernel(), net=Ref("g"), scale=jnp.ones(()))
    plain = jnp.arange(3.0)
    assert resolve({"a": shift, "g": plain})["a"].net is plain
    tuned = {"a": shift, "g": full_on(plain), "h": shift.replace(net=Ref("a", "net"))}
    assert list(extract(tuned)) == ["g/value"]

    def loss(tuned: Any) -> Any:
        whole = resolve(tuned)
        return (whole["a"].net * whole["h"].net).sum()

    np.testing.assert_array_equal(value_and_grad(loss)(tuned)[1]["g"].value, 2 * plain)
    abstract = jax.eval_shape(lambda: tuned)
    assert resolve(abstract)["a"].net.shape == (3,)


def test_what_passes_through_keeps_its_references():
    """A model that returns its state gives back the tree that it was given, not one with the array in two places."""
    first = lora_on(kernel())
    tuned = {"a": first, "b": first.replace(b=Ref("a", "b"))}
    _, back = wrap(lambda p, x: (x @ p["a"] @ p["b"].T, p))(tuned, jnp.ones((2, 4)))
    assert back["a"] is tuned["a"] and back["b"] is tuned["b"]


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (Ref("c", "net"), "'net' at 'c', where there is no overlay"),
        (Ref("a", "up"), "no overlay at 'a' holds the field 'up'"),
        (Ref("b", "net"), "go in a circle"),
        (Ref("c"), "the leaf 'c', which is not there"),
        (Ref("a"), "the leaf 'a', for which no array can stand: it holds Shift"),
        (Ref("n", "a"), "2 overlays at 'n' hold a field 'a'"),
    ],
)
def test_references_that_lead_nowhere(net, said):
    shift = Shift(base=kernel(), net=jnp.ones(3), scale=jnp.ones(()))
    with pytest.raises(ValueError, match=said):
        resolve({"a": shift, "b": shift.replace(net=net), "n": lora_on(lora_on(kernel()))})


def test_gradient_of_what_trains_alone():
    tuned = {"w": lora_on(kernel()), "b": full_on(jnp.ones(3)), "n": jnp.int32(2), "none": None}
    apply = wrap(lambda p, x: (x @ p["w"] + p["b"][None]) * p["n"].astype(jnp.float32))
    value, grads = value_and_grad(lambda t, x: apply(t, x).sum())(tuned, jnp.ones((2, 4)))
    assert jax.tree.structure(grads) == jax.tree.structure(partition(tuned)[0])
    np.testing.assert_allclose(grads["b"].value, jnp.full(3, 4.0))
    (value2, aux), _ = value_and_grad(lambda t, x: (apply(t, x).sum(), 5), has_aux=True)(tuned, jnp.ones((2, 4)))
    assert value2 == value and aux == 5
    with pytest.raises(ValueError, match="nothing in this tree trains"):
        value_and_grad(lambda t: 0.0)(lock(tuned))


def test_lock():
    tuned = {"q": {"w": lora_on(kernel())}, "v": {"w": lora_on(lora_on(kernel()), 4)}}
    assert list(extract(lock(tuned, "v"))) == ["q/w/a", "q/w/b"]
    assert not extract(lock(tuned)) and same(strip(lock(tuned)), strip(tuned))
    assert list(extract(lora_on(lock(lora_on(kernel()))))) == ["a", "b"]
    with pytest.raises(ValueError, match="'q/ww' matches no leaf; .* closest: q/w"):
        lock(tuned, "q/ww")


def test_scale_and_disable_act_on_every_layer_and_keep_the_types():
    tuned = {"k": lora_on(lora_on(kernel()), 4), "n": None, "w": kernel()}
    half, off = scale(tuned, 0.5), disable(tuned)
    assert float(half["k"].scale) == float(half["k"].base.scale) == 0.25
    assert same(partition(off)[0], partition(tuned)[0])
    np.testing.assert_array_equal(merge(off)["k"], strip(tuned)["k"])
    for other in (half, off, scale(tuned, jnp.float32(2)), scale(tuned, 2)):
        assert jax.tree.structure(other) == jax.tree.structure(tuned)
        assert list(map(jax.typeof, jax.tree.leaves(other))) == list(map(jax.typeof, jax.tree.leaves(tuned)))
    for wrong in (jnp.ones(2), float("nan")):
        with pytest.raises(ValueError, match="expected a finite number"):
            scale(tuned, wrong)


def test_keys_differ_by_path_depth_and_layer_and_are_reproducible():
    stack = jnp.ones((5, 4, 3))
    tuned = {
        "k": lora_on(lora_on(kernel(), 0, 0.1), 4, 0.1),
        "q": lora_on(kernel(), 0, 0.1),
        "s": lora_on(stack, 0, 0.1, stacked=5),
        "off": lora_on(kernel()),
        "full": full_on(kernel()),
    }
    keyed = with_key(tuned, jax.random.key(3))
    keys = [keyed["k"].key, keyed["k"].base.key, keyed["q"].key, *keyed["s"].key]
    assert len({tuple(map(int, jax.random.key_data(k))) for k in keys}) == 8
    assert keyed["s"].key.shape == (5,) and keyed["off"].key is None
    again = with_key(keyed, jax.random.key(3))
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(keyed), jax.tree.leaves(again)))
    assert same(with_key(keyed, None), tuned)
    assert with_key(tuned, jax.random.PRNGKey(3))["q"].key == keyed["q"].key
    assert same(combine(*partition(keyed)), keyed) and count(keyed) == count(tuned)


def test_count_and_describe():
    tuned = tree() | {"locked": lock(lora_on(kernel()))}
    counted = count(tuned)
    assert counted.trainable == 4 * 2 + 2 * 3 + 3
    assert counted.total == counted.trainable + counted.frozen == 17 + 12 + 3 + 1 + 12 + (12 + 14)
    assert count(jax.eval_shape(lambda: tuned)) == counted
    table = describe(tuned)
    assert str(counted) in table and "17 of 71 parameters train (23.944%)" in table
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert lines["layers/0/kernel"].split() == "layers/0/kernel float32[4,3] LoRA(rank=2) 14".split()
    assert "LoRA(rank=2, locked)" in lines["locked"] and lines["step"].split()[1:] == ["int32[]", "-", "-"]
    assert "LoRA(rank=2) over LoRA(rank=2)" in describe(CONTAINERS["nested"]())


def test_graft():
    old = {"body": {"kernel": kernel(1)}, "head": {"kernel": kernel(2)}, "lm": jnp.ones(2)}
    new = FrozenDict({"body": {"kernel": boxed(kernel(3))}, "head": {"kernel": jnp.ones((4, 7))}})
    made = graft(old, new, replace=("head", "lm"))
    assert made["body"]["kernel"].value is old["body"]["kernel"] and made["head"]["kernel"] is new["head"]["kernel"]
    assert isinstance(made, FrozenDict)
    shapes = jax.eval_shape(lambda: new)
    assert (
        graft(old, dict(shapes) | {"head": new["head"]}, replace="head|lm")["body"]["kernel"].value
        is old["body"]["kernel"]
    )
    assert graft({"k": lora_on(kernel())}, {"k": kernel()})["k"].base is not None
    assert graft(state(kernel(1)), state(kernel(2)))["dense"]["kernel"].get_value() is not None


def test_graft_lists_everything_that_differs():
    old = {"body": kernel(1), "heed": jnp.ones(2)}
    new = {"body": jnp.ones((4, 4)), "head": jnp.ones(2), "new": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(ValueError) as error:
        graft(old, new, replace=("new", "tail"))
    for line in (
        "'tail' matches no path",
        "body is (4, 3) in the pretrained tree, (4, 4) in the fresh one",
        "head is not in the pretrained tree (nearest: heed",
        "heed is in the pretrained tree alone",
        "new stays fresh, but is a shape",
    ):
        assert line in str(error.value)
