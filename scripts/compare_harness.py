"""Compares answers of full attention with those of the harness' own transformers backend: same samples, both greedy.

    python scripts/export_pair.py qwen2.5-coder --tokens 64 --dtype float32 --out EXPORTED
    python scripts/compare_harness.py qwen2.5-coder EXPORTED --out scripts/results/NAME

Writes one file per task of RULER's that needs no internet: both scores, the share of equal answers, and those that
differ. Tasks that lie in the folder already are left out: the same command goes on where it stopped, and several
processes with tasks of their own may write into one folder. Needs torch, and a GPU that holds the target twice.

Both compute as exactly as they can: in float32 without TF32, and transformers reads one prompt at a time, because it
fills up the shorter ones of a batch on the left, which changes their sums.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import torch
from lm_eval.models.huggingface import HFLM

from specattn_jax.evaluation.methods import FULL, Case
from specattn_jax.evaluation.tasks.harness import SpecAttnLM
from specattn_jax.evaluation.tasks.ruler import Scored, load_task, run_task
from specattn_jax.evaluation.tasks.run import RULER
from specattn_jax.files import atomic_file
from specattn_jax.loading.pair import NO_DRAFT, ModelPair, load_pair
from specattn_jax.reporting.provenance import commit, hardware, versions


def row(task: str, ours: Scored, theirs: Scored, backend: HFLM) -> dict[str, Any]:
    """What two answers to the same questions have in common."""
    if ours.prompts != theirs.prompts:
        raise SystemExit(f"{task}: the harness asked the two backends different questions.")
    pairs = list(zip(ours.texts, theirs.texts, strict=True))
    differing = [
        {"sample": index, "ours": a, "transformers": b, **fork(backend, ours.prompts[index], a, b)}
        for index, (a, b) in enumerate(pairs)
        if a.strip() != b.strip()
    ]
    return {
        "task": task,
        "samples": len(pairs),
        "score": sum(ours.scores) / len(pairs),
        "transformers_score": sum(theirs.scores) / len(pairs),
        "equal_scores": sum(a == b for a, b in zip(ours.scores, theirs.scores, strict=True)) / len(pairs),
        "equal_answers": 1.0 - len(differing) / len(pairs),
        "differing": differing,
    }


def fork(backend: HFLM, prompt: str, ours: str, theirs: str) -> dict[str, Any]:
    """Where two answers part, and by how much transformers prefers its own token there, in nats."""
    before, *answers = (backend.tok_encode(text) for text in (prompt, prompt + ours, prompt + theirs))
    end = backend.eot_token_id
    a, b = ([*answer[len(before) :], end] for answer in answers)
    at = next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None or answers[0][: len(before)] != before:
        return {}
    tokens = torch.tensor([before + a[:at]], device=backend.device)
    with torch.no_grad():
        logits = backend.model(tokens, logits_to_keep=1).logits[0, -1].float()
    return {"equal_tokens": at, "preferred_by": float(logits[b[at]] - logits[a[at]])}


def load_both(options: argparse.Namespace) -> tuple[ModelPair, SpecAttnLM, HFLM]:
    """The two backends. What was exported says which tokens end an answer, so both end them there."""
    if options.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    pair = load_pair(options.pair, NO_DRAFT, alignment=None, dtype=options.dtype)
    ours = SpecAttnLM(pair, Case(FULL), batch_size=options.batch)
    theirs = HFLM(
        str(options.exported / "target"), dtype=options.dtype, batch_size=options.transformers_batch,
        device=options.device, max_length=pair.target.config.max_context,
    )  # fmt: skip
    return pair, ours, theirs


def main() -> None:
    """Asks both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair")
    parser.add_argument("exported", type=Path, help="of scripts/export_pair.py, in the same dtype")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--batch", type=int, default=10, help="our prompts at a time")
    parser.add_argument("--transformers-batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda", help="of transformers")
    parser.add_argument("--memory", type=float, default=0.4, help="share of the device's memory that JAX may take")
    parser.add_argument("--tasks", nargs="+", default=list(RULER))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    # Read when the first device is asked for.
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(options.memory)
    names = [name for name in options.tasks if not (options.out / f"{name}.json").exists()]
    if not names:
        return
    began = time.monotonic()
    pair, ours, theirs = load_both(options)
    asked = {name: value for name, value in vars(options).items() if name not in ("exported", "out", "tasks")}
    for name in names:
        task = load_task(name, options.length, pair.tokenizer, options.samples)
        found = []
        for backend in (ours, theirs):
            found.append(run_task(backend, name, task, options.length, options.samples))
            if options.device.startswith("cuda"):
                # What one of them does not need any more is the other's.
                torch.cuda.empty_cache()
            print(f"{time.monotonic() - began:.0f} s, {name}: {type(backend).__name__} answered", flush=True)
        result = row(name, found[0], found[1], theirs)
        print({key: value for key, value in result.items() if key != "differing"}, flush=True)
        report = {"command": asked, "versions": versions(), "commit": commit(), "hardware": hardware(), **result}
        with atomic_file(options.out / f"{name}.json") as work:
            work.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
