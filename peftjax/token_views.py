"""Marks of virtual rows through views: axes that move, are cut, or are joined."""

import functools
from typing import Any

import numpy as np

from peftjax.token_marks import Marked


def view(walk: Any, eqn: Any, operands: list[Marked], shapes: Any, jaxpr: Any) -> list[Marked]:
    """Axes that move."""
    p, x, shape = eqn.params, operands[0], shapes[0]
    match eqn.primitive.name:
        case "transpose":
            return [x.mapped(shape, lambda a: np.transpose(a, p["permutation"]))]
        case "squeeze":
            return [x.mapped(shape, lambda a: np.squeeze(a, tuple(p["dimensions"])))]
        case "expand_dims":
            return [x.mapped(shape, lambda a: np.expand_dims(a, tuple(p["dimensions"])))]
        case "rev":
            return [x.mapped(shape, lambda a: np.flip(a, tuple(p["dimensions"])))]
        case "broadcast_in_dim":
            sizes = lambda a: [
                a.shape[p["broadcast_dimensions"].index(k)] if k in p["broadcast_dimensions"] else 1
                for k in range(len(shape))
            ]
            return [x.mapped(shape, lambda a: a.reshape(sizes(a)))]
        case "reshape":
            return [x.mapped(shape, lambda a: _reshaped(a, x.shape, shape))]
        case "slice":
            strides = p["strides"] or (1,) * len(x.shape)
            cuts = list(zip(p["start_indices"], p["limit_indices"], strides))
            return [
                x.mapped(shape, lambda a: a[tuple(slice(*c) if n > 1 else slice(None) for c, n in zip(cuts, a.shape))])
            ]
        case _:  # split
            starts: Any = np.cumsum([0, *p["sizes"]])
            part = lambda a, i: (
                a if a.shape[p["axis"]] == 1 else np.take(a, np.arange(starts[i], starts[i + 1]), p["axis"])
            )
            return [x.mapped(s, functools.partial(part, i=i)) for i, s in enumerate(shapes)]


def _reshaped(a: np.ndarray, old: Any, new: Any) -> np.ndarray:
    """The array after a reshape of the value from `old` to `new`: each group of axes that keeps its size by itself."""
    sizes, out, i, j = [], [], 0, 0
    while i < len(old) or j < len(new):
        start, at, n, m = i, j, 1, 1
        while i < len(old) and (n == 1 or n != m):
            if n == m and n > 1:
                break
            if n <= m:
                n, i = n * old[i], i + 1
            elif j < len(new):
                m, j = m * new[j], j + 1
            else:
                break
        while j < len(new) and m < n:
            m, j = m * new[j], j + 1
        if i >= len(old):
            while j < len(new) and (m * new[j] <= n or new[j] == 1):
                m, j = m * new[j], j + 1
        whole = any(k > 1 for k in a.shape[start:i])
        sizes += list(old[start:i]) if whole else [1] * (i - start)
        out += list(new[at:j]) if whole else [1] * (j - at)
        if i == start and j == at:
            break
    return np.broadcast_to(a, sizes).reshape(out)
