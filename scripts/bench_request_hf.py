"""Times Hugging Face transformers on the requests of the request benchmark, in a process of its own.

    python scripts/bench_request_hf.py --out FOLDER_OF_REQUEST_JSON

Prefill (one forward, logits of the last token) and greedy `generate`: sdpa, bfloat16, random weights. Writes hf.json,
which `scripts/bench_request.py --report` puts into its table. Needs torch and a GPU; JAX is not imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_decode_hf import make_model

# Target, sequences, tokens of each prompt, new tokens (0 is prefill alone); the most telling first.
CASES = (
    ("llama-3.1-8b", 1, 32768, 256), ("llama-3.1-8b", 8, 8192, 0), ("llama-3.1-8b", 1, 2048, 64),
    ("llama-3.1-8b", 1, 8192, 0), ("llama-3.1-8b", 1, 131072, 0), ("llama-3.1-8b", 8, 32768, 256),
)  # fmt: skip
TINY = (("smollm2-draft", 1, 256, 8),)


@torch.inference_mode()
def time_prefill(model: Any, ids: torch.Tensor) -> float:
    """Median seconds of one forward over the prompts, into a new cache."""
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


@torch.inference_mode()
def time_generate(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds of a greedy continuation of so many tokens, after a short one to warm up."""
    for tokens in (2, new):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        passed = time.perf_counter() - began
    return passed


def main() -> None:
    """Measures all cases; what fails says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of request.json")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_request_hf: torch sees no GPU; run it on a machine that has one.")
    options.out.mkdir(parents=True, exist_ok=True)
    points, cases = [], TINY if options.tiny else CASES
    model = make_model(cases[0][0], "cuda")
    for name, batch, prompt, new in cases:
        ids = torch.randint(model.config.vocab_size, (batch, prompt), device="cuda")
        for what in ("prefill", *(("generate",) if new else ())):
            point: dict[str, Any] = {"pair": name, "batch": batch, "prompt": prompt, "new": new, "what": what}
            try:
                took = time_prefill(model, ids) if what == "prefill" else time_generate(model, ids, new)
                point |= {"seconds": took, "failure": None}
            except Exception as failure:  # such as too little memory, which the other cases may not need
                point["failure"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:300]}"
            print(point, flush=True)
            points.append(point)
            gc.collect()
            torch.cuda.empty_cache()
        report = {
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "points": points,
        }
        (options.out / "hf.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
