"""Times whole windows of decoding; the same as `specattn bench decode`, with the device in the results' name.

    python scripts/bench_decode.py --grid small --minutes 9
    python scripts/bench_decode.py --cases "B8 S32768" "B1 S2048" --only speculative specattn --out AFTER
    python scripts/compare_decode.py BEFORE AFTER
    python scripts/bench_decode_hf.py --out THE_SAME_FOLDER     # Hugging Face transformers beside it

writes scripts/results/decode-DEVICE/. The same command again goes on where the time ran out. With --report DIR, table,
plots and what `--mode auto` would choose are made anew from what was measured, after configs/devices.toml has changed.
"""

from __future__ import annotations

import os
from pathlib import Path

# The largest case fills an 80 GB card; JAX would take three quarters of it. Read when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")

from specattn_jax.bench.decode import decode_benchmark
from specattn_jax.bench.script import run_script

if __name__ == "__main__":
    run_script(__doc__, ("tiny", "small", "full"), decode_benchmark, Path(__file__).parent / "results")
