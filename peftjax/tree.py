"""What trains and what does not: the tuned tree in two, in masks, and back to the tree it was made from."""

from typing import Any, Callable, NamedTuple

import jax

from peftjax.overlay import Overlay, Ref, is_key, is_overlay, layers
from peftjax.paths import flatten, path_of
from peftjax.weight import materialise


class Entry(NamedTuple):
    """One array of a tuned tree: the leaf it belongs to and, inside an overlay, its field (`a`, `base/a`)."""

    path: str
    field: str
    value: Any
    trains: bool

    @property
    def key(self) -> str:
        """`path/field`; the overlay below the first one on a leaf is `path/base/field`, and so on."""
        return "/".join(filter(None, (self.path, self.field)))

    @property
    def is_base(self) -> bool:
        """Whether this is an array of the tree that the overlays were laid on."""
        return set(self.field.split("/")) <= {"", "base"}

    @property
    def is_key(self) -> bool:
        """Whether this is a random key."""
        return is_key(self.value)


def entries(tuned: Any) -> list[Entry]:
    """Every array of a tuned tree, in the order of `jax.tree.leaves`."""
    trains = iter(jax.tree.leaves(mask(tuned)))
    made = []
    for path, leaf in flatten(tuned):
        for where, value in jax.tree_util.tree_flatten_with_path(leaf)[0]:
            made.append(Entry(path, jax.tree_util.keystr(where, simple=True, separator="/"), value, next(trains)))
    return made


def map_leaves(change: Callable[[str, Any], Any], tuned: Any) -> Any:
    """The tree with `change(path, leaf)` in the place of every leaf, an overlay or an array."""
    found, tree = jax.tree_util.tree_flatten_with_path(tuned, is_leaf=is_overlay)
    return jax.tree.unflatten(tree, [change(path_of(where), leaf) for where, leaf in found])


def map_layers(change: Callable[[str, Overlay], Any], tuned: Any) -> Any:
    """The tree with `change(path, overlay)` in the place of every overlay, those below others too, innermost first.

    The path of an overlay below another ends in `/base`.
    """

    def changed(path: str, x: Any) -> Any:
        return change(path, x.replace(base=changed(f"{path}/base", x.base))) if isinstance(x, Overlay) else x

    return map_leaves(changed, tuned)


def mask(tuned: Any) -> Any:
    """Says for every array whether it trains, for `optax.masked`.

    Args:
      tuned: a tree with overlays, or gradients and updates of its shape: the tree alone says what trains.

    Returns:
      The same tree with a bool in the place of every array.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.mask(tuned)["b"].value, pj.mask(tuned)["b"].base, pj.mask(tuned)["w"]
      (True, False, False)
    """
    return jax.tree.map(lambda x: _marked(x) if isinstance(x, Overlay) else False, tuned, is_leaf=is_overlay)


def _marked(x: Overlay) -> Any:
    def marked(name: str) -> Any:
        mark = lambda y: _marked(y) if isinstance(y, Overlay) else name in x.trained_fields
        return jax.tree.map(mark, getattr(x, name), is_leaf=is_overlay)

    return x.replace(**{name: marked(name) for name, kind in x.kinds.items() if kind != "static"})


def labels(tuned: Any) -> Any:
    """Says "train" or "freeze" for every array, for `optax.partition`.

    Only `optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels(tuned))` is right in a loop over the full
    tree, and it still adds 0.0 to what is frozen, which turns -0.0 into 0.0; `train_only` does not.

    Args:
      tuned: a tree with overlays.

    Returns:
      The same tree with a string in the place of every array.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> pj.labels(tuned)["b"].value, pj.labels(tuned)["w"]
      ('train', 'freeze')
    """
    return jax.tree.map(lambda trains: "train" if trains else "freeze", mask(tuned))


def partition(tuned: Any) -> tuple[Any, Any]:
    """Splits a tuned tree into what trains and what is frozen; no array is copied.

    Args:
      tuned: a tree with overlays, or anything of its shape (gradients, updates, shardings).

    Returns:
      (trainable, frozen): the same tree twice; where an array belongs to the other, it is None.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> trainable, frozen = pj.partition(tuned)
      >>> trainable["w"] is None, frozen["b"].value is None, frozen["w"] is tuned["w"]
      (True, True, True)
    """
    marks = mask(tuned)
    take = lambda wanted: jax.tree.map(lambda trains, x: x if trains is wanted else None, marks, tuned)
    return take(True), take(False)


def combine(trainable: Any, frozen: Any) -> Any:
    """Puts the two parts of a tuned tree together again: the inverse of `partition`.

    Args:
      trainable: the first part, as `partition` made it or with new values.
      frozen: the second part.

    Returns:
      The tuned tree.

    Raises:
      ValueError: both parts hold an array at the same place, or their trees differ.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), {"b": jnp.ones(2), "w": jnp.ones((2, 2))})
      >>> again = pj.combine(*pj.partition(tuned))
      >>> all(x is y for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(tuned)))
      True
    """

    def either(where: Any, x: Any, y: Any) -> Any:
        if x is not None and y is not None:
            raise ValueError(
                f"both parts hold an array at {jax.tree_util.keystr(where)}: expected (trainable, frozen) of one "
                "`partition`. Is one of them the whole tree?"
            )
        return y if x is None else x

    return jax.tree_util.tree_map_with_path(either, trainable, frozen, is_leaf=lambda x: x is None)


def check_whole(tuned: Any) -> None:
    """Raises if a tree is one part of `partition`: its overlays have no base, or nothing of what trains."""
    for path, leaf in flatten(tuned):
        for x in layers(leaf):
            held = jax.tree.leaves(
                [getattr(x, name) for name in x.trained_fields], is_leaf=lambda y: isinstance(y, Ref)
            )
            if x.base is None or (x.trained_fields and not held):
                part, lacks = ("trainable", "base") if x.base is None else ("frozen", ", ".join(x.trained_fields))
                raise ValueError(
                    f"{path} holds a {type(x).__name__} without its {lacks}: this is the {part} part of a tuned tree; "
                    "expected the whole, `peftjax.combine(trainable, frozen)`"
                )


def strip(tuned: Any) -> Any:
    """The tree that the overlays were laid on: the very buffers first passed to `init`.

    Args:
      tuned: a tree with overlays.

    Returns:
      The tree without them; nothing is computed and nothing copied.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {"b": jnp.ones(2), "w": jnp.ones((2, 2))}
      >>> tuned = pj.unfreeze("b").init(jax.random.key(0), params)
      >>> pj.strip(tuned)["b"] is params["b"]
      True
    """
    return jax.tree.map(lambda x: x.bottom if isinstance(x, Overlay) else x, tuned, is_leaf=is_overlay)


def resolve(tuned: Any) -> Any:
    """Puts the arrays that fields of other overlays hold, or other leaves stand for, in the place of references to them.

    Args:
      tuned: a tree with overlays.

    Returns:
      The same tree without a `Ref`. An array named twice stands there twice, so gradients are taken before, not after.

    Raises:
      ValueError: a reference names no leaf, a leaf that no array can stand for, or a field that not exactly one overlay
        holds there.
    """
    of_fields = lambda x: isinstance(x, Ref) and x.field is not None
    of_leaves = lambda x: isinstance(x, Ref) and x.field is None
    if any(map(of_fields, jax.tree.leaves(tuned, is_leaf=of_fields))):
        holders = {path: leaf for path, leaf in flatten(tuned) if isinstance(leaf, Overlay)}
        tuned = jax.tree.map(lambda x: _named(x, holders) if of_fields(x) else x, tuned, is_leaf=of_fields)
    if any(map(of_leaves, jax.tree.leaves(tuned, is_leaf=of_leaves))):
        leaves = dict(flatten(tuned))
        tuned = jax.tree.map(lambda x: _leaf(x, leaves) if of_leaves(x) else x, tuned, is_leaf=of_leaves)
    return tuned


def _leaf(ref: Ref, leaves: dict[str, Any]) -> Any:
    if ref.path not in leaves:
        raise ValueError(f"a field refers to the leaf {ref.path!r}, which is not there; {_usual}")
    leaf = leaves[ref.path]
    if kept := [x for x in layers(leaf) if not x.merges]:
        raise ValueError(
            f"a field refers to the leaf {ref.path!r}, for which no array can stand: it holds {kept[0]!r}. Leave that "
            "leaf out of what put it there, with `exclude`"
        )
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf))
    return jax.eval_shape(materialise, leaf) if abstract else materialise(leaf)


def _named(ref: Ref, holders: dict[str, Overlay]) -> Any:
    for _ in range(1 + len(holders)):
        if ref.field is None:
            return ref
        if ref.path not in holders:
            raise ValueError(f"a field refers to {ref.field!r} at {ref.path!r}, where there is no overlay; {_usual}")
        whole = list(layers(holders[ref.path]))[::-1]
        found = [getattr(x, ref.field) for x in whole if ref.field in x.kinds]
        found = found if ref.depth is None else found[ref.depth : ref.depth + 1]
        held = [x for x in found if not isinstance(x, Ref)]
        if len(held) > 1:
            raise ValueError(f"{len(held)} overlays at {ref.path!r} hold a field {ref.field!r}: which one is meant?")
        if held:
            return held[0]
        if not found:
            raise ValueError(
                f"no overlay at {ref.path!r} holds the field {ref.field!r} that another refers to; {_usual}"
            )
        ref = found[0]
    raise ValueError(f"the references to {ref.field!r} at {ref.path!r} go in a circle")


_usual = "was that leaf replaced, or taken out of the tree?"
