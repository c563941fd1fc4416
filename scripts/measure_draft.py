"""Measures a draft on held-out texts: acceptance through the real loop, agreement, and what sparse reading costs."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specattn_jax.evaluation.documents import cut_documents
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.loading.pair import ModelPair, load_pair
from specattn_jax.models.forward import likeliest_next
from specattn_jax.reporting.provenance import commit
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import choose_reading
from specattn_jax.texts import UNNAMED, find_kinds, read_text, shipped_books

MASSES = (0.9, 0.95, 0.97)
# Timed with all prompts at once.
MODES = ("autoregressive", "speculative", "specattn")


def main() -> None:
    """Writes one JSON object; what was measured of a kind is written before the next one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--alignment", default="default")
    parser.add_argument("--texts", nargs="+", default=[], help="as --text of the command; the shipped books without")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--masses", type=float, nargs="*", default=MASSES, help="of the selections; none without any")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    pair = load_pair(options.target, options.draft, alignment=options.alignment, dtype=options.dtype)
    if pair.alignment is None:
        raise SystemExit("alignment: this draft has none; name one with --alignment.")
    result = {
        "target": options.target,
        "draft": options.draft,
        "dtype": options.dtype,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "commit": commit(),
        "calibration": json.loads(pair.alignment.provenance),
    }
    kinds: dict[str, dict[str, object]] = {}
    for kind, paths in (find_kinds(options.texts) or {UNNAMED: shipped_books("valid")}).items():
        texts = [pair.tokenizer.encode(read_text(path), add_special=False) for path in paths]
        kinds[kind] = measure(pair, texts, options)
        # Of texts without kinds the numbers stand beside the rest.
        found = {**result, **kinds[kind]} if kind == UNNAMED else {**result, "kinds": kinds}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(json.dumps({kind: kinds[kind]}), flush=True)


def measure(pair: ModelPair, texts: list[list[int]], options: argparse.Namespace) -> dict[str, object]:
    """Acceptance, speed and agreement on texts of one kind, and what sparse reading costs there."""
    prompts = _cut(texts, options.prompt_tokens, options.prompts)
    how: dict[str, Any] = {"window": 5, "max_new_tokens": options.new_tokens, "stop_at_eos": False}
    # The first run of each compiles, which the clock keeps apart, and warms up.
    runs = {mode: [generate(pair, prompts, mode=mode, **how) for _ in range(2)] for mode in MODES}
    speed = {mode: max(run.tokens_per_s for run in both) for mode, both in runs.items()}
    run = runs["speculative"][0]
    windows = sum(result.windows for result in run.results)
    accepted = sum(result.accepted_per_window * result.windows for result in run.results) / windows
    new_tokens = sum(len(result.tokens) for result in run.results)

    documents = _cut(texts, options.context, options.documents)
    agrees = [_own_text_agreement(pair, document) for document in documents]
    dense = read_documents(pair.target, pair.need_draft(), None, documents)
    rows = []
    for policy in ("default", "paper"):
        for mass in options.masses:
            selection = choose_reading(pair, policy=policy, p=mass)
            sparse = read_documents(pair.target, pair.need_draft(), selection, documents, reference=dense.hidden)
            rows.append(
                {
                    "policy": policy,
                    "p": mass,
                    "kv_reduction": sparse.kv_reduction,
                    "perplexity": sparse.perplexity,
                    "relative_increase": sparse.perplexity / dense.perplexity - 1,
                    "kl": float(np.mean(sparse.kl)) if sparse.kl is not None else None,
                    "tokens": sparse.tokens * len(documents),
                }
            )
    return {
        "acceptance": {
            "accepted_per_window": accepted,
            "window": 5,
            "prompts": len(prompts),
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": new_tokens,
        },
        "tokens_per_s": speed,
        "top1_agreement_on_text": float(np.mean(agrees)),
        "perplexity": dense.perplexity,
        "selection": rows,
    }


def _cut(texts: list[list[int]], length: int, count: int) -> list[list[int]]:
    """Documents of a length, spread over the texts; fewer where the texts hold fewer."""
    return cut_documents(texts, length, min(count, max(1, sum(len(text) // length for text in texts))))


def _own_text_agreement(pair: ModelPair, document: list[int]) -> float:
    """How often draft and target name the same likeliest next token on the book's own text."""
    tokens = jnp.asarray([document], jnp.int32)
    return float(jnp.mean(likeliest_next(pair.target, tokens) == likeliest_next(pair.need_draft(), tokens)))


if __name__ == "__main__":
    main()
