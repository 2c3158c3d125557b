"""How the axes of a bias, or of a scale, lie along those of the kernel whose output it meets."""

from typing import Mapping

from peftjax.role_values import Pending, Track, is_own
from peftjax.views import Atom, Layout


def aligned(track: Track, pending: Pending) -> dict[int, str] | None:
    """The letters of a vector's dimensions, from the output it meets; None if it varies along the data's own axes."""
    letters: dict[int, str] = {}
    if pending.layout is None or not 0 < len(track.layout.dims) == len(pending.layout.dims):
        return None
    for k, dim in enumerate(track.layout.dims):
        own = [a for a in dim if is_own(a) and track.layout.size(a) > 1]
        found = pending.letters_of(k)
        if own and (len(found) != 1 or "x" in found):
            return None
        letters |= {k: found.copy().pop()} if own else {}
    return letters


def followed(track: Track, pending: Pending, kernel: Layout, ndim: int) -> tuple[tuple[int, ...], ...] | None:
    """For each of a bias's `ndim` axes, those of its kernel that it lies along; None where a reshape cut one of them."""
    axes: dict[Atom, tuple[int, ...]] = {}
    assert pending.layout is not None
    origins = _origins(pending.layout, pending.places, kernel)
    for k, dim in enumerate(track.layout.dims):
        own = [a for a in dim if is_own(a) and track.layout.size(a) > 1]
        met = [a for a in pending.layout.dims[k] if pending.layout.size(a) > 1] if own else []
        if any(a not in origins for a in met):
            return None
        atoms = [a for m in met for a in origins[m]]
        for a in own:
            size, along = 1, []
            while atoms and size < track.layout.size(a):
                along.append(atoms.pop(0))
                size *= kernel.size(along[-1])
            if size != track.layout.size(a) or any(len(x) > 1 for x in (a, *along)):
                return None
            axes[a] = tuple(int(x[0]) for x in along)
        if atoms:
            return None
    return tuple(axes.get((k,), ()) for k in range(ndim))


def _origins(out: Layout, places: Mapping[int, int], kernel: Layout) -> dict[Atom, list[Atom]]:
    """The axes of a kernel that each axis of its output came from, or each part that a reshape left whole."""
    origins: dict[Atom, list[Atom]] = {}
    for k, dim in places.items():
        parts = sorted(a for a in out.atoms if a[0] == k and out.size(a) > 1)
        atoms = [a for a in kernel.dims[dim] if kernel.size(a) > 1]
        if len(parts) == 1:
            origins[parts[0]] = atoms
        elif [out.size(a) for a in parts] == [kernel.size(a) for a in atoms]:
            origins |= {part: [a] for part, a in zip(parts, atoms)}
    return origins
