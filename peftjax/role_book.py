"""The notes that `roles` takes on each leaf while it reads a trace."""

import contextlib
import dataclasses
import math
from typing import Any, Iterator, Mapping, Sequence

from peftjax.role_pairs import aligned, followed
from peftjax.role_values import Act, Fixed, Pending, Product, Track, is_own
from peftjax.streams import Key
from peftjax.views import Atom, Cut, Drop, DynamicCut, Edit, Layout

CONTRACTED = ("linear", "conv", "embedding")
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot")
MEANS = {"s": "stacked layers, taken apart", "b": "a batch", "i": "read", "o": "written"}
JOINED = frozenset({"add", "add_any", "concatenate"})
PLAIN = {"bias": JOINED, "scale": JOINED | {"mul", "div", "neg", "sub"}, "other": frozenset()}  # and still that


@dataclasses.dataclass(eq=False)
class Notes:
    """What is known of one leaf."""

    ndim: int
    uses: list[str] = dataclasses.field(default_factory=list)
    first: float = math.inf  # when it was used first
    op: str | None = None
    hint: str | None = None
    letters: dict[int, set[str]] = dataclasses.field(default_factory=dict)
    marked: dict[tuple[int, str], str] = dataclasses.field(default_factory=dict)  # by which equation, axis and letter
    product: Product | None = None
    bias: str | None = None
    kernel: str | None = None
    groups: int = 1
    window: tuple[int, ...] = ()
    follows: tuple[tuple[int, ...], ...] | None = None
    meetings: int = 0  # with activations
    strays: bool = False  # added to what another kernel makes
    activation: bool = False  # something else was its kernel
    provisional: bool = False  # no contraction yet with anything that depends on data

    @property
    def axes(self) -> str:
        """One letter per axis; "?" where a reshape cut an axis into parts of different roles."""
        found = [self.letters.get(k, {"o"}) for k in range(self.ndim)]
        return "".join(letters.copy().pop() if len(letters) == 1 else "?" for letters in found)

    @property
    def unclear(self) -> str:
        """What gave an axis several letters; empty where none has."""
        of = lambda k, letter: f"{MEANS[letter]} by {self.marked[k, letter]}"
        said = {k: sorted(letters) for k, letters in self.letters.items() if len(letters) > 1}
        return "; ".join(f"axis {k} is partly {' and partly '.join(of(k, x) for x in said[k])}" for k in sorted(said))


class Book:
    """Notes on every leaf. During a rehearsal (a loop body read to find its types) nothing is written."""

    def __init__(self, ndims: Mapping[str, int], streams: Mapping[Key, int] | None = None) -> None:
        self.notes = {path: Notes(ndim) for path, ndim in ndims.items()}
        self.time = 0
        self.rehearsing = False
        self.streams: Mapping[Key, int] = streams or {}
        self.at: Any = None  # the equation that is read
        self.around: tuple[int, ...] = ()  # the identities of the regions' equations around it

    @contextlib.contextmanager
    def reading(self, eqn: Any, inside: bool) -> Iterator[None]:
        """Reads an equation, or the inside of its region."""
        around, self.at = self.around, eqn
        self.around = (*around, id(eqn)) if inside else around
        yield
        self.around = around

    @property
    def stream(self) -> int | None:
        """Which operand of the equation that is read is the residual stream, if one is."""
        return self.streams.get((self.around, id(self.at)))

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Nothing is written inside."""
        before, self.rehearsing = self.rehearsing, True
        try:
            yield
        finally:
            self.rehearsing = before

    def use(self, tracks: Sequence[Track], name: str) -> None:
        """An equation used these leaves."""
        if self.rehearsing:
            return
        for notes in (self.notes[t.path] for t in tracks):
            notes.first = min(notes.first, self.time)
            notes.uses.append(name)
            self.time += 1

    def mark(self, track: Track, letters: Mapping[Atom, str]) -> None:
        """The letters of some atoms of a leaf."""
        if self.rehearsing:
            return
        for atom, letter in letters.items():
            if is_own(atom):
                self.notes[track.path].letters.setdefault(int(atom[0]), set()).add(letter)
                self.notes[track.path].marked[int(atom[0]), letter] = self._here()

    def _here(self) -> str:
        scope = str(self.at.source_info.name_stack)
        return self.at.primitive.name + (f" in {scope}" if scope else "")

    def edit(self, track: Track, layout: Layout, edits: Sequence[Edit]) -> Track:
        """A track after a view; an axis of which one entry was taken is stacked."""
        indexed = track.indexed
        for edit in edits:
            one = isinstance(edit, (Cut, DynamicCut)) and dict(layout.sizes).get(edit.atom, 1) == 1
            if one and track.layout.size(edit.atom) > 1:
                indexed |= {edit.atom}
            if isinstance(edit, Drop) and edit.atom in indexed:
                self.mark(track, {edit.atom: "s"})
        return dataclasses.replace(track, layout=layout, indexed=indexed)

    def mark_dims(self, track: Track, dims: Mapping[int, str]) -> None:
        """The letters of some dimensions of a view of a leaf; an atom of which one entry was taken is stacked."""
        marks: dict[Atom, str] = {}
        for k, letter in dims.items():
            atoms = track.layout.dims[k]
            marks |= {a: "s" if a in track.indexed and len(atoms) > 1 else letter for a in atoms}
        large = [a for a in marks if track.layout.size(a) > 1]
        axes = {a[0] for a in large}
        self.mark(track, {a: letter for a, letter in marks.items() if a in large or a[0] not in axes or letter == "s"})

    def decide(self, track: Track, op: str, data: bool = True) -> bool:
        """Settles what a leaf is, and returns whether it did.

        The first use decides; but before all else comes a contraction with data, then one without (power iteration).
        """
        notes, strong = self.notes[track.path], op in CONTRACTED
        settled = notes.op in CONTRACTED and not (notes.provisional and strong and data)
        if self.rehearsing or settled or notes.op and not (strong and (data or not notes.activation)):
            return False
        notes.op, notes.provisional = op, strong and not data
        return True

    def suggest(self, tracks: Sequence[Track], op: str) -> None:
        """What leaves are if nothing decides."""
        for track in tracks:
            self.notes[track.path].hint = self.notes[track.path].hint or op

    def contract(self, kernel: Fixed, name: str, op: str, dims: Mapping[int, str], data: bool) -> Product | None:
        """A contraction with a kernel. The product, if it is the first one of its leaves."""
        made = Product(tuple(t.path for t in kernel.primary), tuple(t.layout for t in kernel.primary))
        new = self.rehearsing or not any(use in PRODUCTS for use in self.notes[made.kernels[0]].uses)
        for track in kernel.primary:
            notes = self.notes[track.path]
            if self.decide(track, op, data):
                notes.letters = {k: {"s"} for k, letters in notes.letters.items() if "s" in letters}
                self.mark_dims(track, dims)
                notes.product, new = made, True
        self.use(kernel.primary, name)
        return made if new else None

    def activation(self, value: Fixed, name: str) -> None:
        """Leaves that another leaf, their kernel, contracts."""
        self.use(value.tracks, name)
        for track in value.primary:
            self.decide(track, "other")
            self.notes[track.path].activation = True

    def meet(self, value: Fixed, name: str, kind: str, act: Act | None) -> bool:
        """An elementwise meeting with an activation: "scale", "bias" or "other". Whether it was a kernel's bias."""
        self.use(value.tracks, name)
        for track in value.primary:
            self.decide(track, kind if track.ops <= PLAIN[kind] else "other")
            self.notes[track.path].meetings += not self.rehearsing
        pending = act.live if act else None
        if kind == "other" or pending is None or not pending.fresh or self.rehearsing:
            return False
        if kind == "bias" and pending.biased:
            return False
        return self._pair(value.primary, kind, pending)

    def _pair(self, tracks: Sequence[Track], kind: str, pending: Pending) -> bool:
        """Notes which bias, or scale, belongs to which kernel, where its axes are the kernel's outputs."""
        kernels, paired = pending.product.kernels, False
        for n, track in enumerate(tracks):
            letters = aligned(track, pending)
            if letters is None or not track.ops <= PLAIN[kind]:
                continue
            which = n if len(tracks) == len(kernels) else 0
            kernel, notes = kernels[which], self.notes[track.path]
            notes.kernel = notes.kernel or kernel
            notes.strays |= notes.kernel != kernel
            if kind == "bias" and notes.follows is None:
                notes.follows = followed(track, pending, pending.product.layouts[which], notes.ndim)
            if notes.op == kind:
                self.mark_dims(track, letters)
            paired = paired or kind == "bias"
            if kind == "bias" and self.notes[kernel].product is pending.product:
                self.notes[kernel].bias = self.notes[kernel].bias or track.path
        return paired
