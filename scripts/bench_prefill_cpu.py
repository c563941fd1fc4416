"""Times the prefill of the embedded target on a CPU, beside Hugging Face transformers with the same weights.

    python scripts/bench_prefill_cpu.py --out scripts/results/prefill-two-cores/prefill.json

Both are measured in turns in one process, float32, logits of the last token only. A third row allocates four times the
slots that the prompt uses: these must not cost anything. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch
import transformers

from specattn_jax import load_pair
from specattn_jax.decoding.protocol import Models
from specattn_jax.files import write_json
from specattn_jax.loading import save_hf
from specattn_jax.reporting.provenance import commit, versions
from specattn_jax.runtime.session import Session
from specattn_jax.texts import find_text, read_text

BOOK = "pride_and_prejudice"


def calls(pair: Any, folder: Path, prompt: list[int]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    session = Session(Models(pair.target))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.tensor([prompt])

    def ours(new_tokens: int) -> Any:
        return jax.block_until_ready(session.prefill([prompt], new_tokens).last)

    def theirs() -> Any:
        with torch.inference_mode():
            return model(ids, use_cache=True, logits_to_keep=1).logits

    return {
        "ours": lambda: ours(64),
        "transformers": theirs,
        "ours, four times the slots": lambda: ours(3 * len(prompt)),
    }


def measure(pair: Any, folder: Path, prompt: list[int], turns: int) -> dict[str, Any]:
    """Medians in seconds, and ratios turn by turn, of all calls."""
    known = calls(pair, folder, prompt)
    first = {name: call() for name, call in known.items()}
    assert int(first["ours"][0, 1]) == int(first["transformers"][0, -1].argmax()), "the two choose different tokens"
    seconds: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(turns):
        for name, call in known.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "tokens": len(prompt),
        "seconds": seconds,
        "over_transformers": medians["ours"] / medians["transformers"],
        "four_times_the_slots": medians["ours, four times the slots"] / medians["ours"],
    }


def main() -> None:
    """Measures all lengths and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pair = load_pair("smollm2", "self", alignment=None, dtype="float32")
    text = pair.tokenizer.encode(read_text(find_text(BOOK)))
    with tempfile.TemporaryDirectory() as folder:
        save_hf(pair.target, pair.tokenizer, Path(folder) / "target")
        points = [measure(pair, Path(folder) / "target", text[:tokens], options.turns) for tokens in options.tokens]
    for point in points:
        print(
            f"{point['tokens']:,} tokens: {point['over_transformers']:.2f} of transformers' time; with four times the "
            f"slots {point['four_times_the_slots']:.2f} of its own"
        )
    report = {
        "device": f"{len(os.sched_getaffinity(0))} CPU cores",
        "commit": commit(),
        "versions": {**versions(), "torch": torch.__version__, "transformers": transformers.__version__},
        "points": points,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, report)


if __name__ == "__main__":
    main()
