"""What flows through a model whose tree holds output or table overlays: parameters, outputs, and outputs that wait."""

import dataclasses
from typing import Any, Callable, Sequence, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp


from peftjax.factored import Factor
from peftjax.overlay import Output, Overlay, Table, layers
from peftjax.views import Edit, Layout
from peftjax.weight import expand

C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True)
def node(*data: str) -> Callable[[C], C]:
    """Makes a dataclass a pytree node with these fields as children."""

    def made(cls: C) -> C:
        whole: Any = dataclasses.dataclass(frozen=True)(cls)
        meta = [f.name for f in dataclasses.fields(whole) if f.name not in data]
        return jax.tree_util.register_dataclass(whole, data_fields=list(data), meta_fields=meta)

    return made


@node("value")
class Param:
    """A parameter (an array or an operator) seen through views; `path` is None where it is made of several."""

    value: Any
    path: str | None
    layout: Layout


@node("owner", "fields")
class Carried:
    """An output overlay on its way: its array fields apart, with their axes."""

    owner: Output
    fields: dict[str, Factor]

    @classmethod
    def of(cls, owner: Output) -> "Carried":
        """The overlay with its fields taken out."""
        fields = {n: Factor(getattr(owner, n), a) for n, a in owner.labels().items() if getattr(owner, n) is not None}
        return cls(owner.replace(base=None, **dict.fromkeys(fields)), fields)

    def edited(self, edits: Sequence[Edit], operands: Sequence[Any]) -> "Carried":
        """The overlay after its leaf's axes moved."""
        fields = self.fields
        for edit in edits:
            fields = {n: f.edited(edit, operands) for n, f in fields.items()}
        return Carried(self.owner, fields)

    def has(self, atom: Any) -> bool:
        """Whether a field has this axis of the leaf."""
        return any(atom in f.atoms for f in self.fields.values())


@node("value", "owners")
class Hook:
    """A parameter with output overlays on it: they fire, in order, on what its layer puts out.

    `cut` holds the axes that a view has cut or reversed, and that no field of the overlays followed.
    """

    value: Any
    owners: tuple[Carried, ...]
    path: str
    layout: Layout
    cut: tuple[Any, ...] = ()


@node("value", "owner")
class Rows:
    """A table of embeddings with further rows, on its way to a lookup."""

    value: Any
    owner: Table
    path: str
    layout: Layout


@node("value")
class Made:
    """The output of the kernel at `path`, as long as only views and casts have touched it.

    `features` are the axes that the kernel's output axes became, `batch` those that it shares with its input (experts).
    """

    value: Any
    path: str
    features: tuple[int, ...]
    batch: tuple[int, ...]


@node("value", "owners")
class Pending:
    """A layer's output with overlays that wait, in order, for the residual add; `features` and `batch` as in `Made`."""

    value: Any
    owners: tuple[Carried, ...]
    path: str
    features: tuple[int, ...]
    batch: tuple[tuple[int, Any], ...]


def carried(leaf: Any, path: str) -> Any:
    """What a leaf of a tree with output or table overlays is while it flows through the model."""
    found = tuple(layers(leaf)) if isinstance(leaf, Overlay) else ()
    weights = [x for x in found if not isinstance(x, (Output, Table))]
    value: Any = leaf.bottom if found else leaf
    for x in reversed(weights):
        value = x.replace(base=value)
    value = expand(value, path) if weights else value
    layout = Layout.of(jnp.shape(leaf.bottom if found else leaf))
    outputs = tuple(Carried.of(x.ready()) for x in reversed(found) if isinstance(x, Output))
    tables = [x.replace(base=None) for x in found if isinstance(x, Table)]
    if len(tables) > 1 or (tables and outputs):
        raise ValueError(
            f"{path} holds {', '.join(map(repr, found))}; a table takes one overlay of rows, and no other output"
        )
    if tables:
        return Rows(value, tables[0], path, layout)
    return Hook(value, outputs, path, layout) if outputs else Param(value, path, layout)


@node("value")
class Counted:
    """0, 1, 2, ... along one axis: what a one-hot code compares its ids with."""

    value: Any
    axis: int


@node("value", "ids")
class OneHot:
    """The one-hot code of `ids` along one axis."""

    value: Any
    ids: Any
    axis: int


@node("value")
class Bounded:
    """Integers that have been clipped or wrapped: ids among them may no longer name a further row."""

    value: Any


MARKS = (Param, Made, Counted, OneHot, Bounded)
HOOKED = (*MARKS, Hook, Rows, Pending)


def inner(x: Any) -> Any:
    """The value below a mark: an array or an operator."""
    return x.value if isinstance(x, MARKS) else x


def position(operands: Sequence[Any], x: Any) -> int:
    """Where among the operands x itself stands."""
    return next(k for k, y in enumerate(operands) if y is x)


def where(eqn: Any, overlays: Sequence[Any]) -> str:
    """Names some overlays and the equation that met them, for an error."""
    names = ", ".join(f"{names_of(x)} at {x.path}" for x in overlays)
    scope = str(eqn.source_info.name_stack)
    return f"{names}, used by {eqn.primitive.name}" + (f" in {scope}" if scope else "")


def names_of(x: Any) -> str:
    """The kinds of the overlays that a value carries."""
    owners = [x.owner] if isinstance(x, Rows) else [c.owner for c in x.owners]
    return ", ".join(type(owner).__name__ for owner in owners)


def is_marked(operands: Sequence[Any]) -> bool:
    """Whether any operand is more than an array or an operator."""
    return any(isinstance(x, HOOKED) for x in operands)
