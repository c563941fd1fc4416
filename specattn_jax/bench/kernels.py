"""The kernel benchmark: every op over a grid, each backend and what competes with it, in one run on one device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from specattn_jax.bench.kernel_cases import Grid, make_grid
from specattn_jax.bench.kernel_ops import Contender, make_work
from specattn_jax.bench.kernel_report import draw, kernel_table
from specattn_jax.bench.runner import Benchmark, Point
from specattn_jax.timing import TimingSettings, time_calls

# Shape alone decides what a sparse point is compared with.
_DENSE_FIELDS = ("batch", "kv_heads", "slots", "group", "tokens", "head_dim", "dtype")


def kernel_benchmark(grid: Grid = "small") -> Benchmark:
    """What `specattn bench kernels` measures: every contender of every case; writes three plots."""
    # The tiny grid only shows that everything runs.
    timing = TimingSettings(seconds=0.001, repeats=2, rotate=0) if grid == "tiny" else TimingSettings()
    return Benchmark(
        file="kernels",
        compared="contender",
        points=[
            Point(case, name, f"{case.op} B{case.batch} K{case.kv_heads} S{case.slots}")
            for case in make_grid(grid)
            for name in make_work(case).contenders
        ],
        open=lambda report: functools.partial(_measure, timing, report["copy_bytes_per_second"]),
        conclude=lambda report: _compare(report["points"]),
        files=lambda report, _: {"kernels.md": kernel_table(report).encode(), **draw(report["points"])},
    )


def _measure(timing: TimingSettings, copy: float, point: Point, beside: Sequence[str]) -> dict[str, Any]:
    """One point, against a copy of so many bytes per second."""
    work = make_work(point.case)
    contender = work.contenders[point.name]
    measured = time_calls(contender.call, contender.make, work.nbytes, timing)
    return {
        "seconds": measured.seconds,
        "spread": measured.spread,
        "calls": measured.calls,
        "input_sets": measured.sets,
        "bytes": work.nbytes,
        "share_of_copy_bandwidth": work.nbytes / measured.seconds / copy,
        "relative_error": _error(contender),
    }


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
    good = [point for point in points if point["failure"] is None]
    for point in good:
        rivals = [other for other in good if _competes(other, point)]
        point["speedup_over"] = {rival["contender"]: rival["seconds"] / point["seconds"] for rival in rivals}


def _competes(other: dict[str, Any], point: dict[str, Any]) -> bool:
    """Whether a point is a baseline of another; our own kernels are of none."""
    theirs, mine = other["case"], point["case"]
    if other is point or other["contender"].startswith("pallas"):
        return False
    if mine["op"] != "sparse_decode_attention":
        return bool(theirs == mine)
    return theirs["op"] == "decode_attention" and all(theirs[name] == mine[name] for name in _DENSE_FIELDS)
