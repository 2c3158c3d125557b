"""The arguments of a model that have an axis of tokens: finding them by name, and inserting virtual tokens."""

import dataclasses
import inspect
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from peftjax import compat
from peftjax.call import Call, is_array
from peftjax.overlay import is_overlay
from peftjax.targets import closest


@dataclasses.dataclass(frozen=True)
class Names:
    """The options of `wrap_tokens`."""

    ids: str
    mask: str | None
    positions: str | None
    types: str | None
    labels: str | None
    pool_mask: str | None
    side: str
    shift: bool | None
    axis: int
    drop_first_label: bool
    keep: tuple[str, ...]
    check: bool
    implied: frozenset[str]  # the fields whose names are the usual ones, and may be absent

    @property
    def fields(self) -> dict[str, str]:
        """The names that are given, by field."""
        named = {name: getattr(self, name) for name in ("ids", "mask", "positions", "types", "labels", "pool_mask")}
        return {name: value for name, value in named.items() if value is not None}


def argument_paths(fn: Callable[..., Any], call: Call) -> dict[int, str]:
    """The arguments by their place among the call's leaves: "batch/input_ids", or a parameter's name."""
    found = jax.tree_util.tree_flatten_with_path(
        call.filled([call.leaves[k] for k in call.dynamic]), is_leaf=is_overlay
    )[0]
    try:
        known = list(inspect.signature(fn).parameters.values())[1:]
    except (TypeError, ValueError):
        known = []
    positional = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    paths = {}
    for place, (keys, _) in enumerate(found):
        if keys[0].idx > 0:
            names = [_name(key) for key in keys[1:]]
            if keys[0].idx == 1:
                k = keys[1].idx
                names[0] = positional[k] if k < len(positional) else str(k)
            paths[place] = "/".join(names)
    return paths


def _name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name) | SequenceKey(idx=name):
            return str(name)
    return str(key)


def find(names: Names, fn: Callable[..., Any], call: Call) -> dict[str, int]:
    """The places of the named arguments among the call's leaves, by field."""
    paths, found = argument_paths(fn, call), {}
    of_encoder = any(_is_decoders(path) for path in paths.values()) and not _is_decoders(names.ids)
    for field, name in names.fields.items():
        if field == "labels" and field in names.implied and of_encoder:
            continue  # they are a decoder's
        places = [k for k, path in paths.items() if path == name or path.endswith("/" + name)]
        if not places and field in names.implied and field not in ("ids", "mask"):
            continue
        if len(places) != 1:
            said = ", ".join(paths[k] for k in places) or "none"
            near = ", ".join(closest(name, list(paths.values()))) or "none"
            more = "; `mask=None` if the model takes no mask" if field == "mask" and not places else ""
            raise ValueError(
                f"wrap_tokens({field}={name!r}): expected one argument of this name, found {said}; "
                f"closest: {near}{more}"
            )
        if not is_array(call.leaves[places[0]]):
            raise ValueError(f"wrap_tokens: {name} is {call.leaves[places[0]]!r}; expected an array")
        found[field] = places[0]
    return found


def _is_decoders(path: str) -> bool:
    return path.rpartition("/")[2].startswith("decoder_")


def sequence_axis(x: Any, ids: Any, axis: int) -> int | None:
    """The axis of tokens of an argument beside the ids; None where it has none."""
    size, ndim = ids.shape[axis], len(ids.shape)
    own = axis % ndim if len(x.shape) == ndim else axis if axis < 0 and len(x.shape) else 0
    return own % len(x.shape) if x.shape and x.shape[own] == size else None


def check_arguments(names: Names, found: dict[str, int], paths: dict[int, str], call: Call) -> None:
    """Raises where an argument cannot take virtual tokens, or says that sequences are packed."""
    ids = call.leaves[found["ids"]]
    if not ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"wrap_tokens: {names.ids} is {ids.dtype}{list(ids.shape)}; expected integers with an axis of tokens"
        )
    for field in set(found) - {"ids", "labels"}:
        x = call.leaves[found[field]]
        axis = sequence_axis(x, ids, names.axis)
        name, n = names.fields[field], ids.shape[names.axis]
        if axis is None:
            raise ValueError(
                f"wrap_tokens: {name} has shape {x.shape}; expected {n} along its axis of tokens, as {names.ids}"
            )
        if "mask" in field and any(
            size == n for k, size in enumerate(x.shape) if k != axis and k + 1 >= len(ids.shape)
        ):
            raise ValueError(
                f"wrap_tokens: {name} has shape {x.shape}, tokens by tokens; expected a mask like {names.ids}"
            )
    packed = [p for k, p in paths.items() if "segment" in p and k not in found.values()]
    if packed:
        raise ValueError(
            f"wrap_tokens: {packed[0]} says that sequences are packed, and virtual tokens would stand before the first "
            "only; expected one sequence a row (or `types=` if these are token types)"
        )


def resized(x: Any, axis: int, size: int) -> Any:
    """A type with another size of one axis."""
    kind = compat.type_of(x)
    shape = tuple(size if k == axis else n for k, n in enumerate(kind.shape))
    return kind.update(shape=shape) if hasattr(kind, "update") else jax.ShapeDtypeStruct(shape, kind.dtype)


def axes_of(names: Names, found: dict[str, int], call: Call) -> dict[str, int]:
    """The axis of tokens of each named argument that has one."""
    ids = call.leaves[found["ids"]]
    axes = {field: sequence_axis(call.leaves[k], ids, names.axis) for field, k in found.items()}
    labels = call.leaves[found["labels"]] if "labels" in found else None
    if labels is not None and (len(labels.shape) != len(ids.shape) or not jnp.issubdtype(labels.dtype, jnp.integer)):
        axes["labels"] = None  # one label a sequence
    return {field: axis for field, axis in axes.items() if axis is not None}
