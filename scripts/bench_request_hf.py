"""Times Hugging Face transformers on the requests of the request benchmark, in a process of its own.

    python scripts/bench_request_hf.py --out FOLDER_OF_REQUEST_JSON

Prefill (one forward, logits of the last token) and greedy `generate`: sdpa, bfloat16, random weights. Writes hf.json,
which `scripts/bench_request.py --report` puts into its table. Needs torch and a GPU; JAX is not imported.

    python scripts/bench_request_hf.py --out FOLDER --pair NAME EXPORTED

adds a real pair, as `scripts/export_pair.py` writes it: alone, with the draft as `assistant_model`, and with prompt
lookup.
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

FILE = "hf.json"
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
def time_generate(model: Any, ids: torch.Tensor, new: int, **how: Any) -> float:
    """Seconds of a greedy continuation of so many tokens, after a short one to warm up; `how` is told to `generate`."""
    for tokens in (2, new):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0, **how,
        )  # fmt: skip
        torch.cuda.synchronize()
        passed = time.perf_counter() - began
    return passed


def measure_pair(name: str, folder: Path, new: int = 256) -> list[dict[str, Any]]:
    """Requests of a real pair at batch 1, one point for each way of drafting and prompt length."""
    torch.set_default_dtype(torch.float32)

    def load(role: str) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / role, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        return model.to("cuda").eval()

    target, draft = load("target"), load("draft")
    ways: dict[str, dict[str, Any]] = {
        "generate": {},
        "generate, assistant_model": {"assistant_model": draft},
        "generate, prompt lookup": {"prompt_lookup_num_tokens": 10},
    }
    points = []
    for prompt in json.loads((folder / "prompts.json").read_text(encoding="utf-8")):
        ids = torch.tensor([prompt], device="cuda")
        found: dict[str, Any] = {"prefill": time_prefill(target, ids), "prefill of the draft": time_prefill(draft, ids)}
        for what, how in ways.items():
            try:
                found[what] = time_generate(target, ids, new, **how)
            except Exception as failure:
                found[what] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:300]}"
            torch.cuda.empty_cache()
        for what, took in found.items():
            said = {"seconds": None, "failure": took} if isinstance(took, str) else {"seconds": took, "failure": None}
            points.append({"pair": name, "batch": 1, "prompt": len(prompt), "new": new, "what": what, **said})
            print(points[-1], flush=True)
    return points


def main() -> None:
    """Measures all cases; what fails says why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of request.json")
    parser.add_argument(
        "--pair", nargs=2, metavar=("NAME", "FOLDER"), help="only this real pair, besides what is there"
    )
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_request_hf: torch sees no GPU; run it on a machine that has one.")
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "points": [],
    }
    if options.pair is not None:
        found = measure_pair(options.pair[0], Path(options.pair[1]))
        if (options.out / FILE).exists():
            report = json.loads((options.out / FILE).read_text(encoding="utf-8"))
        report["points"] = [one for one in report["points"] if one["pair"] != options.pair[0]] + found
        (options.out / FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return
    points, cases = report["points"], TINY if options.tiny else CASES
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
        (options.out / FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
