"""Says where a window's time goes, kernel by kernel: how long each runs, how often, and in which order. Needs a GPU.

    python scripts/profile_window.py --target qwen2.5-coder-1.5b --draft qwen2.5-coder-0.5b --batch 1 16 --out DIR
    python scripts/profile_window.py --batch 16 --methods specattn --p 0.1 --out DIR

Weights and caches are random, and windows accept four and three of five tokens in turns, as in `specattn bench decode`.
Kernels are recorded without CUDA graphs, so that each of them is seen; the time of a window is measured apart, with
them. Names that end in a number are XLA's own, by the operation that they were made of. `scripts/fit_devices.py` takes
what is written, window.json, beside benchmarks.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax

from specattn_jax.bench.decode import Loop
from specattn_jax.bench.decode_cases import DecodeCase
from specattn_jax.bench.decode_methods import CHOICES, methods
from specattn_jax.bench.decode_workload import Workload
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.errors import UserError
from specattn_jax.files import write_json
from specattn_jax.planning.device import measure_profile
from specattn_jax.reporting.provenance import commit, hardware, versions
from specattn_jax.timing import median_and_spread

WINDOWS, TURNS = 24, 4
# Kernels that are named, the longest first.
MOST_KERNELS = 60


class Kernel(NamedTuple):
    """One kernel that ran, in nanoseconds."""

    start: int
    end: int
    name: str


def recorded(folder: Path) -> list[Kernel]:
    """All kernels of a trace, in the order in which they began.

    Raises:
        UserError: there are none.
    """
    found = [
        Kernel(round(event.start_ns), round(event.start_ns + event.duration_ns), event.name)
        for file in folder.rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]
    if not found:
        raise UserError(f"device is {jax.default_backend()!r}, whose kernels are not recorded; expected a GPU.")
    return sorted(found)


def busy(kernels: list[Kernel]) -> int:
    """Nanoseconds in which at least one of them ran."""
    total, until = 0, 0
    for kernel in kernels:
        total += max(0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def summary(kernels: list[Kernel], windows: int) -> dict[str, Any]:
    """Microseconds a window: of all kernels, of each, and one window's kernels in order."""
    seconds, times = Counter[str](), Counter[str]()
    for kernel in kernels:
        seconds[kernel.name] += kernel.end - kernel.start
        times[kernel.name] += 1
    each = len(kernels) // windows
    middle = kernels[len(kernels) // 2 :][:each]
    return {
        "busy_us": round(busy(kernels) / 1e3 / windows, 1),
        "launches": each,
        "kernels": [
            {"name": name, "us": round(spent / 1e3 / windows, 2), "launches": round(times[name] / windows, 2)}
            for name, spent in seconds.most_common(MOST_KERNELS)
        ],
        "in_order": [[kernel.name, round((kernel.end - kernel.start) / 1e3, 2)] for kernel in middle],
    }


def profile(loop: Loop, strategy: Strategy) -> dict[str, Any]:
    """How long a window takes, and of which kernels it is made."""
    # The first run of a program may be slow, whatever was compiled.
    loop.run(strategy, WINDOWS)
    runs = [loop.run(strategy, WINDOWS) for _ in range(TURNS)]
    median, spread = median_and_spread([run.seconds / WINDOWS for run in runs])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            loop.run(strategy, WINDOWS)
        kernels = recorded(Path(folder))
    timed = {"window_seconds": median, "spread": spread, "density": runs[-1].density}
    return timed | summary(kernels, WINDOWS)


def main() -> None:
    """Profiles one method after the other, and writes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b", help="a shape of configs/shapes.toml")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b", help="likewise")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--slots", type=int, default=30256)
    parser.add_argument("--methods", nargs="+", default=list(CHOICES), choices=list(methods()))
    parser.add_argument("--p", type=float, default=0.1, help="nucleus mass: of random attention hardly any is enough")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    report: dict[str, Any] = {"command": asked, "versions": versions(), "commit": commit(), "hardware": hardware()}
    report |= {"copy_bytes_per_second": measure_profile().bandwidth, "points": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for batch in options.batch:
        case = DecodeCase(options.target, options.draft, batch, options.slots)
        workload = Workload(case)
        for name in options.methods:
            loop = Loop(workload, methods()[name])
            found = profile(loop, loop.make(options.p))
            report["points"].append({"case": dataclasses.asdict(case), "method": name, "failure": None} | found)
            write_json(options.out / "window.json", report)
            print(f"B{batch} {name}: {1e3 * found['window_seconds']:.2f} ms, {found['launches']} kernels", flush=True)
        # Two workloads would not fit.
        del workload, loop


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
