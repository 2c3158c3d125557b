"""An adapter in a folder: what the overlays hold, the method that made them, and a fingerprint of their base."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any, Mapping

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from peftjax.fingerprint import compare, fingerprint
from peftjax.flat import misfits, not_finite, replaced, unique
from peftjax.folders import replacing
from peftjax.method import Method, from_dict
from peftjax.overlay import Overlay, is_overlay, layers
from peftjax.paths import flatten
from peftjax.roles import Role, Roles
from peftjax.sharding import placed
from peftjax.tree import Entry, check_whole, entries, map_layers, map_leaves, strip

FORMAT = 1
ARRAYS, PAGE = "adapter.safetensors", "adapter.json"
KEYS = {"format", "method", "roles", "locked", "base", "arrays", "versions", "checksum"}


def save(folder: str | os.PathLike[str], tuned: Any, method: Method, roles: Roles | None = None) -> None:
    """Writes what the overlays hold (trained and frozen fields, not the base) and what made them.

    The folder appears when it is complete; one that was there before is replaced then, and not a moment earlier.

    Args:
      folder: where to; it becomes a folder of two files, `adapter.safetensors` and `adapter.json`.
      tuned: a tree with overlays. Dropout keys are not saved.
      method: the method whose `init` made the tree; without roles, it is checked as far as the tree itself tells.
      roles: the roles that `init` was given, so that `load` needs none.

    Raises:
      ValueError: nothing to save, one part of `partition`, a method that did not make the tree, or whose targets are a
        function, an array holds a NaN or an infinity, or the folder holds other files.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj, tempfile
      >>> params = {"b": jnp.ones(2), "w": jnp.ones((2, 2))}
      >>> method = pj.unfreeze("b")
      >>> with tempfile.TemporaryDirectory() as place:
      ...     pj.save(place + "/adapter", method.init(jax.random.key(0), params), method)
      ...     pj.load(place + "/adapter", params)["b"].value
      Array([1., 1.], dtype=float32)
    """
    check_whole(tuned)
    held = unique((e.key, e.value) for e in entries(tuned) if _is_held(e))
    if not held:
        raise ValueError("nothing to save: the tree holds no overlay")
    if broken := not_finite(held.items()):
        raise ValueError(f"not saved, for these hold a NaN or an infinity: {', '.join(broken)}. Did training diverge?")
    saved, locks = _described(method, tuned), _locks(tuned)
    _check_made(tuned, method, roles, locks, held)
    page = {
        "format": FORMAT,
        "method": saved,
        "roles": None if roles is None else roles.to_dict(),
        "locked": locks,
        "base": fingerprint(strip(tuned)),
        "versions": {name: _version(name) for name in ("peftjax", "jax", "safetensors")},
    }
    with replacing(Path(os.path.realpath(folder)), {ARRAYS, PAGE}) as new:
        save_file({key: np.asarray(jax.device_get(x), order="C") for key, x in held.items()}, new / ARRAYS)
        page["arrays"] = _digest_file(new / ARRAYS)
        page["checksum"] = _checksum(page)
        (new / PAGE).write_text(json.dumps(page, indent=1) + "\n")


def _described(method: Method, tuned: Any) -> dict[str, Any]:
    try:
        return method.to_dict()
    except ValueError as error:
        paths = [path for path, leaf in flatten(tuned) if is_overlay(leaf)]
        raise ValueError(
            f"not saved: {error}. The overlays of this tree are at {', '.join(paths)}: give `save` the same method with "
            f"these paths in the function's place, such as targets={'|'.join(map(re.escape, paths))!r}"
        ) from None


def _check_made(tuned: Any, method: Method, roles: Roles | None, locks: Mapping[str, Any], held: Any) -> None:
    """Raises if `load` could not lay what a tree holds on what the method makes of its base."""
    params, types = strip(tuned), {k: jax.typeof(x) for k, x in held.items()}

    def faults(roles: Roles | None) -> list[str]:
        made = _begun(method, params, roles, locks, set(held))
        return misfits({e.key: e.value for e in entries(made) if _is_held(e)}, types)

    found: list[str] | None
    try:
        found = faults(roles)
    except ValueError as error:
        if roles is not None:
            raise ValueError(f"not saved: {method.name} cannot have made this tree: {error}") from error
        found = None  # `load` may be given the roles that the method counts on
    if roles is None and found != []:
        with contextlib.suppress(Exception):  # of roles that say no more than axes, a method may miss anything
            again = faults(_seen(tuned))
            found = again if found is not None or all(x.startswith("shape") for x in again) else []
    if found:
        raise ValueError(
            f"not saved: this tree is not what {method!r} makes of its base, so `load` could not build it; expected the "
            "method whose `init` made it:\n  " + "\n  ".join(found)
        )


def _seen(tuned: Any) -> Roles:
    """The roles of leaves as far as the overlays on them tell: which axes these have."""

    def role(k: int, leaf: Any) -> Role:
        axes = next((x.axes for x in layers(leaf) if hasattr(x, "axes")), None)
        if axes is None:
            return Role("unused", "o" * len(getattr(leaf, "shape", ())), k)
        return Role("linear" if {"i", "o"} <= set(axes) else "bias", axes, k, ("dot_general",))

    return Roles((path, role(k, leaf)) for k, (path, leaf) in enumerate(flatten(tuned)))


def load(folder: str | os.PathLike[str], params: Any, roles: Roles | None = None, method: Method | None = None) -> Any:
    """Lays a saved adapter on the parameters it was made for.

    Args:
      folder: what `save` wrote.
      params: the very parameters that were tuned: every leaf's path, type and bytes are compared.
      roles: the roles of the model; by default those that were saved.
      method: what the caller expects to find; None takes the saved method.

    Returns:
      The tuned tree, on the buffers of `params`; the overlays' fields lie as their bases do.

    Raises:
      ValueError: names what is wrong: parameters with overlays, a file missing, damaged or of another format, another
        method, another base (with the first leaves that differ), or arrays that do not fit.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> pj.load("nowhere", {"w": jnp.ones(2)})
      Traceback (most recent call last):
      ...
      ValueError: nowhere: no adapter.json; expected a folder that `save` wrote
    """
    if on := [path for path, leaf in flatten(params) if is_overlay(leaf)]:
        raise ValueError(
            f"{on[0]} holds an overlay already: expected the plain parameters, such as `strip(tuned)` or `merge(tuned)`"
        )
    folder = Path(folder)
    page = _page(folder)
    found = _method(page, method, folder)
    compare(page["base"], fingerprint(params), str(folder))
    if roles is None and page["roles"] is not None:
        roles = Roles.from_dict(page["roles"])
    try:
        arrays = _arrays(folder, page["arrays"])
        tuned = _on(_begun(found, params, roles, page["locked"], set(arrays)), params)
        filled = replaced(tuned, _held(tuned), arrays)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return map_layers(lambda _, x: placed(x), filled)


def _is_held(e: Entry) -> bool:
    return not e.is_base and not e.is_key


def _held(tuned: Any) -> set[str]:
    return {e.key for e in entries(tuned) if _is_held(e)}


def _begun(method: Method, params: Any, roles: Roles | None, locks: Mapping[str, Any], keys: set[str]) -> Any:
    """The shapes of the tree as `init` makes it, locked.

    Where that holds other arrays than were saved, the methods of a chain were laid one on what was locked by then: a
    later one may have taken leaves that it would have left to one that still trains.
    """

    def chained(params: Any, method: Method) -> Any:
        if method.name == "chain":
            return functools.reduce(chained, method.options["methods"], params)
        return _locked(method.init(jax.random.key(0), params, roles), locks)

    whole = jax.eval_shape(lambda p: _locked(method.init(jax.random.key(0), p, roles), locks), params)
    if method.name != "chain" or not locks or _held(whole) == keys:
        return whole
    apart = jax.eval_shape(lambda p: chained(p, method), params)
    return apart if _held(apart) == keys else whole


def _locks(tuned: Any) -> dict[str, list[list[str]]]:
    found = {path: [list(x.locked) for x in layers(leaf)] for path, leaf in flatten(tuned)}
    return {path: locks for path, locks in found.items() if any(locks)}


def _locked(tuned: Any, locks: Mapping[str, list[list[str]]]) -> Any:
    """The overlays locked as `_locks` says, or not at all; those on a leaf are told apart by how many are below them."""

    def locked(path: str, x: Any) -> Any:
        if not isinstance(x, Overlay):
            return x
        below, said = sum(1 for _ in layers(x.base)), locks.get(path, [])
        return x.replace(base=locked(path, x.base), locked=tuple(said[-1 - below]) if below < len(said) else ())

    return map_leaves(locked, tuned)


def _on(shapes: Any, params: Any) -> Any:
    arrays = iter(jax.tree.leaves(params))

    def on(x: Any, array: Any) -> Any:
        return x.replace(base=on(x.base, array)) if isinstance(x, Overlay) else array

    return jax.tree.map(lambda x: on(x, next(arrays)), shapes, is_leaf=is_overlay)


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _page(folder: Path) -> dict[str, Any]:
    if not (folder / PAGE).is_file():
        raise ValueError(f"{folder}: no {PAGE}; expected a folder that `save` wrote")
    try:
        page = json.loads((folder / PAGE).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / PAGE} is damaged: {error}") from None
    if not isinstance(page, dict) or page.get("format") != FORMAT:
        version = page.get("format") if isinstance(page, dict) else None
        raise ValueError(f"{folder / PAGE} has format {version!r}, expected {FORMAT}: written by another version?")
    if set(page) != KEYS:
        raise ValueError(
            f"{folder / PAGE}: missing keys {sorted(KEYS - set(page))}, unknown keys {sorted(set(page) - KEYS)}"
        )
    if page["checksum"] != _checksum(page):
        raise ValueError(f"{folder / PAGE} is damaged: it is not what `save` wrote")
    return page


def _checksum(page: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in page.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _method(page: Mapping[str, Any], asked: Method | None, folder: Path) -> Method:
    if asked is not None and (wanted := json.loads(json.dumps(asked.to_dict()))) != page["method"]:
        raise ValueError(
            f"{folder} holds another method than asked for:\n  found    {page['method']}\n  expected {wanted}"
        )
    return from_dict(page["method"])


def _arrays(folder: Path, digest: str) -> dict[str, Any]:
    path = folder / ARRAYS
    if not path.is_file():
        raise ValueError(f"no {ARRAYS}")
    if _digest_file(path) != digest:
        raise ValueError(f"{ARRAYS} is damaged: truncated, or not the one that {PAGE} was written with")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{ARRAYS} is damaged: {error}") from error
