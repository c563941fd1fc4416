"""Times every op with every backend; the same as `specattn bench kernels`, with the device in the results' name.

    python scripts/bench_kernels.py --grid full --minutes 9

writes scripts/results/kernels-DEVICE/. The same command again goes on where the time ran out.
"""

from __future__ import annotations

from pathlib import Path

from specattn_jax.bench.kernels import kernel_benchmark
from specattn_jax.bench.script import run_script

if __name__ == "__main__":
    run_script(__doc__, ("tiny", "small", "precision", "full"), kernel_benchmark, Path(__file__).parent / "results")
