"""Compares answers of full attention with those of the harness' own transformers backend: same samples, both greedy.

    python scripts/export_pair.py qwen2.5-coder --tokens 64 --out EXPORTED
    python scripts/compare_harness.py qwen2.5-coder EXPORTED --out scripts/results/NAME/harness.json

Writes one row per task of RULER's that needs no internet: both scores, the share of equal answers, and those that
differ. Needs torch, and a GPU that holds the target twice.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

# JAX would take most of the device for itself. Read when the first device is asked for.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

from lm_eval.models.huggingface import HFLM

from specattn_jax.evaluation.methods import FULL, Case
from specattn_jax.evaluation.tasks.harness import SpecAttnLM
from specattn_jax.evaluation.tasks.ruler import Scored, load_task, run_task
from specattn_jax.evaluation.tasks.run import RULER
from specattn_jax.files import atomic_file
from specattn_jax.loading.pair import load_pair
from specattn_jax.reporting.provenance import commit, hardware, versions


def row(task: str, ours: Scored, theirs: Scored) -> dict[str, Any]:
    """What two answers to the same questions have in common."""
    if ours.prompts != theirs.prompts:
        raise SystemExit(f"{task}: the harness asked the two backends different questions.")
    pairs = list(zip(ours.texts, theirs.texts, strict=True))
    return {
        "task": task,
        "samples": len(pairs),
        "score": sum(ours.scores) / len(pairs),
        "transformers_score": sum(theirs.scores) / len(pairs),
        "equal_scores": sum(a == b for a, b in zip(ours.scores, theirs.scores, strict=True)) / len(pairs),
        "equal_answers": sum(a.strip() == b.strip() for a, b in pairs) / len(pairs),
        "differing": [{"ours": a, "transformers": b} for a, b in pairs if a.strip() != b.strip()],
    }


def main() -> None:
    """Asks both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair")
    parser.add_argument("exported", type=Path, help="of scripts/export_pair.py")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda", help="of transformers")
    parser.add_argument("--tasks", nargs="+", default=list(RULER))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pair = load_pair(options.pair, alignment=None, dtype=options.dtype)
    ours = SpecAttnLM(pair, Case(FULL), batch_size=options.batch)
    theirs = HFLM(
        str(options.exported / "target"), dtype=options.dtype, batch_size=options.batch, device=options.device,
        max_length=pair.target.config.max_context,
    )  # fmt: skip
    rows = []
    for name in options.tasks:
        task = load_task(name, options.length, pair.tokenizer, options.samples)
        found = [run_task(model, name, task, options.length, options.samples) for model in (ours, theirs)]
        rows.append(row(name, *found))
        print({key: value for key, value in rows[-1].items() if key != "differing"}, flush=True)
        asked = {name: value for name, value in vars(options).items() if name not in ("exported", "out")}
        report = {"command": asked, "versions": versions(), "commit": commit(), "hardware": hardware(), "rows": rows}
        with atomic_file(options.out) as work:
            work.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
