"""What a compiled decode loop does beside arithmetic: copies of caches, and launches per window."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w\-]*)\(")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# What is no work of its own on a device.
_FREE = {
    "add-dependency", "after-all", "async-done", "async-update", "bitcast", "call", "conditional", "constant",
    "copy-done", "domain", "get-tuple-element", "iota", "opt-barrier", "parameter", "partition-id", "replica-id",
    "tuple", "while",
}  # fmt: skip


class _Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    op: str
    nbytes: int
    called: str | None
    trips: int | None

    @property
    def copies(self) -> bool:
        """Whether it only moves numbers; a fusion is named after what it does."""
        if self.op == "fusion":
            return "copy" in self.name or "transpose" in self.name
        return self.op in ("copy", "copy-start", "transpose")


class LoopFacts(NamedTuple):
    """What the loop over windows holds.

    Attributes:
        cache_copies: instructions in it that copy or transpose at least as much as one array of a cache.
        launches: about how many kernels one window takes.
    """

    cache_copies: list[str]
    launches: int


def loop_facts(text: str, cache_bytes: int) -> LoopFacts:
    """Reads compiled HLO.

    Args:
        text: of the whole program.
        cache_bytes: of the smallest cache array.
    """
    entry, computations = _parse(text)
    loops = [one.called for one in computations.get(entry, ()) if one.op == "while" and one.trips is None]
    copies: list[str] = []

    def visit(name: str | None) -> int:
        count = 0
        for one in computations.get(name or entry, ()):
            if one.op in ("while", "call", "conditional") and one.called is not None:
                count += (one.trips or 1) * visit(one.called)
            elif one.op not in _FREE:
                count += 1
            if one.nbytes >= cache_bytes and one.copies:
                copies.append(f"{one.name} ({one.nbytes} bytes)")
        return count

    launches = visit(next(iter(loops), entry))
    return LoopFacts(copies, launches)


def _parse(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """Name of the entry, and the instructions of every computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry = here = ""
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            here = begins["name"]
            computations[here] = []
            entry = here if begins["entry"] else entry
        elif here and (found := _INSTRUCTION.match(line)):
            called, trips = _CALLED.search(line), _TRIPS.search(line)
            computations[here].append(
                _Instruction(
                    found["name"],
                    found["op"],
                    _nbytes(found["type"]),
                    called[1] if called else None,
                    int(trips[1]) if trips else None,
                )
            )
    return entry, computations


def _nbytes(kind: str) -> int:
    """Bytes of the largest array of a type."""
    sizes = (
        _ITEM_BYTES.get(name, 4) * math.prod(int(size) for size in shape.split(",") if size)
        for name, shape in _SHAPE.findall(kind)
    )
    return max(sizes, default=0)
