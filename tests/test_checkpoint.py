"""Saving and loading: the identity, and an error for everything else."""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from peftjax import checkpoint
from peftjax.checkpoint import ARRAYS, FORMAT, PAGE, load, save
from peftjax.fingerprint import fingerprint
from peftjax.flat import extract, insert
from peftjax.method import chain
from peftjax.methods.dora import dora
from peftjax.methods.lora import lora
from peftjax.methods.selective import full, head
from peftjax.methods.unfreeze import unfreeze
from peftjax.methods.vera import vera
from peftjax.roles import Role, Roles, roles
from peftjax.switches import lock, scale, with_key
from peftjax.tree import combine, partition, strip

METHODS = {
    "lora": lora(rank=2, targets=".*kernel", dropout=0.1),
    "pissa": lora(rank=2, targets=".*kernel", init="pissa"),
    "lora_fa": lora(rank=2, targets=".*kernel", train_a=False),
    "chain": chain(lora(rank=2, targets=".*kernel"), unfreeze(".*bias")),
}


def params(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A small model."""
    kernel = jax.random.normal(jax.random.key(seed), (4, 3)).astype(dtype)
    return {"a": {"kernel": kernel, "bias": -jnp.zeros(3)}, "b": [{"kernel": kernel.T}], "n": None, "i": jnp.int32(3)}


def trained(method: Any, tree: Any) -> Any:
    """A tree whose trained fields have moved."""
    tuned = method.init(jax.random.key(1), tree)
    trainable, frozen = partition(tuned)
    return combine(jax.tree.map(lambda x: x + 0.125, trainable), frozen)


def assert_same(x: Any, y: Any) -> None:
    """One structure, and the same bytes."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(tmp_path: Any, method: Any = METHODS["lora"]) -> Any:
    """A folder with an adapter."""
    save(tmp_path / "x", trained(method, params()), method)
    return tmp_path / "x"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_the_identity(tmp_path, name, dtype):
    base, method = params(dtype=dtype), METHODS[name]
    tuned = trained(method, base)
    save(tmp_path / "x", tuned, method)
    again = load(tmp_path / "x", base, method=method)
    assert_same(again, tuned)
    assert all(x is y for x, y in zip(jax.tree.leaves(strip(again)), jax.tree.leaves(base)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


CONTAINERS = {
    "frozen_dict": lambda: FrozenDict(params()),
    "partitioned": lambda: {"kernel": nn.Partitioned(params()["a"]["kernel"], ("x", None))},
    "nnx_state": lambda: nnx.State({"d": nnx.State({"kernel": nnx.Param(params()["a"]["kernel"])})}),
    "numpy": lambda: {"kernel": np.ones((4, 3), np.float32)},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_any_tree(tmp_path, name):
    base = CONTAINERS[name]()
    tuned = trained(METHODS["lora"], base)
    save(tmp_path / "x", tuned, METHODS["lora"])
    assert_same(load(tmp_path / "x", base), tuned)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_fields_lie_as_their_bases_do(tmp_path, axis_type):
    where = NamedSharding(jax.make_mesh((2,), ("x",), axis_types=(axis_type,)), PartitionSpec("x", None))
    base = {"kernel": jax.device_put(params()["a"]["kernel"], where)}
    tuned = trained(METHODS["lora"], {"kernel": params()["a"]["kernel"]})
    save(tmp_path / "x", tuned, METHODS["lora"])
    again = load(tmp_path / "x", base)["kernel"]
    assert again.base is base["kernel"] and again.a.sharding == where
    assert again.b.sharding.is_fully_replicated and again.b.sharding.mesh == where.mesh


def test_scales_and_locks_are_kept_and_dropout_keys_are_not(tmp_path):
    tuned = scale(lock(trained(METHODS["chain"], params()), "a"), 0.5)
    save(tmp_path / "x", with_key(tuned, jax.random.key(0)), METHODS["chain"])
    again = load(tmp_path / "x", params())
    assert_same(again, tuned)
    assert list(extract(again)) == ["b/0/kernel/a", "b/0/kernel/b"]


def test_roles_are_kept(tmp_path):
    base = {"kernel": jnp.ones((4, 2, 3))}
    roles = Roles({"kernel": Role(op="linear", axes="ioo", order=0, uses=("dot_general",))})
    method = lora(rank=2, targets="kernel")
    tuned = method.init(jax.random.key(0), base, roles)
    save(tmp_path / "with", tuned, method, roles)
    save(tmp_path / "without", tuned, method)
    assert_same(load(tmp_path / "with", base), tuned)
    assert_same(load(tmp_path / "without", base, roles), tuned)
    with pytest.raises(ValueError, match="roles"):
        load(tmp_path / "without", base)


def test_fields_of_another_type_are_refused_at_once(tmp_path):
    tuned = trained(METHODS["lora"], params())
    narrow = jax.tree.map(lambda x: x, tuned)
    narrow["a"]["kernel"] = tuned["a"]["kernel"].replace(a=tuned["a"]["kernel"].a.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="(?s)not saved: .*dtype: a/kernel/a is bfloat16, expected float32"):
        save(tmp_path / "x", narrow, METHODS["lora"])


def test_another_base_is_named(tmp_path):
    folder, base = saved(tmp_path), params()
    base["b"][0]["kernel"] = base["b"][0]["kernel"].at[0, 0].add(1e-6)
    base["a"]["bias"] = jnp.zeros(3)
    with pytest.raises(
        ValueError, match=r"made for other parameters:\n  a/bias: other values\n  b/0/kernel: other values$"
    ):
        load(folder, base)
    base = params()
    base["i"], base["more"] = jnp.int16(3), base["a"].pop("bias")
    with pytest.raises(ValueError) as error:
        load(folder, base)
    for line in ("a/bias: missing in the given tree", "i: int16[], expected int32[]", "more: only in the given tree"):
        assert line in str(error.value)
    with pytest.raises(ValueError, match=r"and 2 more"):
        save(
            tmp_path / "y",
            trained(METHODS["lora"], {f"{k}/kernel": jnp.ones((4, 3)) for k in range(7)}),
            METHODS["lora"],
        )
        load(tmp_path / "y", {f"{k}/kernel": jnp.zeros((4, 3)) for k in range(7)})


def test_the_fingerprint_does_not_depend_on_the_container():
    plain, boxed = params(), FrozenDict(params())
    assert fingerprint(plain) == fingerprint(boxed)
    assert fingerprint({"w": jnp.zeros((2, 3))}) != fingerprint({"w": jnp.zeros((3, 2))})
    assert fingerprint({"w": jnp.zeros((0, 3))})["leaves"]["w"][0] == "float32[0,3]"
    assert fingerprint({"k": jax.random.key(0)}) != fingerprint({"k": jax.random.key(1)})


def test_another_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"another method than asked for(.|\n)*'rank': 2(.|\n)*'rank': 4"):
        load(saved(tmp_path), params(), method=lora(rank=4, targets=".*kernel", dropout=0.1))


def rewrite(folder: Any, **changes: Any) -> None:
    """Changes the page as one who knows its checksum."""
    page = json.loads((folder / PAGE).read_text()) | changes
    page = {k: v for k, v in page.items() if v is not ...}
    page["checksum"] = checkpoint._checksum(page)
    (folder / PAGE).write_text(json.dumps(page))


def cut(path: Any) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Any) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / PAGE).unlink(), "no adapter.json; expected a folder that `save` wrote"),
        (lambda f: (f / ARRAYS).unlink(), "no adapter.safetensors"),
        (lambda f: cut(f / PAGE), "adapter.json is damaged"),
        (lambda f: flip(f / PAGE), "adapter.json is damaged|missing keys"),
        (lambda f: (f / PAGE).write_bytes(b"\xff\xfe\x00"), "adapter.json is damaged"),
        (lambda f: (f / PAGE).write_text("[1]"), "has format None, expected 1"),
        (lambda f: cut(f / ARRAYS), "adapter.safetensors is damaged"),
        (lambda f: flip(f / ARRAYS), "adapter.safetensors is damaged"),
        (lambda f: (f / ARRAYS).write_bytes(b""), "adapter.safetensors is damaged"),
        (lambda f: rewrite(f, format=FORMAT + 1), "has format 2, expected 1"),
        (lambda f: rewrite(f, extra=1), r"missing keys \[\], unknown keys \['extra'\]"),
        (lambda f: rewrite(f, locked=...), r"missing keys \['locked'\], unknown keys \[\]"),
        (lambda f: rewrite(f, method={"name": "loro", "options": {}}), "unknown method 'loro'"),
        (lambda f: rewrite(f, method={"name": "lora", "options": {"rang": 2}}), "method 'lora': .*rang"),
    ],
)
def test_damage_is_said(tmp_path, damage, said):
    folder = saved(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=said):
        load(folder, params())


def test_arrays_that_do_not_fit_are_listed(tmp_path):
    folder = saved(tmp_path)
    arrays = load_file(folder / ARRAYS)
    arrays["a/kernel/c"] = arrays.pop("a/kernel/a")
    arrays["a/kernel/b"] = np.ascontiguousarray(arrays["a/kernel/b"].T)
    arrays["b/0/kernel/b"][0, 0] = np.nan
    save_file(arrays, folder / ARRAYS)
    rewrite(folder, arrays=checkpoint._digest_file(folder / ARRAYS))
    with pytest.raises(ValueError) as error:
        load(folder, params())
    for line in ("missing: a/kernel/a", "unknown: a/kernel/c", "shape: a/kernel/b", "not finite: b/0/kernel/b"):
        assert line in str(error.value)


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path):
    folder = saved(tmp_path)
    other = insert(tuned := trained(METHODS["lora"], params()), {k: x + 1 for k, x in extract(tuned).items()})
    save(str(folder) + "/", other, METHODS["lora"])
    assert_same(load(folder, params()), other)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an adapter"):
        save(folder, other, METHODS["lora"])
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="holds something else"):
        save(folder / "notes.txt", other, METHODS["lora"])
    save(tmp_path / "new" / "deep", other, METHODS["lora"])
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", other, METHODS["lora"])
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save(tmp_path / "link", tuned, METHODS["lora"])
    assert (tmp_path / "link").is_symlink()
    assert_same(load(tmp_path / "empty", params()), tuned)


@pytest.mark.parametrize("where", ["save_file", "_checksum"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, where):
    folder = saved(tmp_path)

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, where, fail)
        with pytest.raises(OSError):
            save(folder, trained(METHODS["lora"], params(5)), METHODS["lora"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]
    assert_same(load(folder, params()), trained(METHODS["lora"], params()))


def test_saving_refuses(tmp_path):
    tuned = trained(METHODS["lora"], params())
    leaf = tuned["a"]["kernel"]
    broken = tuned | {"a": {"kernel": leaf.replace(a=leaf.a.at[0, 0].set(jnp.nan))}}
    with pytest.raises(ValueError, match="NaN or an infinity: a/kernel/a"):
        save(tmp_path / "x", broken, METHODS["lora"])
    with pytest.raises(ValueError, match="nothing to save"):
        save(tmp_path / "x", params(), METHODS["lora"])
    assert not list(tmp_path.iterdir())


def test_a_method_that_did_not_make_the_tree_is_refused_at_once(tmp_path):
    tuned = trained(lora(rank=2, targets=".*kernel"), params())
    for method, said in (
        (lora(rank=1, targets=".*kernel"), r"shape: .*kernel/a is \(.*, 2\), expected \(.*, 1\)"),
        (unfreeze(".*bias"), r"missing: .*bias/value.*\n.*unknown: .*kernel/a"),
    ):
        with pytest.raises(ValueError, match=f"(?s)not saved: this tree is not what {method.name}.*{said}"):
            save(tmp_path / "x", tuned, method)
    assert not list(tmp_path.iterdir())


def test_targets_by_a_function_are_named_where_they_cannot_be_saved(tmp_path):
    chosen = lambda path, role: path.endswith("kernel")
    tuned = trained(lora(rank=2, targets=chosen), params())
    with pytest.raises(ValueError, match=r"not saved: lora\(targets=\).*such as targets='(.*)'") as caught:
        save(tmp_path / "x", tuned, lora(rank=2, targets=chosen))
    method = lora(rank=2, targets=str(caught.value).rpartition("targets='")[2][:-1])
    save(tmp_path / "x", tuned, method)
    assert_same(load(tmp_path / "x", params()), tuned)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(5, name="head")(nn.MultiHeadDotProductAttention(2, name="attention")(x, x))


SOME = [lora(rank=2), dora(rank=2), vera(rank=3), chain(lora(rank=2), head()), full(), lora(rank=2, bias=True)]


@pytest.mark.third_party
@pytest.mark.parametrize("method", SOME, ids=lambda method: f"{method.name}{len(method.options)}")
def test_a_tree_that_roles_made_is_saved_without_them(method: Any, tmp_path: Any) -> None:
    """The head is no target, biases have two axes and kernels three: the method by itself would have chosen others."""
    x, model = jnp.ones((2, 4, 6)), Attention()
    tree = jax.jit(model.init)(jax.random.key(0), x)["params"]
    found = roles(lambda p, x: model.apply({"params": p}, x), tree, x)
    tuned = method.init(jax.random.key(1), tree, found)
    save(tmp_path / "x", tuned, method)
    assert_same(load(tmp_path / "x", tree, found), tuned)
    with pytest.raises(ValueError, match="holds an overlay already: expected the plain parameters"):
        load(tmp_path / "x", tuned)


def test_without_roles_another_rank_is_not_saved(tmp_path: Any) -> None:
    x, model = jnp.ones((2, 4, 6)), Attention()
    tree = jax.jit(model.init)(jax.random.key(0), x)["params"]
    tuned = lora(rank=2).init(jax.random.key(1), tree, roles(lambda p, x: model.apply({"params": p}, x), tree, x))
    with pytest.raises(ValueError, match=r"attention/key/kernel/a is \(6, 2\), expected \(6, 3\)"):
        save(tmp_path / "x", tuned, lora(rank=3))
    assert not (tmp_path / "x").exists()


def test_roles_of_another_tree_are_refused() -> None:
    other = Roles({"w": Role("linear", "io", 0)})
    with pytest.raises(ValueError, match=r"w is float32\[4,4,4\], and the roles say axes 'io'; expected the roles of this"):
        lora(rank=2).init(jax.random.key(0), {"w": jnp.ones((4, 4, 4))}, other)
