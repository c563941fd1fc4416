"""The one runner of all benchmarks: measures what is not yet measured in a folder, and writes after each point."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax

from specattn_jax.errors import UserError
from specattn_jax.files import atomic_file, first_line, read_json, write_json
from specattn_jax.reporting.provenance import commit, versions
from specattn_jax.timing import TimingSettings, copy_bandwidth

_COPY_TIMING = TimingSettings(repeats=5)
_COPY_BYTES = {"cpu": 1 << 22}

# What a results file holds: `complete`, facts of the run, and `points`.
Report: TypeAlias = dict[str, Any]
# Told the stage, points done and to do, and the point at hand.
Progress: TypeAlias = Callable[[str, int, int, str], None]


class Point(NamedTuple):
    """One measurement of a benchmark.

    Attributes:
        case: what is measured: a frozen dataclass of numbers and texts.
        name: which of those that are compared in this case.
        title: the case for people, in few words.
        parts: whether its parts are measured too.
    """

    case: Any
    name: str
    title: str
    parts: bool = False


# Measures a point, told the names of all points of its case that are still to be measured.
Measure: TypeAlias = Callable[[Point, Sequence[str]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is measured, and what follows from it.

    Attributes:
        file: stem of the files of results, FILE.json and FILE.md.
        compared: what the names of points are called in the results, such as method.
        points: all that can be measured on this platform, in their order.
        open: makes what measures points, given the report so far.
        conclude: adds to the report what follows from all points.
        files: table and pictures by file name, given the report, and the folder, which may hold results of others.
        facts: measures once what is measured before the points, besides what every benchmark measures.
    """

    file: str
    compared: str
    points: Sequence[Point]
    open: Callable[[Report], Measure]
    conclude: Callable[[Report], None]
    files: Callable[[Report, Path], Mapping[str, bytes]]
    facts: Callable[[], Report] = dict


class Limits(NamedTuple):
    """How much of a benchmark is measured.

    Attributes:
        minutes: when to stop, whatever is left; None is never.
        only: names of the points to measure; empty is all.
        cases: parts of the titles of the cases to measure, such as "B8 S32768"; empty is all.
    """

    minutes: float | None = None
    only: Sequence[str] = ()
    cases: Sequence[str] = ()


def run_benchmark(
    out: Path, benchmark: Benchmark, limits: Limits | None = None, progress: Progress | None = None
) -> Report:
    """Measures what is not yet measured in `out`, and writes everything there after each point.

    Writes a JSON file, and at the end a table and plots. A point that fails is kept, with its error in `failure`.

    Args:
        out: folder; with results of the same device, commit, versions and flags the run goes on where they end.
        benchmark: what to measure.
        limits: how much of it.
        progress: told how far it is.

    Raises:
        UserError: the limits leave nothing, or `out` holds results of another device, commit, other versions or flags,
            or cannot be written.
    """
    limits = limits or Limits()
    began = time.monotonic()
    wanted = _wanted(benchmark, limits)
    report = _begin(_path(out, benchmark), benchmark)
    done = {_key(point["case"], point[benchmark.compared]) for point in report["points"]}
    todo = [point for point in wanted if _key(dataclasses.asdict(point.case), point.name) not in done]
    report["complete"] = False
    measure = benchmark.open(report)
    for index, point in enumerate(todo):
        if limits.minutes is not None and time.monotonic() - began > 60 * limits.minutes:
            break
        if progress is not None:
            progress("measuring", index, len(todo), f"{point.title} {point.name}")
        beside = [other.name for other in todo if other.case == point.case]
        head = {"case": dataclasses.asdict(point.case), benchmark.compared: point.name}
        report["points"].append(head | _attempt(measure, point, beside))
        _write(_path(out, benchmark), report)
    else:
        report["complete"] = True
    _finish(out, benchmark, report)
    return report


def rewrite_report(out: Path, benchmark: Benchmark) -> Report:
    """Makes anew what follows from the points in a folder; nothing is measured.

    Raises:
        UserError: there are none.
    """
    report = read_report(out, benchmark.file)
    _finish(out, benchmark, report)
    return report


def read_report(folder: Path, file: str) -> Report:
    """What a benchmark left in a folder.

    Args:
        folder: where.
        file: stem of its files.

    Raises:
        UserError: nothing.
    """
    path = folder / f"{file}.json"
    if not path.is_file():
        raise UserError(f"{folder}: there is no {path.name}; expected a folder that bench {file} wrote.")
    return read_json(path)


def _path(out: Path, benchmark: Benchmark) -> Path:
    return out / f"{benchmark.file}.json"


def _wanted(benchmark: Benchmark, limits: Limits) -> list[Point]:
    """The points that the limits leave."""
    points = benchmark.points
    names, titles = dict.fromkeys(point.name for point in points), dict.fromkeys(point.title for point in points)
    for name in limits.only:
        if name not in names:
            raise UserError(f"{benchmark.compared} is {name!r}; expected one of {', '.join(names)}.")
    for part in limits.cases:
        if not any(part in title for title in titles):
            raise UserError(f"case is {part!r}; expected a part of one of {', '.join(titles)}.")
    return [
        point
        for point in points
        if point.name in (limits.only or names) and any(part in point.title for part in limits.cases or ("",))
    ]


def _begin(path: Path, benchmark: Benchmark) -> Report:
    """The results so far, or the head of new ones."""
    facts = {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "commit": commit(),
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    if path.exists():
        report = read_json(path)
        earlier = {name: report.get(name) for name in facts}
        if earlier != facts:
            raise UserError(f"{path.parent}: holds results of {earlier}, this is {facts}; choose another folder.")
        return report
    bandwidth = copy_bandwidth(_COPY_TIMING, _COPY_BYTES.get(jax.default_backend(), 1 << 29))
    return {**facts, "complete": False, "copy_bytes_per_second": bandwidth, **benchmark.facts(), "points": []}


def _attempt(measure: Measure, point: Point, beside: Sequence[str]) -> dict[str, Any]:
    """What was measured; what fails says why in `failure`."""
    began = time.monotonic()
    try:
        found = measure(point, beside) | {"failure": None}
    except Exception as failure:  # anything may fail in any way, and the other points are still worth measuring
        found = {"failure": f"{type(failure).__name__}: {first_line(failure)[:500]}"}
    return found | {"measuring_seconds": time.monotonic() - began}


def _finish(out: Path, benchmark: Benchmark, report: Report) -> None:
    """Writes everything that follows from the points."""
    benchmark.conclude(report)
    _write(_path(out, benchmark), report)
    for file, data in benchmark.files(report, out).items():
        with atomic_file(out / file) as path:
            path.write_bytes(data)


def _write(path: Path, report: Report) -> None:
    with atomic_file(path) as work:
        write_json(work, report)


def _key(case: Mapping[str, Any], name: str) -> str:
    return json.dumps([case, name], sort_keys=True)
