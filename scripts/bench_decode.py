"""Times whole windows of decoding; the same as `specattn bench decode`, with the device in the results' name.

    python scripts/bench_decode.py --grid small --minutes 9
    python scripts/bench_decode_hf.py --out THE_SAME_FOLDER     # Hugging Face transformers beside it

writes scripts/results/decode-DEVICE/. The same command again goes on where the time ran out. With --report DIR, table,
plots and what `--mode auto` would choose are made anew from what was measured, after configs/devices.toml has changed.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

# The largest case fills an 80 GB card; JAX would take three quarters of it. Read when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")

import jax

from specattn_jax.bench.decode import DecodeBenchmark, rewrite_decode_report, run_decode_benchmark
from specattn_jax.errors import UserError

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs the grid and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("tiny", "small", "full"), default="small")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--only", help="the one method to measure, such as speculative")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, metavar="DIR", help="measure nothing: make its table and plots anew")
    options = parser.parse_args()
    if options.report is not None:
        try:
            rewrite_decode_report(options.report)
        except UserError as error:
            parser.error(str(error))
        print((options.report / "decode.md").read_text(encoding="utf-8"))
        return
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    out = options.out or RESULTS / f"decode-{device}"
    began = time.monotonic()

    def show(_: str, done: int, total: int, what: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {done}/{total}  {what}", flush=True)

    run_decode_benchmark(out, DecodeBenchmark(options.grid, options.minutes, options.only), show)
    print((out / "decode.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
