"""Times every op with every backend; the same as `specattn bench kernels`, with the device in the results' name.

    python scripts/bench_kernels.py --grid full --minutes 9

writes scripts/results/kernels-DEVICE/. The same command again goes on where the time ran out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax

from specattn_jax.bench.kernels import KernelSettings, run_kernel_benchmark

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs the grid and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("tiny", "small", "precision", "full"), default="small")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--only", help="the one contender to measure, such as pallas_triton")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    out = options.out or RESULTS / f"kernels-{device}"
    began = time.monotonic()

    def show(_: str, done: int, total: int, what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {done}/{total}  {what}", flush=True)

    run_kernel_benchmark(out, KernelSettings(options.grid, options.minutes, options.only), show)
    print((out / "kernels.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
