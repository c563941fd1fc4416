"""What the scripts that run one benchmark have in common: options, progress, and the table at the end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from specattn_jax.bench.runner import Benchmark, Limits, rewrite_report, run_benchmark
from specattn_jax.errors import UserError


def run_script(describe: str | None, grids: Sequence[str], make: Callable[[Any], Benchmark], results: Path) -> None:
    """Runs a benchmark as the command line says, and prints its table.

    Args:
        describe: what the script does.
        grids: names of its grids.
        make: makes the benchmark of a grid.
        results: holds the folders of results, one for each device.
    """
    parser = argparse.ArgumentParser(description=describe, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=grids, default="small" if "small" in grids else grids[0])
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="measure these alone of what is compared")
    parser.add_argument("--cases", nargs="+", default=(), metavar="PART", help='these cases alone, such as "B8 S32768"')
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, metavar="DIR", help="measure nothing: make its table and plots anew")
    options = parser.parse_args()
    benchmark, began = make(options.grid), time.monotonic()

    def show(_: str, done: int, total: int, what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {done}/{total}  {what}", flush=True)

    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    out = options.report or options.out or results / f"{benchmark.file}-{device}"
    try:
        if options.report is None:
            run_benchmark(out, benchmark, Limits(options.minutes, options.only, options.cases), show)
        else:
            rewrite_report(out, benchmark)
    except UserError as error:
        parser.error(str(error))
    print((out / f"{benchmark.file}.md").read_text(encoding="utf-8"))
