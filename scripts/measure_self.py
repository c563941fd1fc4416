"""Measures mode `self` by what drafting reads, and by how often that is chosen anew.

    python scripts/measure_self.py --pair qwen2.5-coder --out scripts/results/NAME/self.json

The first table is of a real pair behind parts of a novel: what is accepted, and how fast. The second is of the shapes
of an 8B model with random weights: how long a window takes, whatever is accepted of it. A window gives what is accepted
and one token more, so that both together say where it pays.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when a device is asked for: the largest case fills a card.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")

import jax

from specattn_jax import generate, load_pair
from specattn_jax.bench.decode_cases import DecodeCase
from specattn_jax.bench.decode_methods import ImposedAcceptance
from specattn_jax.bench.decode_real import book_prompts
from specattn_jax.bench.decode_workload import Workload
from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.itself import SelfSpeculative
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.files import write_json
from specattn_jax.loading.pair import ModelPair
from specattn_jax.reporting.provenance import commit, hardware, versions
from specattn_jax.runtime.session import Memory
from specattn_jax.selection.own import OwnReads

# Share that is read, windows until it is chosen anew, and drafted tokens: the most telling first.
VARIANTS = (
    *((0.1, 1, 5), (0.05, 1, 5), (0.1, 2, 5), (0.05, 4, 5), (0.05, 4, 8)),
    *((0.1, 4, 5), (0.05, 2, 5), (0.03, 1, 5), (0.03, 4, 5), (0.02, 1, 5), (0.1, 1, 8)),
)
SHAPES = (DecodeCase("llama-3.1-8b", "llama-3.2-1b", 8, 32768), DecodeCase("llama-3.1-8b", "llama-3.2-1b", 1, 131072))
# Windows of a timed call: so many of every length divide by the windows between two choices, and fit the empty slots.
WINDOWS, TURNS = 24, 3


def variant(share: float, every: int, window: int) -> SelfSpeculative:
    """The strategy of a variant."""
    return SelfSpeculative(window=window, reads=OwnReads(share), every=every)


def named(share: float, every: int, window: int) -> dict[str, Any]:
    """What a variant is, for a table."""
    return {"share": share, "every": every, "window": window}


def on_text(pair: ModelPair, prompts: Sequence[Sequence[int]], new: int, most: int) -> list[dict[str, Any]]:
    """One row per variant: what is accepted behind real prompts, and the speed of the second run."""
    memory, rows = Memory(slots=len(prompts[0]) + new + 64), []
    for chosen in (None, *VARIANTS[:most]):
        strategy: Strategy = Autoregressive() if chosen is None else variant(*chosen)
        for _ in range(2):
            run = generate(pair, prompts, mode=strategy, max_new_tokens=new, stop_at_eos=False, memory=memory)
        found = {
            "accepted_per_window": statistics.mean(one.accepted_per_window for one in run.results),
            "windows": max(one.windows for one in run.results),
            "decode_seconds": run.timing.decode_s,
            "tokens_per_second": run.tokens_per_s,
        }
        rows.append((named(*chosen) if chosen is not None else {"window": 0}) | found)
        print(rows[-1], flush=True)
    return rows


def by_shape(case: DecodeCase, most: int) -> list[dict[str, Any]]:
    """One row per variant: how long its windows take."""
    workload, rows = Workload(case), []
    backend = "pallas_triton" if jax.default_backend() == "gpu" else None
    for chosen in (None, *VARIANTS[:most]):
        strategy: Strategy = Autoregressive()
        if chosen is not None:
            strategy = dataclasses.replace(variant(*chosen), judge=ImposedAcceptance((chosen[2] - 1, chosen[2] - 2)))
        taken = []
        for _ in range(1 + TURNS):
            state = jax.block_until_ready(workload.start(strategy, backend))
            began = time.perf_counter()
            state = jax.block_until_ready(workload.session.decode(strategy, state, WINDOWS))
            taken.append((time.perf_counter() - began) / WINDOWS)
            workload.give_back(state)
        found = {"case": case.title, "window_seconds": statistics.median(taken[1:]), "all": taken[1:]}
        rows.append((named(*chosen) if chosen is not None else {"window": 0}) | found)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures both, and writes after each table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="qwen2.5-coder")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, nargs="*", default=[30000], help="tokens of the prompts of a table each")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="so many of the shapes")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="so many of the variants, the first ones")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    report: dict[str, Any] = {"command": asked, "versions": versions(), "commit": commit(), "hardware": hardware()}
    report |= {"text": [], "shapes": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for tokens in options.prompts:
        # Not kept: the shapes want all of the memory.
        pair = dataclasses.replace(load_pair(options.pair, dtype=options.dtype), draft=None, alignment=None)
        rows = on_text(pair, book_prompts(pair, tokens, options.batch), options.new, options.variants)
        report["text"] += [{"prompt": tokens} | row for row in rows]
        write_json(options.out, report)
        del pair
    gc.collect()
    for case in SHAPES[: options.shapes]:
        report["shapes"] += by_shape(case, options.variants)
        write_json(options.out, report)
        gc.collect()


if __name__ == "__main__":
    main()
