"""What a compiled program does, read from its text: collectives and the compiler's own cycles, loops counted in full."""

import dataclasses
import functools
import math
import re
from typing import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Bytes of an element, by its type in the text; types of four bits count as one byte for two.
BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0}
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
CALLS = re.compile(r"(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction: its operation, its type as text, the computations it calls by their part, and the rest."""

    opcode: str
    type: str
    calls: tuple[tuple[str, str], ...]
    text: str

    @property
    def bytes(self) -> int:
        """The size of what it gives, on one device; of an operation that begins, of what it will give."""
        # Such a one has a tuple as its type: its operands, what it will give, and its own notes. A sum has that alone.
        begins = self.opcode.endswith("-start") and self.opcode != "all-reduce-start"
        parts = _elements(self.type) if begins else []
        given = parts[1] if len(parts) > 1 else self.type
        sizes = re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", given)
        return sum(_bits(t) * math.prod(int(n) for n in dims.split(",") if n) for t, dims in sizes) // 8

    @property
    def cycles(self) -> int:
        """What the compiler expects it to take; 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else 0

    @property
    def channel(self) -> str | None:
        """The number that all copies of one collective share."""
        found = re.search(r"channel_id=(\d+)", self.text)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind: how many run in a step, and the bytes that they give on one device."""

    count: int
    bytes: int


def _elements(kind: str) -> list[str]:
    """The elements of a tuple's type."""
    depth, found = 0, [""]
    for letter in kind.strip():
        depth -= letter in ")]}"
        if depth == 1 and letter == ",":
            found.append("")
        elif depth >= 1:
            found[-1] += letter
        depth += letter in "([{"
    return found


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 0


class Program:
    """A compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text()`, optimised.

    Raises:
      ValueError: the text has no entry computation.
    """

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[Op]] = {}
        entry, name = None, ""
        for line in text.splitlines():
            if header := HEADER.match(line):
                name = header[2]
                self._computations[name] = []
                entry = name if header[1] else entry
            elif line.startswith("  ") and " = " in line and name:
                self._computations[name].append(_op(line.split(" = ", 1)[1]))
        if entry is None:
            raise ValueError("expected the text of a compiled program, with an ENTRY computation")
        self._entry = entry

    @functools.cached_property
    def _runs(self) -> list[tuple[Op, int]]:
        return list(self._walk(self._entry, 1))

    def _walk(self, name: str, times: int) -> Iterator[tuple[Op, int]]:
        """Every instruction, and how often it runs in a step. What reductions apply to each element is left out."""
        for op in self._computations.get(name, []):
            yield op, times
            loop = self._trips(op) if op.opcode == "while" else 1
            for part, callee in op.calls:
                if part != "to_apply" or op.opcode == "call":
                    yield from self._walk(callee, times * (loop if part in ("body", "condition") else 1))

    def _trips(self, op: Op) -> int:
        """How often a loop runs: the compiler's own note, or else the bound in its condition."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.text):
            return int(known[1])
        condition = next((callee for part, callee in op.calls if part == "condition"), "")
        ops = [x for x, _ in self._walk(condition, 1)]
        bounds = [int(n) for x in ops for n in re.findall(r"^constant\((\d+)\)", x.text)]
        return max(bounds, default=1)

    @property
    def cycles(self) -> int:
        """The compiler's estimate of a step on one device; 0 on backends that make none."""
        return sum(op.cycles * times for op, times in self._runs)

    @property
    def cycles_once(self) -> int:
        """The same with the body of every loop counted once."""
        return sum(op.cycles for op, _ in self._runs)

    @functools.cached_property
    def exchanges(self) -> list[tuple[str, int, int]]:
        """Each collective: its kind, the bytes that it gives on one device, and how often it runs in a step.

        The copies of one collective that overlap with other work count once.
        """
        found, seen = list[tuple[str, int, int]](), set[tuple[str, str]]()
        for op, times in self._runs:
            kind = op.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or (op.channel is not None and (kind, op.channel) in seen):
                continue
            seen.add((kind, op.channel or ""))
            found.append((kind, op.bytes, times))
        return found

    @property
    def collectives(self) -> dict[str, Traffic]:
        """The traffic by kind."""
        of = lambda kind: [(size, times) for k, size, times in self.exchanges if k == kind]
        found = {kind: of(kind) for kind in COLLECTIVES}
        total = lambda each: Traffic(sum(times for _, times in each), sum(size * times for size, times in each))
        return {kind: total(each) for kind, each in found.items() if each}


def _op(right: str) -> Op:
    found = OPCODE.search(right)
    if found is None:
        return Op("", right, (), right)
    calls = []
    for part, names in CALLS.findall(right):
        calls += [(part, name.strip().lstrip("%")) for name in names.strip("{}").split(",")]
    return Op(found[1], right[: found.start()], tuple(calls), right[found.start() :].strip())
