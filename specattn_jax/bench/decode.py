"""The decode benchmark: whole windows of model pairs with random weights, every method in one run on one device."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specattn_jax.bench.decode_auto import auto_choices
from specattn_jax.bench.decode_cases import DecodeCase, DecodeGrid, DecodePoint, Method, decode_grid, methods
from specattn_jax.bench.decode_hlo import loop_facts
from specattn_jax.bench.decode_parts import time_parts
from specattn_jax.bench.decode_real import measure_real
from specattn_jax.bench.decode_report import decode_table, draw_decode
from specattn_jax.bench.decode_roofline import compare, roofline
from specattn_jax.bench.decode_workload import Workload, make_bench_selector, make_settings
from specattn_jax.decoding.speculative import DecodeSettings, DecodeState, decode
from specattn_jax.errors import UserError
from specattn_jax.files import atomic_file, first_line, read_json, write_json
from specattn_jax.planning.device import measure_profile
from specattn_jax.reporting.provenance import commit, versions
from specattn_jax.selection.TODO import Selector
from specattn_jax.timing import TimingSettings, copy_bandwidth, median_and_spread

DECODE_RESULTS, HF_RESULTS = "decode.json", "hf.json"
_COPY_BYTES = {"cpu": 1 << 22}
# A nucleus mass is good enough when it meets the wanted density so closely (relative).
_CLOSE = 0.02
_NOT_MET = 0.05
_MAX_PROBES = 16
_PROBE_WINDOWS = 2


class DecodeBenchmark(NamedTuple):
    """What to measure.

    Attributes:
        grid: which points.
        minutes: when to stop, whatever is left; None is never.
        only: the one method to measure; None is all.
    """

    grid: DecodeGrid = "small"
    minutes: float | None = None
    only: str | None = None

    @property
    def timing(self) -> TimingSettings:
        """How long a measurement takes; the tiny grid only shows that everything runs."""
        return TimingSettings(seconds=0.01, repeats=2) if self.grid == "tiny" else TimingSettings(0.3, 5)

    @property
    def part_timing(self) -> TimingSettings:
        """Likewise, of the parts of a window."""
        return self.timing._replace(seconds=self.timing.seconds / 3)


def run_decode_benchmark(
    out: Path, settings: DecodeBenchmark, progress: Callable[[str, int, int, str], None] | None = None
) -> dict[str, Any]:
    """Measures what is not yet measured in `out`, and writes everything there after each point.

    Writes decode.json, and at the end decode.md and two plots. A point that fails is kept with its error. A file
    hf.json that scripts/bench_decode_hf.py wrote there becomes part of the table.

    Args:
        out: folder; with results of the same device, commit, versions and flags the run goes on where they end.
        settings: what to measure.
        progress: told the stage, points done and to do, and the point at hand.

    Returns:
        What decode.json holds: `complete`, facts of the run, `points`, and `auto`: what the library would choose.

    Raises:
        UserError: there is no such method, or `out` holds results of another device, commit, other versions or flags,
            or cannot be written.
    """
    began = time.monotonic()
    wanted = [
        point for point in decode_grid(settings.grid) if settings.only in (None, point.method) and _can_run(point)
    ]
    if not wanted:
        raise UserError(f"method is {settings.only!r}; expected one of {', '.join(methods())}.")
    report = _begin(out / DECODE_RESULTS, settings)
    done = {_key(point["case"], point["method"]) for point in report["points"]}
    todo = [point for point in wanted if _key(dataclasses.asdict(point.case), point.method) not in done]
    report["complete"] = False
    bench = _Bench(settings, report["copy_bytes_per_second"])
    for index, point in enumerate(todo):
        if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
            break
        if progress is not None:
            progress("measuring", index, len(todo), _title(point))
        beside = [other.method for other in todo if other.case == point.case]
        report["points"].append(bench.measure(point, beside))
        _write(out / DECODE_RESULTS, report)
    else:
        report["complete"] = True
    _finish(out, report)
    return report


def rewrite_decode_report(out: Path) -> dict[str, Any]:
    """Makes table, plots and what `auto` would choose anew from decode.json; nothing is measured.

    Raises:
        UserError: there is no such file.
    """
    report = read_decode_report(out)
    _finish(out, report)
    return report


def read_decode_report(folder: Path) -> dict[str, Any]:
    """What a decode benchmark left in a folder.

    Raises:
        UserError: nothing.
    """
    if not (folder / DECODE_RESULTS).is_file():
        raise UserError(f"{folder}: there is no {DECODE_RESULTS}; expected a folder that bench decode wrote.")
    return read_json(folder / DECODE_RESULTS)


def _finish(out: Path, report: dict[str, Any]) -> None:
    """Writes everything that follows from the points."""
    compare(report["points"])
    report["auto"] = auto_choices(report)
    _write(out / DECODE_RESULTS, report)
    peers = read_json(out / HF_RESULTS) if (out / HF_RESULTS).exists() else None
    for file, data in {"decode.md": decode_table(report, peers).encode(), **draw_decode(report["points"])}.items():
        with atomic_file(out / file) as path:
            path.write_bytes(data)


def _can_run(point: DecodePoint) -> bool:
    """Whether a point's method exists on this platform."""
    return point.case.real or methods()[point.method].platform in (None, jax.default_backend())


def _title(point: DecodePoint) -> str:
    case = point.case
    return f"{case.target} B{case.batch} S{case.slots} {point.method}"


def _begin(path: Path, settings: DecodeBenchmark) -> dict[str, Any]:
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
    bandwidth = copy_bandwidth(
        TimingSettings(repeats=settings.timing.repeats), _COPY_BYTES.get(facts["platform"], 1 << 29)
    )
    # For what `auto` would choose; of accelerators it is a constant.
    flops = measure_profile().flops if facts["platform"] == "cpu" else None
    return {**facts, "complete": False, "copy_bytes_per_second": bandwidth, "flops": flops, "points": []}


def _write(path: Path, report: dict[str, Any]) -> None:
    with atomic_file(path) as work:
        write_json(work, report)


def _key(case: dict[str, Any], method: str) -> str:
    return json.dumps([case, method], sort_keys=True)


class _Bench:
    """Measures points, keeping models and caches from one to the next of the same case."""

    def __init__(self, settings: DecodeBenchmark, copy: float) -> None:
        self._settings = settings
        self._copy = copy
        self._workload: Workload | None = None

    def measure(self, point: DecodePoint, beside: Sequence[str]) -> dict[str, Any]:
        """One point, of whose case the methods `beside` are wanted; what fails says why in `failure`."""
        began = time.monotonic()
        found: dict[str, Any] = {"case": dataclasses.asdict(point.case), "method": point.method, "failure": None}
        try:
            if point.case.real:
                self._workload = None
                found |= measure_real(point.case, point.method, beside, self._settings.timing.repeats)
            else:
                found |= self._measure_random(point)
        except Exception as failure:  # a method may fail in any way, and the others are still worth measuring
            found["failure"] = f"{type(failure).__name__}: {first_line(failure)[:500]}"
            # Its caches may have been donated.
            self._workload = None
        return found | {"context": point.case.context, "measuring_seconds": time.monotonic() - began}

    def _measure_random(self, point: DecodePoint) -> dict[str, Any]:
        case, method = point.case, methods()[point.method]
        workload = self._at(case)
        settings = make_settings(case, method)
        loop = _Loop(workload, method, settings)
        selector, found = self._tune(loop, workload, method)
        found |= {**loop.facts, **_time_loop(loop, selector, settings, self._settings.timing)}
        found["memory"]["process_peak"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        window = found["window_seconds"]
        if point.parts and method.mode != "autoregressive":
            parts = time_parts(workload, selector, settings, self._settings.part_timing)
            found["parts"] = parts | {"rest": window - sum(parts.values())}
        return found | roofline(case, method, found, self._copy)

    def _at(self, case: DecodeCase) -> Workload:
        """Models and caches of a case; those of the case before are given up first, but for the models."""
        if self._workload is None or self._workload.case != case:
            pair = None if self._workload is None else self._workload.pair
            self._workload = None
            if pair is not None and not pair.fits(case):
                pair = None
            gc.collect()
            self._workload = Workload(case, pair)
        return self._workload

    def _tune(self, loop: _Loop, workload: Workload, method: Method) -> tuple[Selector | None, dict[str, Any]]:
        """The selector at the nucleus mass that reads the wanted share, found by bisection; random attention has none.

        The mass is uniform and is not steered, so that what is measured afterwards reads the same.
        """
        if not method.sparse_target:
            return make_bench_selector(workload.pair, method, 1.0), {}
        low, high, wanted, found = 0.0, 1.0, workload.case.density, 1.0
        p = 0.5
        for _ in range(_MAX_PROBES):
            p = (low + high) / 2
            found = loop.run(make_bench_selector(workload.pair, method, p), _PROBE_WINDOWS).density
            if abs(found / wanted - 1.0) < _CLOSE:
                break
            low, high = (low, p) if found > wanted else (p, high)
        facts: dict[str, Any] = {"p": p}
        if abs(found / wanted - 1.0) > _NOT_MET:
            facts["note"] = f"the wanted density of {wanted:.0%} cannot be met: {found:.1%} is the nearest"
        return make_bench_selector(workload.pair, method, p), facts


class _Run(NamedTuple):
    """One call of the loop.

    Attributes:
        seconds: of the call.
        tokens: emitted by all sequences.
        density: share of the target's cache that was read.
    """

    seconds: float
    tokens: int
    density: float


class _Loop:
    """The jitted loop of one method, compiled, over a workload's caches."""

    def __init__(self, workload: Workload, method: Method, settings: DecodeSettings) -> None:
        self.case = workload.case
        self._workload, self._settings = workload, settings
        self._alone = method.mode == "autoregressive"
        selector = make_bench_selector(workload.pair, method, 0.5)
        state = self._state(selector)
        began = time.perf_counter()
        lowered = decode.lower(workload.pair.target, self._draft, selector, state, jnp.int32(0), settings=settings)
        traced = time.perf_counter()
        self._call = lowered.compile()
        done = time.perf_counter()
        self.facts: dict[str, Any] = {
            "trace_seconds": traced - began,
            "compile_seconds": done - began,
            "memory": self._memory(),
            "loop": self._loop_facts(),
        }

    @property
    def _draft(self) -> Any:
        return None if self._alone else self._workload.pair.draft

    def _state(self, selector: Selector | None) -> DecodeState:
        state = self._workload.start(self._settings, selector)
        return dataclasses.replace(state, draft_cache=None) if self._alone else state

    def _memory(self) -> dict[str, Any]:
        """Bytes of the models and caches, and those that the program needs."""
        found = self._call.memory_analysis()
        facts: dict[str, Any] = {"weights": self._workload.weight_bytes, "caches": self._workload.cache_bytes}
        if found is not None:
            arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
            program = arguments + temporaries + found.output_size_in_bytes - found.alias_size_in_bytes
            facts |= {"arguments": arguments, "temporaries": temporaries, "program": program}
        return facts

    def _loop_facts(self) -> dict[str, Any]:
        text = self._call.as_text()
        return {} if text is None else loop_facts(text, self._workload.layer_cache_bytes)._asdict()

    def run(self, selector: Selector | None, windows: int) -> _Run:
        """So many windows from the case's context on."""
        state = jax.block_until_ready(self._state(selector))
        began = time.perf_counter()
        state = self._call(self._workload.pair.target, self._draft, selector, state, jnp.int32(windows))
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        self._workload.give_back(state.target_cache, state.draft_cache)
        emitted, read, counted = jax.device_get((state.emitted, state.statistics.read, state.statistics.windows))
        if not np.all(counted == windows):
            raise RuntimeError(f"{counted} windows were decoded, but {windows} were wanted.")
        return _Run(seconds, int(emitted.sum()), float(read.mean() / windows))


def _time_loop(
    loop: _Loop, selector: Selector | None, settings: DecodeSettings, timing: TimingSettings
) -> dict[str, Any]:
    """Tokens per second: median of several calls, each as long as the empty slots allow but no longer than needed."""
    case = loop.case
    # Every acceptance equally often.
    cycle = max(1, len(case.accepted))
    per_cycle = cycle if settings.mode == "autoregressive" else cycle + sum(case.accepted)
    most = max(1, (case.room - settings.tokens_per_window) // per_cycle)
    loop.run(selector, cycle)
    estimate = loop.run(selector, cycle).seconds
    windows = cycle * max(1, min(most, round(timing.seconds / estimate)))
    loop.run(selector, windows)
    runs = [loop.run(selector, windows) for _ in range(timing.repeats)]
    seconds = [run.seconds for run in runs]
    median, spread = median_and_spread(seconds)
    return {
        "tokens_per_second": runs[0].tokens / median,
        "window_seconds": median / windows,
        "spread": spread,
        "windows": windows,
        "repeats": timing.repeats,
        "density": runs[-1].density,
    }
