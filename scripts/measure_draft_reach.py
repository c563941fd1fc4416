"""Measures what a draft loses that sees only the last tokens, and the first ones, while it reads the prompt.

    python scripts/measure_draft_reach.py --pair smollm2 --tokens 2048 --reach 128 256 512 --out FILE.json

Acceptance is that of greedy dense verification, over the same text whatever the draft proposes. KL (full || sparse, in
nats) is of the windows after the prompt, with what the policy `default` selects when it saves 75 and 90 % of the reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from specattn_jax.evaluation.forced import read_documents
from specattn_jax.files import write_json
from specattn_jax.loading.pair import ModelPair, load_pair
from specattn_jax.models.cache import Reach
from specattn_jax.reporting.provenance import commit, versions
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import choose_reading
from specattn_jax.texts import find_text, read_text

SAVINGS = (0.75, 0.9)


def measure(pair: ModelPair, documents: list[list[int]], prompt: int, reach: int | None) -> dict[str, Any]:
    """Acceptance and KL with a draft that sees so far while it prefills."""
    run = generate(
        pair,
        [document[:prompt] for document in documents],
        mode="speculative",
        window=5,
        max_new_tokens=len(documents[0]) - prompt,
        stop_at_eos=False,
        draft_reach=reach,
    )
    windows = sum(result.windows for result in run.results)
    row: dict[str, Any] = {
        "draft_reach": reach,
        "accepted_per_window": sum(one.accepted_per_window * one.windows for one in run.results) / windows,
        "prefill_seconds": run.timing.prefill_s,
    }
    share = prompt / len(documents[0])
    for saving in SAVINGS if pair.alignment is not None else ():
        selection = choose_reading(pair, kv_reduction=saving)
        found = []
        # One by one: the hidden states of all are not needed at once.
        for document in documents:
            dense = read_documents(pair.target, pair.draft, None, [document], prefill_share=share)
            found.append(
                read_documents(
                    pair.target,
                    pair.draft,
                    selection,
                    [document],
                    reference=dense.hidden,
                    prefill_share=share,
                    draft_reach=None if reach is None else Reach(reach),
                )
            )
        row[f"at {saving:.0%}"] = {
            "kv_reduction": float(np.mean([one.kv_reduction for one in found])),
            "kl": float(np.mean([one.kl for one in found])),
        }
    return row


def main() -> None:
    """Writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--texts", nargs="+", default=["pride_and_prejudice"])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a document, prompt and continuation")
    parser.add_argument("--new", type=int, default=256, help="tokens of a document that come after the prompt")
    parser.add_argument("--reach", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pair = load_pair(options.pair, options.draft, dtype=options.dtype)
    documents: list[list[int]] = []
    for name in options.texts:
        tokens = pair.tokenizer.encode(read_text(find_text(name)))
        starts = np.linspace(0, len(tokens) - options.tokens - 1, options.documents).astype(int)
        documents += [tokens[start : start + options.tokens] for start in starts]
    rows = []
    for reach in [None, *options.reach]:
        rows.append(measure(pair, documents, options.tokens - options.new, reach))
        print(rows[-1], flush=True)
        report = {
            "pair": f"{pair.target_name} and {pair.draft_name}",
            "texts": options.texts,
            "documents": len(documents),
            "tokens": options.tokens,
            "new": options.new,
            "device": jax.devices()[0].device_kind,
            "commit": commit(),
            "versions": versions(),
            "rows": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, report)


if __name__ == "__main__":
    main()
