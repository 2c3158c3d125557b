"""Parts of a model by what its leaves do: its norms, what they keep of the data, its last layers."""

from typing import Mapping

from peftjax.roles import Role
from peftjax.targets import KERNELS


def module_of(path: str) -> str:
    """The path of a leaf's module; a leaf at the top of the tree has none, and gives an empty one.

    Example:
      >>> module_of("layer/norm/scale"), module_of("w")
      ('layer/norm', '')
    """
    return path.rpartition("/")[0]


def norms(roles: Mapping[str, Role]) -> list[str]:
    """The scales and biases of the normalisations, in tree order.

    A norm is a module that holds no kernel and multiplies by a scale, but for one that scales a kernel's own output, as
    layer scale does. At the top of the tree, where leaves share no module, it is what `Role.norm` of a kernel names.

    Args:
      roles: what `peftjax.roles` found.

    Returns:
      Their paths; statistics of a batch norm are not among them.

    Example:
      >>> norms({"norm/mean": Role("other", "o", 0), "norm/scale": Role("scale", "o", 1), "w": Role("linear", "io", 2)})
      ['norm/scale']
    """
    modules = _norm_modules(roles)
    told = {name for role in roles.values() if role.norm for name in (role.norm.scale, role.norm.bias)}
    own = lambda path, role: module_of(path) in modules and role.op in ("scale", "bias") and role.kernel is None
    return [path for path, role in roles.items() if path in told or own(path, role)]


def statistics(roles: Mapping[str, Role]) -> list[str]:
    """What norms keep of the data, in tree order: the leaves of their modules that neither scale nor shift.

    Flax keeps them in a collection of their own, under the same name: the first part of a path may differ.

    Args:
      roles: what `peftjax.roles` found.

    Returns:
      Their paths.

    Example:
      >>> statistics({"batch_stats/norm/mean": Role("other", "o", 0), "params/norm/scale": Role("scale", "o", 1)})
      ['batch_stats/norm/mean']
    """
    inside = lambda module: module.partition("/")[2]
    modules = _norm_modules(roles)
    there = modules | {inside(module) for module in modules if inside(module)}
    beside = lambda module: module in modules or inside(module) in there
    return [path for path, role in roles.items() if role.op == "other" and beside(module_of(path))]


def _norm_modules(roles: Mapping[str, Role]) -> set[str]:
    with_kernel = {module_of(path) for path, role in roles.items() if role.op in KERNELS}
    scaling = {module_of(path) for path, role in roles.items() if role.op == "scale" and role.kernel is None}
    return scaling - with_kernel - {""}


def last(roles: Mapping[str, Role], n: int) -> dict[str, list[str]]:
    """The last n layers that hold a kernel, and the norms after them, in the order in which the model runs.

    Args:
      roles: what `peftjax.roles` found.
      n: how many layers.

    Returns:
      For each its leaves: all of a kernel's module, the scale and bias of a norm. A kernel at the top of the tree, where
      leaves share no module, is a layer with the bias that follows it.

    Raises:
      ValueError: the model has fewer.

    Example:
      >>> last({"up/kernel": Role("linear", "io", 0), "w": Role("linear", "io", 1), "b": Role("bias", "o", 2, kernel="w")}, 1)
      {'w': ['w', 'b']}
    """
    used = sorted((path for path in roles if roles[path].op != "unused"), key=lambda path: roles[path].order)
    layer = {path: module_of(path) or roles[path].kernel or path for path in used}
    layers = list(dict.fromkeys(layer[path] for path in reversed(used) if roles[path].op in ("linear", "conv")))
    if n > len(layers):
        raise ValueError(f"last_layers: n={n}, and the model has {len(layers)} layers: {', '.join(layers)}")
    chosen = set(layers[:n])
    first = min(roles[path].order for path in used if layer[path] in chosen)
    after = {path for path in norms(roles) if roles[path].order > first}
    found = [path for path in used if layer[path] in chosen or path in after]
    return {name: [path for path in found if layer[path] == name] for name in dict.fromkeys(map(layer.get, found))}  # type: ignore[misc]
