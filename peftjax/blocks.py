"""Where the sublayers of residual blocks end: the leaves on which overlays of their outputs sit."""

import dataclasses
from typing import Any, Sequence

from peftjax.roles import Role, Roles
from peftjax.targets import KERNELS, Targets, choose

SUBLAYERS = ("attention", "feed-forward")


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a layer: its kernel and the kernel's role, and the leaf that an overlay of its output sits on.

    That leaf is the kernel's bias, where it has one, else the kernel.
    """

    path: str
    kernel: str
    role: Role

    @property
    def of(self) -> str | None:
        """The field `kernel` of an output overlay: the kernel whose bias it sits on, or None where it sits on a kernel."""
        return None if self.path == self.kernel else self.kernel


def endings(
    method: str,
    params: Any,
    roles: Roles | None,
    targets: Targets | None = None,
    exclude: Targets = (),
    sublayers: Sequence[str] = SUBLAYERS,
    residual: bool = True,
) -> dict[str, Ending]:
    """The layers that a method of outputs changes, by the leaf that its overlay sits on.

    Args:
        method: its name, for errors.
        params: the tree.
        roles: what `peftjax.roles` found.
        targets: the layers' kernels, as `peftjax.targets.choose` reads them. None: the kernels whose outputs are added
            to the residual stream and end one of `sublayers`.
        exclude: kernels to leave out.
        sublayers: "attention", "feed-forward", or both.
        residual: whether the outputs have to be added to a residual stream.

    Returns:
        {path: Ending}.

    Raises:
        ValueError: no roles; a pattern that matches no kernel; a layer without a residual add, where one is needed; no
            layer, or one of which roles cannot tell which sublayer it ends.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from peftjax.roles import roles
        >>> fn = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
        >>> list(endings("adapter", params, roles(fn, params, jnp.ones((2, 4)))))
        ['down']
    """
    if roles is None:
        raise ValueError(
            f"{method} sits where the model's layers end, which only roles can tell: pass "
            "`roles=peftjax.roles(fn, params, batch)`, or call `peftjax.attach`"
        )
    if targets is None:
        _check_sublayers(method, roles, sublayers)
        ends = lambda path, role: role is not None and role.residual and role.sublayer in sublayers
        targets = ends
    found: dict[str, Ending] = {}
    for kernel in choose(targets, params, roles, exclude=exclude, kernels=True):
        role = roles[kernel]
        if role.op not in KERNELS or not set("o") <= set(role.axes) or "?" in role.axes:
            raise ValueError(
                f"{method}: {kernel} ({role.op}, axes {role.axes!r}) is no kernel whose output can be told"
                + (f": {role.unclear}" if role.unclear else "")
            )
        if residual and not role.residual:
            raise ValueError(
                f"{method}: the output of {kernel} is not added to a residual stream; expected one of "
                f"{_listed(_residual(roles))}"
            )
        path = role.bias or kernel
        found[path] = Ending(path, kernel, role)
    return found


def _residual(roles: Roles) -> list[str]:
    return [path for path, role in roles.items() if role.residual]


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "") if paths else "none"


def _check_sublayers(method: str, roles: Roles, sublayers: Sequence[str]) -> None:
    ends = _residual(roles)
    unknown = [path for path in ends if roles[path].sublayer not in SUBLAYERS]
    if unknown:
        raise ValueError(
            f"{method}: roles cannot tell whether {_listed(unknown)} end attention or feed-forward sublayers, for they "
            "read what an equation mixed in a way that it does not show; name the layers in `targets`"
        )
    if not any(roles[path].sublayer in sublayers for path in ends):
        kinds = " or ".join(sublayers)
        raise ValueError(
            f"{method}: found no kernel that ends a sublayer of {kinds} and whose output is added to a residual stream; "
            f"there are {_listed(ends)}. Name the layers in `targets`"
        )
