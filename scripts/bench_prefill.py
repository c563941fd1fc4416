"""Times prefill attention: every backend on this device, and what competes with it, as JSON and as a table.

    python scripts/bench_prefill.py --minutes 4 --out scripts/results/prefill-nvidia-h100/prefill.json

Rates are those of causal arithmetic: what a mask hides is not counted. A bfloat16 matrix product of the same run says
what the device can do. PyTorch's attention takes part where PyTorch is there, in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from specattn_kernels import Implementation, decode_attention, prefill_attention

# Calls of one timing, each with queries of its own, take about so many floating-point operations.
TIMED_OPERATIONS = 2e12
TIMINGS = 5


class Case(NamedTuple):
    """T new tokens of each of B sequences after `start` others."""

    batch: int
    tokens: int
    start: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def slots(self) -> int:
        """Of the cache, which has some room left."""
        return self.start + self.tokens + (0 if self.start else 128)

    @property
    def operations(self) -> float:
        """Floating-point operations of the products, without what the mask hides."""
        seen = self.tokens * self.start + self.tokens * (self.tokens + 1) / 2
        return 4 * self.batch * self.heads * self.head_dim * seen


# Attention of Llama-3.1-8B, Llama-3.2-1B and Qwen2.5-1.5B.
CASES = [
    *(Case(1, tokens) for tokens in (2048, 8192, 32768, 131072)),
    Case(8, 8192),
    Case(1, 2048, 30720),
    Case(1, 4096, 30720),
    Case(8, 2048, 14336),
    *(Case(1, tokens, head_dim=64) for tokens in (2048, 8192, 32768)),
    *(Case(1, tokens, heads=12, kv_heads=2) for tokens in (2048, 8192, 32768)),
    Case(1, 2048, dtype="float32"),
]
TINY = [Case(2, 128, 64, heads=4, kv_heads=2, head_dim=64, dtype="float16")]

Contender = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def make(case: Case, count: int) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Queries for every call, and keys, values and starts; slots that are not in use hold NaN."""
    keys = jax.random.split(jax.random.key(case.tokens), count + 2)
    normal = functools.partial(jax.random.normal, dtype=case.dtype)
    queries = [normal(key, (case.batch, case.tokens, case.heads, case.head_dim)) for key in keys[2:]]
    shape = (case.batch, case.kv_heads, case.slots, case.head_dim)
    in_use = (jnp.arange(case.slots) < case.start + case.tokens)[:, None]
    k, v = (jnp.where(in_use, normal(key, shape), jnp.nan) for key in keys[:2])
    return queries, (k, v, jnp.full((case.batch,), case.start, jnp.int32))


def error_of(case: Case, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array) -> float:
    """Relative error of some tokens of one head against float64."""
    tokens = np.unique(np.linspace(0, case.tokens - 1, 64).astype(int))
    head, row = case.heads - 1, case.batch - 1
    rows, keys, values, got = (
        np.asarray(x, np.float64) for x in (q[row, tokens, head], k[row, -1], v[row, -1], out[row, tokens, head])
    )
    want = np.zeros_like(rows)
    for number, token in enumerate(tokens):
        end = case.start + token + 1
        logits = keys[:end] @ rows[number] / math.sqrt(case.head_dim)
        weights = np.exp(logits - logits.max())
        want[number] = weights / weights.sum() @ values[:end]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def attend(name: Implementation, q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array) -> jax.Array:
    """The op by one backend."""
    return prefill_attention(q, k, v, starts, implementation=name).out


def contenders(case: Case) -> Iterator[tuple[str, Contender]]:
    """What can be called at a point."""
    gpu: tuple[Implementation, ...] = ("pallas_triton", "pallas_mosaic_gpu")
    names: tuple[Implementation, ...] = gpu if jax.default_backend() != "tpu" else ("pallas_tpu",)
    for name in names:
        yield name, functools.partial(attend, name)
    if case.operations < 2e11:
        yield "xla", functools.partial(attend, "xla")
    if not case.start and case.dtype != "float32" and jax.default_backend() == "gpu":
        yield (
            "cudnn, whole prompt",
            lambda q, k, v, _: jax.nn.dot_product_attention(
                q, *(x[:, :, : q.shape[1]].swapaxes(1, 2) for x in (k, v)), is_causal=True, implementation="cudnn"
            ),
        )
    if case.operations < 6e11 and case.dtype != "float32" and not case.start:
        yield (
            "decode_attention, xla",
            lambda q, k, v, starts: decode_attention(q, k, v, starts + q.shape[1], implementation="xla").out,
        )


def measure(case: Case, call: Contender) -> dict[str, Any]:
    """Seconds of one call and error of the first."""
    count = int(np.clip(TIMED_OPERATIONS // case.operations, 1, 8)) if jax.default_backend() != "cpu" else 1
    queries, rest = make(case, count)
    # Not a loop: nothing copies the queries.
    timed = jax.jit(lambda queries, *rest: [call(q, *rest) for q in queries])
    out = jax.block_until_ready(timed(queries, *rest))
    seconds = []
    error = error_of(case, queries[0], rest[0], rest[1], out[0])
    del out
    for _ in range(TIMINGS):
        began = time.perf_counter()
        jax.block_until_ready(timed(queries, *rest))
        seconds.append((time.perf_counter() - began) / count)
    return {"seconds": statistics.median(seconds), "error": error}


def matmul_rate() -> float:
    """TFLOP/s of a large bfloat16 matrix product."""
    size = 8192 if jax.default_backend() != "cpu" else 256
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: [a @ b for b in [b] * 4])
    jax.block_until_ready(product(a, b))
    rates = []
    for i in range(TIMINGS):
        b = jax.block_until_ready(b + i)
        began = time.perf_counter()
        jax.block_until_ready(product(a, b))
        rates.append(2 * size**3 / (time.perf_counter() - began) / 1e12)
    return statistics.median(rates)


TORCH = """
import json, sys, time, statistics, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
for case in json.loads(sys.argv[1]):
    batch, tokens, start, heads, kv_heads, head_dim, dtype = case
    if start or dtype != "bfloat16":
        continue
    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    make = lambda n: torch.randn(batch, tokens, n, head_dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    q, k, v = make(heads), make(kv_heads), make(kv_heads)
    for name, kind in kinds.items():
        def run():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        try:
            with sdpa_kernel(kind):
                run(); torch.cuda.synchronize()
                seconds = []
                for _ in range(5):
                    began = time.perf_counter()
                    for _ in range(4): run()
                    torch.cuda.synchronize()
                    seconds.append((time.perf_counter() - began) / 4)
            print(json.dumps({"case": case, "name": "torch sdpa, " + name, "seconds": statistics.median(seconds)}))
        except Exception as error:
            print(json.dumps({"case": case, "name": "torch sdpa, " + name, "failed": str(error)[:200]}))
"""


def torch_rows(cases: list[Case]) -> list[dict[str, Any]]:
    """PyTorch's attention over whole prompts."""
    done = subprocess.run([sys.executable, "-c", TORCH, json.dumps(cases)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-500:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    case = Case(*row["case"])
    what = f"B{case.batch} T{case.tokens} after {case.start} N{case.heads} K{case.kv_heads} H{case.head_dim}"
    if "failed" in row:
        print(f"{what:42} {row['name']:32} {row['failed'][:160]}", flush=True)
        return
    rate = case.operations / row["seconds"] / 1e12
    print(
        f"{what:42} {case.dtype[:5]:6}{row['name']:32}{row['seconds'] * 1e3:10.3f} ms {rate:7.1f} TFLOP/s  "
        f"error {row.get('error', math.nan):.1e}",
        flush=True,
    )


def main() -> None:
    """Runs the cases and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--tiny", action="store_true", help="one small case, to see that everything runs")
    options = parser.parse_args()
    began, cases = time.monotonic(), TINY if options.tiny else CASES
    device = jax.devices()[0]
    rows = torch_rows(cases) if device.platform == "gpu" else []
    for known in rows:
        show(known)
    rate = matmul_rate()
    print(f"{device.device_kind}: matrix product {rate:.0f} TFLOP/s", flush=True)
    for case in cases:
        for name, call in contenders(case):
            if time.monotonic() - began > 60 * options.minutes:
                break
            row: dict[str, Any] = {"case": list(case), "name": name}
            try:
                row |= measure(case, call)
            except Exception as error:  # A contender that cannot is a result, too.
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            show(row)
            rows.append(row)
    if options.out is not None:
        head = {"device": device.device_kind, "jax": jax.__version__, "commit": options.commit, "matmul_tflops": rate}
        options.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
