"""The kernel benchmark: every op over a grid, each backend and what competes with it, in one run on one device."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from specattn_jax.bench.kernel_cases import Case, Grid, make_grid
from specattn_jax.bench.kernel_ops import Contender, make_work
from specattn_jax.bench.kernel_report import draw, kernel_table
from specattn_jax.errors import UserError
from specattn_jax.files import atomic_file, first_line, read_json, write_json
from specattn_jax.reporting.provenance import commit, versions
from specattn_jax.timing import TimingSettings, copy_bandwidth, time_calls

RESULTS = "kernels.json"
_COPY_BYTES = {"cpu": 1 << 22}
# Shape alone decides what a sparse point is compared with.
_DENSE_FIELDS = ("batch", "kv_heads", "slots", "group", "tokens", "head_dim", "dtype")


class KernelSettings(NamedTuple):
    """What to measure.

    Attributes:
        grid: which cases.
        minutes: when to stop, whatever is left; None is never.
        only: the one contender to measure, such as "pallas_triton"; None is all.
    """

    grid: Grid = "small"
    minutes: float | None = None
    only: str | None = None

    @property
    def timing(self) -> TimingSettings:
        """How long each measurement takes; the tiny grid only shows that everything runs."""
        return TimingSettings(seconds=0.001, repeats=2, rotate=0) if self.grid == "tiny" else TimingSettings()


def run_kernel_benchmark(
    out: Path, settings: KernelSettings, progress: Callable[[str, int, int, str], None] | None = None
) -> dict[str, Any]:
    """Measures what is not yet measured in `out`, and writes everything there after each point.

    Writes kernels.json, and at the end kernels.md and three plots. A point that fails is kept with its error.

    Args:
        out: folder; with results of the same device, commit and versions the run goes on where they end.
        settings: what to measure.
        progress: told the stage, points done and to do, and the point at hand.

    Returns:
        What kernels.json holds: `complete`, facts of the run, and `points`.

    Raises:
        UserError: `out` holds results of another device, commit or other versions, or cannot be written.
    """
    began = time.monotonic()
    report = _begin(out / RESULTS, settings)
    done = {_key(point["case"], point["contender"]) for point in report["points"]}
    todo = [
        (case, name)
        for case in make_grid(settings.grid)
        for name in make_work(case).contenders
        if _key(dataclasses.asdict(case), name) not in done and settings.only in (None, name)
    ]
    report["complete"] = False
    for index, (case, name) in enumerate(todo):
        if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
            break
        if progress is not None:
            progress("measuring", index, len(todo), f"{case.op} {name}")
        report["points"].append(_measure(case, name, settings.timing, report["copy_bytes_per_second"]))
        _write(out / RESULTS, report)
    else:
        report["complete"] = True
    _compare(report["points"])
    _write(out / RESULTS, report)
    for file, data in {"kernels.md": kernel_table(report).encode(), **draw(report["points"])}.items():
        with atomic_file(out / file) as path:
            path.write_bytes(data)
    return report


def _begin(path: Path, settings: KernelSettings) -> dict[str, Any]:
    """The results so far, or the head of new ones."""
    facts = {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "commit": commit(),
        "versions": versions(),
    }
    if path.exists():
        report = read_json(path)
        earlier = {name: report.get(name) for name in facts}
        if earlier != facts:
            raise UserError(f"{path.parent}: holds results of {earlier}, this is {facts}; choose another folder.")
        return report
    platform = jax.default_backend()
    bandwidth = copy_bandwidth(settings.timing, _COPY_BYTES.get(platform, 1 << 29))
    return {**facts, "complete": False, "copy_bytes_per_second": bandwidth, "points": []}


def _write(path: Path, report: dict[str, Any]) -> None:
    with atomic_file(path) as work:
        write_json(work, report)


def _key(case: dict[str, Any], contender: str) -> str:
    return json.dumps([case, contender], sort_keys=True)


def _measure(case: Case, name: str, timing: TimingSettings, copy: float) -> dict[str, Any]:
    """One point; what fails says why in `failure`."""
    point: dict[str, Any] = {"case": dataclasses.asdict(case), "contender": name, "failure": None}
    try:
        work = make_work(case)
        contender = work.contenders[name]
        measured = time_calls(contender.call, contender.make, work.nbytes, timing)
        point |= {
            "seconds": measured.seconds,
            "spread": measured.spread,
            "calls": measured.calls,
            "input_sets": measured.sets,
            "bytes": work.nbytes,
            "share_of_copy_bandwidth": work.nbytes / measured.seconds / copy,
            "relative_error": _error(contender),
        }
    except Exception as failure:  # a kernel may fail in any way, and the others are still worth measuring
        point["failure"] = f"{type(failure).__name__}: {first_line(failure)[:500]}"
    return point


def _error(contender: Contender) -> float | None:
    """Relative error of one fresh call; inputs of a seed that was not timed."""
    if contender.error is None:
        return None
    inputs = contender.make(12345)
    return contender.error(inputs, jax.jit(contender.call)(*inputs))


def _compare(points: list[dict[str, Any]]) -> None:
    """Adds to every point its speed-ups over what competes with it in the same run.

    Sparse attention competes with dense attention of the same shape, all else with what computes the same.
    """
    for point in points:
        if point["failure"] is None:
            rivals = [other for other in points if other["failure"] is None and _competes(other, point)]
            point["speedup_over"] = {rival["contender"]: rival["seconds"] / point["seconds"] for rival in rivals}


def _competes(other: dict[str, Any], point: dict[str, Any]) -> bool:
    """Whether a point is a baseline of another; our own kernels are of none."""
    theirs, mine = other["case"], point["case"]
    if other is point or other["contender"].startswith("pallas"):
        return False
    if mine["op"] != "sparse_decode_attention":
        return bool(theirs == mine)
    return theirs["op"] == "decode_attention" and all(theirs[name] == mine[name] for name in _DENSE_FIELDS)
