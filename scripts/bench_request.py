"""Times whole requests; the same as `specattn bench request`, with the device in the results' name.

    python scripts/bench_request.py --minutes 9
    python scripts/bench_request_hf.py --out THE_SAME_FOLDER     # Hugging Face transformers beside it
    python scripts/bench_request.py --report THE_SAME_FOLDER     # puts both into one table

writes scripts/results/request-DEVICE/. The same command again goes on where the time ran out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

# The largest case fills an 80 GB card; JAX would take three quarters of it. Read when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")

from specattn_jax.bench.request import RequestGrid, request_benchmark
from specattn_jax.bench.script import run_script

if __name__ == "__main__":
    run_script(__doc__, get_args(RequestGrid), request_benchmark, Path(__file__).parent / "results")
