"""Runs every compiled GPU kernel on small, ragged shapes under `compute-sanitizer --tool memcheck`.

    python scripts/check_memory.py --out scripts/results/kernels-DEVICE/memcheck.json

Slots beyond the lengths hold NaN, and ids beyond the counts are far outside the cache. Ends with an error if the
sanitizer saw one.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import specattn_kernels as kernels

from specattn_jax.files import atomic_file, write_json
from specattn_jax.provenance import commit, hardware, versions

# XLA's search for the best library calls makes many; the sanitizer would watch them all.
ENVIRONMENT = {"XLA_FLAGS": "--xla_gpu_autotune_level=0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def compiled(op: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """An op of the Triton backend, jitted with its options."""
    return jax.jit(functools.partial(op, implementation="pallas_triton", **options))


def attention_cases(head_dim: int, slots: int, dtype: str) -> Iterator[tuple[str, Any]]:
    """Attention, dense and sparse, and scores of two sequences of which one is short."""
    rng = np.random.default_rng(head_dim)
    lengths = np.array([slots, slots // 2], np.int32)
    q = jnp.asarray(rng.normal(size=(2, 3, 8, head_dim)).astype(np.float32), dtype)
    cache = rng.normal(size=(2, 2, slots, head_dim)).astype(np.float32)
    cache[1, :, lengths[1] :] = np.nan
    keys, n = jnp.asarray(cache, dtype), jnp.asarray(lengths)
    what = f"H{head_dim} S{slots} {dtype}"

    dense = compiled(kernels.decode_attention, return_scores="newest", return_lse=True)
    yield f"decode_attention {what}", dense(q, keys, keys, n)
    score = compiled(kernels.score_cache, dtype=jnp.dtype(dtype))
    yield f"score_cache {what}", score(q, keys, jnp.ones(q.shape[:3]), n)
    sparse = compiled(kernels.sparse_decode_attention)
    for block_size in (1, 16):
        blocks = -(-slots // block_size)
        # The plan is of two layers, of which the second is attended with.
        ids = np.argsort(rng.random((2, 2, 2, blocks)), axis=-1).astype(np.int32)[..., : blocks // 3]
        counts = rng.integers(0, blocks // 3 + 1, (2, 2, 2)).astype(np.int32)
        ids[np.arange(blocks // 3) >= counts[..., None]] = np.iinfo(np.int32).max
        plan = kernels.SelectionPlan(jnp.asarray(ids), jnp.asarray(counts), block_size).at_layer(1)
        yield f"sparse_decode_attention {what} block {block_size}", sparse(q, keys, keys, plan, n)


def selection_cases(slots: int, dtype: str) -> Iterator[tuple[str, Any]]:
    """Selection from rows of which some are short, and compaction."""
    rng = np.random.default_rng(slots)
    scores = jnp.asarray(rng.random((2, 3, slots)).astype(np.float32) ** 8, dtype)
    n = jnp.asarray([slots, slots - 77], jnp.int32)
    for measure, p, capacity in (("mass", 0.9, None), ("count", 0.15, slots // 5)):
        select = compiled(kernels.select_blocks, num_sink=4, num_recent=16, measure=measure, capacity=capacity)
        yield f"select_blocks S{slots} {dtype} {measure}", select(scores, p, n)
    mask = jnp.asarray(rng.random((2, 3, slots)) < 0.2)
    yield f"compact_blocks S{slots}", compiled(kernels.compact_blocks, block_size=1)(mask)


def run_cases() -> None:
    """Runs all cases; each that has come to its end prints its name."""
    for head_dim, slots, dtype in ((64, 333, "bfloat16"), (128, 700, "bfloat16"), (96, 130, "float32")):
        for name, result in attention_cases(head_dim, slots, dtype):
            jax.block_until_ready(result)
            print("done:", name, flush=True)
    for slots, dtype in ((513, "bfloat16"), (40_000, "bfloat16"), (40_000, "float32")):
        for name, result in selection_cases(slots, dtype):
            jax.block_until_ready(result)
            print("done:", name, flush=True)


def main() -> None:
    """Starts the sanitizer over this file, and keeps what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the result")
    parser.add_argument("--run", action="store_true", help="only run the cases, without the sanitizer")
    options = parser.parse_args()
    if options.run:
        run_cases()
        return
    command = ["compute-sanitizer", "--tool", "memcheck", sys.executable, __file__, "--run"]
    ran = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    done = re.findall(r"^done: (.*)$", ran.stdout, re.MULTILINE)
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", ran.stdout)
    print("\n".join([*done, *summary[-1:]]))
    if ran.returncode or summary[-1:] != ["0"]:
        raise SystemExit(f"memcheck: exit code {ran.returncode}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}")
    if options.out is not None:
        report = {"command": "python scripts/check_memory.py", "errors": 0, "cases": done}
        with atomic_file(options.out) as work:
            write_json(work, report | {"commit": commit(), "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
