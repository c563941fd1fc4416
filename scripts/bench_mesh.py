"""Times whole windows of decoding on one device and on meshes of two: 8B and 1B shapes with random weights.

    python scripts/bench_mesh.py --minutes 8
    python scripts/bench_mesh.py --cases "B8 S32768" --only specattn

writes scripts/results/mesh-DEVICE/: mesh.json, and mesh.md with what two devices gain over one of the same run. The
batch of 8 x 32k is on one device, split by heads, and split by sequences; one sequence of 128k on one device, and split
by heads. Needs two devices of 80 GB; the same command again goes on where the time ran out.
"""

from __future__ import annotations

import os
from pathlib import Path

# The largest case fills an 80 GB card; JAX would take three quarters of it. Read when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

from specattn_jax.bench.decode import mesh_benchmark
from specattn_jax.bench.script import run_script

MESHES = ("heads=2", "data=2")

if __name__ == "__main__":
    run_script(__doc__, ("two",), lambda _: mesh_benchmark(MESHES), Path(__file__).parent / "results")
