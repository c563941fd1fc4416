"""The decode benchmark: whole windows of model pairs with random weights, every method in one run on one device."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specattn_jax.bench.decode_auto import auto_choices
from specattn_jax.bench.decode_cases import DecodeCase, DecodeGrid, decode_grid, mesh_grid, on_mesh
from specattn_jax.bench.decode_hlo import loop_facts
from specattn_jax.bench.decode_methods import Method, methods
from specattn_jax.bench.decode_parts import time_parts
from specattn_jax.bench.decode_real import measure_real
from specattn_jax.bench.decode_report import decode_table, draw_decode
from specattn_jax.bench.decode_roofline import compare, roofline
from specattn_jax.bench.decode_workload import Workload, backend_of, bench_strategy, link_facts, peak_bytes
from specattn_jax.bench.runner import Benchmark, Point, Report
from specattn_jax.decoding.loop import decode
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.speculative import Speculative
from specattn_jax.decoding.state import DecodeState
from specattn_jax.files import read_json
from specattn_jax.planning.device import measure_profile
from specattn_jax.timing import TimingSettings, median_and_spread

HF_RESULTS = "hf.json"
# A nucleus mass is good enough when it meets the wanted density so closely (relative).
_CLOSE = 0.02
_NOT_MET = 0.05
_MAX_PROBES = 16
_PROBE_WINDOWS = 2


def decode_benchmark(grid: DecodeGrid = "small", mesh: str | None = None) -> Benchmark:
    """What `specattn bench decode` measures: the points of a grid whose methods exist on this platform.

    Besides points there is `auto` in decode.json: what the library would choose. A file hf.json that
    scripts/bench_decode_hf.py wrote into the folder becomes part of the table.

    Args:
        grid: which points.
        mesh: devices that share the work, such as heads=2, which are compared with one of them; None: one alone.
    """
    # The tiny grid only shows that everything runs.
    timing = TimingSettings(seconds=0.01, repeats=2) if grid == "tiny" else TimingSettings(0.3, 5)
    known, here = methods(), (None, jax.default_backend())
    return Benchmark(
        file="decode",
        compared="method",
        points=[
            point for point in on_mesh(decode_grid(grid), mesh) if point.case.real or known[point.name].platform in here
        ],
        open=lambda report: _Bench(timing, report["copy_bytes_per_second"]).measure,
        conclude=_conclude,
        files=_files,
        facts=functools.partial(_facts, () if mesh is None else (mesh,)),
    )


def _facts(meshes: Sequence[str]) -> Report:
    """What is measured before the points: how fast devices meet; and for what `auto` would choose, arithmetic."""
    # Of accelerators it is a constant.
    flops = measure_profile().flops if jax.default_backend() == "cpu" else None
    return {"flops": flops, **({"links": link_facts(meshes)} if meshes else {})}


def _conclude(report: Report) -> None:
    """Adds speed-ups within a case, and what `auto` would choose."""
    compare(report["points"])
    report["auto"] = auto_choices(report)


def _files(report: Report, folder: Path) -> dict[str, bytes]:
    """The table, and speed and parts as plots."""
    peers = read_json(folder / HF_RESULTS) if (folder / HF_RESULTS).exists() else None
    return {"decode.md": decode_table(report, peers).encode(), **draw_decode(report["points"])}


def mesh_benchmark(meshes: Sequence[str]) -> Benchmark:
    """The decode benchmark of two long contexts, on one device and on meshes such as heads=2 and data=2.

    Writes mesh.json, with how fast the devices meet, and mesh.md with what they gain.
    """
    return dataclasses.replace(
        decode_benchmark(),
        file="mesh",
        points=mesh_grid(meshes),
        conclude=lambda report: compare(report["points"]),
        files=lambda report, _: {"mesh.md": decode_table(report).encode()},
        facts=functools.partial(_facts, meshes),
    )


class _Bench:
    """Measures points, keeping models and caches from one to the next of the same case."""

    def __init__(self, timing: TimingSettings, copy: float) -> None:
        self._timing = timing
        self._copy = copy
        self._workload: Workload | None = None

    def measure(self, point: Point, beside: Sequence[str]) -> dict[str, Any]:
        """One point, of whose case the methods `beside` are wanted."""
        try:
            if point.case.real:
                self._workload = None
                found = measure_real(point.case, point.name, beside, self._timing.repeats)
            else:
                found = self._measure_random(point)
        except Exception:
            # Its caches may have been donated.
            self._workload = None
            raise
        return found | {"context": point.case.context}

    def _measure_random(self, point: Point) -> dict[str, Any]:
        case, method = point.case, methods()[point.name]
        loop = Loop(self._at(case), method)
        strategy, found = _tune(loop)
        found |= {**loop.facts, **_time_loop(loop, strategy, self._timing)}
        found["memory"]["process_peak"] = peak_bytes()
        if point.parts and isinstance(strategy, Speculative):
            part_timing = self._timing._replace(seconds=self._timing.seconds / 3)
            parts = time_parts(loop.workload, strategy, loop.start(strategy), part_timing)
            found["parts"] = parts | {"rest": found["window_seconds"] - sum(parts.values())}
        return found | roofline(case, method, found, self._copy)

    def _at(self, case: DecodeCase) -> Workload:
        """Models and caches of a case; those of the case before are given up first, but for the models."""
        if self._workload is None or self._workload.case != case:
            models = None if self._workload is None else self._workload.models_for(case)
            self._workload = None
            gc.collect()
            self._workload = Workload(case, models)
        return self._workload


class Run(NamedTuple):
    """One call of the loop.

    Attributes:
        seconds: of the call.
        tokens: emitted by all sequences.
        density: share of the target's cache that was read.
    """

    seconds: float
    tokens: int
    density: float


class Loop:
    """The jitted loop of one method, compiled, over a workload's caches.

    Attributes:
        workload: models and caches.
        make: the method's strategy at a nucleus mass.
        facts: what compiling took, and what came of it.
    """

    def __init__(self, workload: Workload, method: Method) -> None:
        self.workload = workload
        self.make: Callable[[float], Strategy] = functools.partial(bench_strategy, workload, method)
        self._backend = backend_of(method)
        strategy = self.make(0.5)
        self._models = workload.session.of(strategy)
        state = self.start(strategy)
        began = time.perf_counter()
        lowered = decode.lower(strategy, self._models, state, jnp.int32(0))
        traced = time.perf_counter()
        self._call = lowered.compile()
        done = time.perf_counter()
        workload.give_back(state)
        found, text = self._call.memory_analysis(), self._call.as_text()
        memory = {"weights": workload.weight_bytes, "caches": workload.cache_bytes}
        if found is not None:
            needed = found.argument_size_in_bytes + found.temp_size_in_bytes
            needed += found.output_size_in_bytes - found.alias_size_in_bytes
            memory |= {"temporaries": found.temp_size_in_bytes, "program": needed}
        self.facts: dict[str, Any] = {
            "trace_seconds": traced - began,
            "compile_seconds": done - began,
            "memory": memory,
            "loop": {} if text is None else loop_facts(text, workload.layer_cache_bytes)._asdict(),
        }

    def start(self, strategy: Strategy) -> DecodeState:
        """A state at the case's context, which has to be given back."""
        return jax.block_until_ready(self.workload.start(strategy, self._backend))

    def run(self, strategy: Strategy, windows: int) -> Run:
        """So many windows from the case's context on."""
        state = self.start(strategy)
        before = int(state.emitted.sum())
        began = time.perf_counter()
        state = jax.block_until_ready(self._call(strategy, self._models, state, jnp.int32(windows)))
        seconds = time.perf_counter() - began
        self.workload.give_back(state)
        emitted, read, counted = jax.device_get((state.emitted, state.statistics.read, state.statistics.windows))
        if not np.all(counted == windows):
            raise RuntimeError(f"{counted} windows were decoded, but {windows} were wanted.")
        return Run(seconds, int(emitted.sum()) - before, float(read.mean() / windows))


def _tune(loop: Loop) -> tuple[Strategy, dict[str, Any]]:
    """The strategy at the nucleus mass that reads the wanted share, found by bisection; random attention has none.

    The mass is uniform and is not steered, so that what is measured afterwards reads the same.
    """
    strategy = loop.make(1.0)
    if strategy.lossless:
        return strategy, {}
    low, high, wanted, found = 0.0, 1.0, loop.workload.case.density, 1.0
    p = 0.5
    for _ in range(_MAX_PROBES):
        p = (low + high) / 2
        strategy = loop.make(p)
        found = loop.run(strategy, _PROBE_WINDOWS).density
        if abs(found / wanted - 1.0) < _CLOSE:
            break
        low, high = (low, p) if found > wanted else (p, high)
    facts: dict[str, Any] = {"p": p}
    if abs(found / wanted - 1.0) > _NOT_MET:
        facts["note"] = f"the wanted density of {wanted:.0%} cannot be met: {found:.1%} is the nearest"
    return strategy, facts


def _time_loop(loop: Loop, strategy: Strategy, timing: TimingSettings) -> dict[str, Any]:
    """Tokens per second: median of several calls, each as long as the empty slots allow but no longer than needed."""
    case = loop.workload.case
    # Every acceptance equally often.
    cycle = max(1, len(case.accepted))
    per_cycle = cycle + sum(case.accepted) if strategy.window else cycle
    most = max(1, (case.room - (strategy.window + 1)) // per_cycle)
    loop.run(strategy, cycle)
    estimate = loop.run(strategy, cycle).seconds
    windows = cycle * max(1, min(most, round(timing.seconds / estimate)))
    loop.run(strategy, windows)
    runs = [loop.run(strategy, windows) for _ in range(timing.repeats)]
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
