"""Telling one tree of parameters from another."""

import hashlib
import json
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from peftjax.flat import unique
from peftjax.overlay import is_key, short
from peftjax.paths import flatten


def fingerprint(params: Any) -> dict[str, Any]:
    """What tells one tree of parameters from another: the type and a hash of every leaf, and a hash of all.

    Args:
      params: a plain tree. Its leaves are copied to the host one at a time.

    Returns:
      {"sha256": hash of all, "leaves": {path: [type, first half of its hash]}}.
    """
    whole, leaves = hashlib.sha256(), {}
    for path, x in sorted(unique(flatten(params)).items()):
        digest = hashlib.sha256(f"{path} {short(x)} ".encode())
        digest.update(_bytes(x))
        whole.update(digest.digest())
        leaves[path] = [short(x), digest.hexdigest()[:32]]
    return {"sha256": whole.hexdigest(), "leaves": leaves}


def _bytes(x: Any) -> memoryview:
    x = jax.random.key_data(x) if is_key(x) else x
    return np.ascontiguousarray(jax.device_get(x)).reshape(-1).view(np.uint8).data


def sums(params: Any) -> dict[str, Any]:
    """A fingerprint that the devices compute where the leaves lie: quick, of arrays split over processes too.

    Sums, modulo 2**32, of a mixture of the bits of every number with its place: the same on every mesh. It tells trees
    apart that differ by accident, not by design.

    Args:
      params: a plain tree.

    Returns:
      What `compare` compares, as `fingerprint` does.
    """
    leaves = {}
    # A sum of what is split over processes is a collective. Of two that are under way at once, or of one and the step that
    # makes the array, processes may take another first, and wait for each other for ever: so one at a time.
    jax.block_until_ready(params)
    for path, x in sorted(unique(flatten(params)).items()):
        x = jax.random.key_data(x) if is_key(x) else jnp.asarray(x)
        leaves[path] = [short(x), f"{int(_sum(x)):08x}"]
    return {"sha256": hashlib.sha256(json.dumps(leaves).encode()).hexdigest(), "leaves": leaves}


@jax.jit
def _sum(x: Any) -> Any:
    x = jnp.stack((x.real, x.imag), -1) if jnp.iscomplexobj(x) else x
    words = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if x.dtype != bool else x
    stride, place = 1, jnp.zeros(x.shape, jnp.uint32)
    for k in reversed(range(x.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, x.shape, k) * np.uint32(stride % 2**32)
        stride *= x.shape[k]
    low = words.astype(jnp.uint32)
    high = lax.shift_right_logical(words, words.dtype.type(32)).astype(jnp.uint32) if x.dtype.itemsize > 4 else 0 * low
    mixed = (low + np.uint32(0x27D4EB2F) * high) ^ (place * np.uint32(0x9E3779B1))
    for shift, odd in ((15, 0x85EBCA77), (13, 0xC2B2AE3D)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(odd)
    return mixed.sum(dtype=jnp.uint32)


def compare(saved: Mapping[str, Any], given: Mapping[str, Any], name: str) -> None:
    """Checks that two fingerprints are the same.

    Raises:
      ValueError: they are not; names the first leaves that differ.
    """
    if saved["sha256"] == given["sha256"]:
        return
    old, new = saved["leaves"], given["leaves"]
    found = [_difference(path, old.get(path), new.get(path)) for path in sorted({*old, *new})]
    lines = [line for line in found if line]
    more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
    raise ValueError(f"{name} was made for other parameters:\n  " + "\n  ".join(lines[:5] + more))


def _difference(path: str, saved: list[str] | None, given: list[str] | None) -> str | None:
    if saved is None or given is None:
        return f"{path}: {'only in the given tree' if saved is None else 'missing in the given tree'}"
    if saved[0] != given[0]:
        return f"{path}: {given[0]}, expected {saved[0]}"
    return None if saved == given else f"{path}: other values"
