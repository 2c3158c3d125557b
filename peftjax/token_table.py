"""Virtual tokens in a table of embeddings: the overlay of further rows, and which table is the one of words."""

from typing import Any, Callable, Sequence

import jax

from peftjax.method import Leaf, Method, per_leaf
from peftjax.overlay import Table, frozen, layers, overlay, static, trained
from peftjax.roles import Roles
from peftjax.targets import Targets, choose


@overlay
class VirtualRows(Table):
    """What overlays share that hold the embeddings of virtual tokens, below the table's rows."""

    base: Any = frozen()
    scale: Any = frozen()
    length: int = static()
    locked: tuple[str, ...] = static(default=())

    @property
    def virtual(self) -> int:  # type: ignore[override]
        """A virtual token a row."""
        return self.length

    def summary(self) -> str:
        """Its length."""
        return f"length={self.length}"


@overlay
class Prompt(VirtualRows):
    """`scale P` below the table's rows: ids V, V + 1, ... of a vocabulary of V read it."""

    prompt: Any = trained()

    def labels(self) -> dict[str, tuple[Any, ...]]:
        """A row has the features of the table's rows."""
        return {"prompt": ("rows", (1,)), "scale": ()}

    def rows(self) -> Any:
        """The rows, (n, D)."""
        return self.scale * self.prompt


def at_table(name: str, make: Callable[[Leaf], Any], targets: Targets | None) -> Method:
    """A method that puts `make(leaf)` on the table of words: on the one that `targets` names, or the only one.

    Args:
      name: the method's name, for its errors.
      make: the overlay of the table.
      targets: the table; None is the one leaf that the model looks up rows in, by its roles.
    """

    def start(key: jax.Array, params: Any, roles: Roles | None) -> Any:
        path = _table(name, params, roles, targets)

        def checked(leaf: Leaf) -> Any:
            if leaf.axes != "io" or any(isinstance(x, Table) for x in layers(leaf.value)):
                raise ValueError(
                    f"{name}: {path} is {leaf.value!r} with axes {leaf.axes!r}; expected a table (vocabulary, D), "
                    "'io', that has no further rows yet"
                )
            return make(leaf)

        return per_leaf(checked, lambda p, _: p == path).init(key, params, roles)

    return Method(name="", options={}, start=start, identity_at_init=False)


def _table(name: str, params: Any, roles: Roles | None, targets: Targets | None) -> str:
    if targets is None:
        return words(name, roles)
    found = choose(targets, params, roles, kernels=True)
    return _only(name, found)


def words(name: str, roles: Roles | None) -> str:
    """The path of the table of words, where a model looks up one table only.

    Raises:
      ValueError: it looks up none, or several; there are no roles.
    """
    if roles is None:
        raise ValueError(f"{name}: which leaf is the table of words? Expected `roles=`, or `targets=`")
    return _only(name, [p for p, role in roles.items() if role.op == "embedding" and "gather" in role.uses])


def _only(name: str, found: Sequence[str]) -> str:
    if len(found) != 1:
        said = ", ".join(found) if found else "no leaf"
        raise ValueError(f"{name}: rows are looked up in {said}; name the table of words: `targets=(...,)`")
    return found[0]


def check_length(name: str, length: int) -> None:
    """Raises unless a number of virtual tokens is one or more."""
    if length < 1:
        raise ValueError(f"{name}: expected at least one virtual token, found length={length}")
