"""Compares two runs of the decode benchmark on one machine, such as before and after a change, point by point.

    python scripts/compare_decode.py BEFORE AFTER

Ends with an error where a window has become slower or compiling longer than is allowed, or where a point fails now.
Programs that compile in less than a second are not compared, for that says little.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from specattn_jax.bench.decode_cases import case_of
from specattn_jax.bench.runner import Report, read_report
from specattn_jax.errors import UserError

LEAST_COMPILE_S = 1.0


class Compared(NamedTuple):
    """One point of both runs.

    Attributes:
        title: case and method.
        speed: windows per second after over before; None where it failed before or after.
        compiling: seconds of compiling after over before; None where that says nothing.
        failed: whether it fails now, but did not.
        launches: kernels per window, before and after; None of a real pair.
        copies: of caches in the loop, likewise.
    """

    title: str
    speed: float | None
    compiling: float | None
    failed: bool
    launches: list[Any]
    copies: list[Any]


def compare(before: dict[str, Any], after: dict[str, Any]) -> Compared:
    """Compares the two measurements of a point."""
    both = (before, after)
    speed = compiling = None
    if all(point["failure"] is None for point in both):
        speed = before["window_seconds"] / after["window_seconds"]
        if before["compile_seconds"] >= LEAST_COMPILE_S:
            compiling = after["compile_seconds"] / before["compile_seconds"]
    loops = [point.get("loop", {}) for point in both]
    return Compared(
        f"{case_of(before).title} {before['method']}",
        speed,
        compiling,
        after["failure"] is not None and before["failure"] is None,
        [loop.get("launches") for loop in loops],
        [len(loop["cache_copies"]) if loop else None for loop in loops],
    )


def by_key(report: Report) -> dict[str, dict[str, Any]]:
    """The points of a run, by case and method."""
    return {json.dumps([point["case"], point["method"]], sort_keys=True): point for point in report["points"]}


def main() -> None:
    """Prints all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the folder of a decode.json")
    parser.add_argument("after", type=Path, help="likewise")
    parser.add_argument("--speed", type=float, default=0.98, help="least windows per second, after over before")
    parser.add_argument("--compile", type=float, default=1.1, help="most seconds of compiling, after over before")
    options = parser.parse_args()
    try:
        reports = [read_report(folder, "decode") for folder in (options.before, options.after)]
    except UserError as error:
        parser.error(str(error))
    before, after = map(by_key, reports)
    found = [compare(point, after[key]) for key, point in before.items() if key in after]
    if not found:
        parser.error("the two runs have no point in common.")
    if reports[0]["device"] != reports[1]["device"]:
        print(f"Attention: {reports[0]['device']} before, {reports[1]['device']} after.")
    bad = []
    print(f"{'case and method':60} {'speed':>6} {'compile':>8}   launches  copies of caches")
    for one in found:
        ratios = ["-" if ratio is None else f"{ratio:.3f}" for ratio in (one.speed, one.compiling)]
        slow = one.speed is not None and one.speed < options.speed
        long = one.compiling is not None and one.compiling > options.compile
        bad += [one.title] if slow or long or one.failed else []
        remarks = [word for word, holds in (("SLOWER", slow), ("COMPILES", long), ("FAILS", one.failed)) if holds]
        counts = [" -> ".join(map(str, pair)) for pair in (one.launches, one.copies) if pair[0] is not None]
        print(f"{one.title:60} {ratios[0]:>6} {ratios[1]:>8}   {'  '.join([*counts, *remarks])}".rstrip())
    print(f"{len(found)} points of both runs, {len(before | after) - len(found)} of one alone.")
    print(f"{len(bad)} are beyond what is allowed: speed {options.speed} or more, compiling {options.compile} or less.")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
