"""Measures a draft on held-out books: acceptance through the real loop, agreement, and what sparse reading costs."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from specattn_jax.evaluation.forced import read_documents
from specattn_jax.loading.pair import ModelPair, load_pair
from specattn_jax.models.forward import likeliest_next
from specattn_jax.reporting.provenance import commit
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import choose_reading
from specattn_jax.texts import read_text, shipped_books

MASSES = (0.9, 0.95, 0.97)


def main() -> None:
    """Writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", default="default")
    parser.add_argument("--alignment", default="default")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    pair = load_pair("smollm2", options.draft, alignment=options.alignment, dtype=options.dtype)
    if pair.alignment is None:
        raise SystemExit("alignment: this draft has none; name one with --alignment.")
    tokens = [token for book in shipped_books("valid") for token in pair.tokenizer.encode(read_text(book))]
    starts = np.linspace(0, len(tokens) - options.prompt_tokens - 1, options.prompts).astype(int)
    prompts = [tokens[start : start + options.prompt_tokens] for start in starts]
    run = generate(pair, prompts, mode="speculative", window=5, max_new_tokens=options.new_tokens, stop_at_eos=False)
    windows = sum(result.windows for result in run.results)
    accepted = sum(result.accepted_per_window * result.windows for result in run.results) / windows

    starts = np.linspace(0, len(tokens) - options.context - 1, options.documents).astype(int)
    documents = [tokens[start : start + options.context] for start in starts]
    agrees = [_own_text_agreement(pair, document) for document in documents]
    dense = read_documents(pair.target, pair.need_draft(), None, documents)
    rows = []
    for policy in ("default", "paper"):
        for mass in MASSES:
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
    result = {
        "draft": options.draft,
        "dtype": options.dtype,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "commit": commit(),
        "acceptance": {
            "accepted_per_window": accepted,
            "window": 5,
            "prompts": options.prompts,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": sum(len(result.tokens) for result in run.results),
        },
        "top1_agreement_on_text": float(np.mean(agrees)),
        "perplexity": dense.perplexity,
        "selection": rows,
        "calibration": json.loads(pair.alignment.provenance),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _own_text_agreement(pair: ModelPair, document: list[int]) -> float:
    """How often draft and target name the same likeliest next token on the book's own text."""
    tokens = jnp.asarray([document], jnp.int32)
    return float(jnp.mean(likeliest_next(pair.target, tokens) == likeliest_next(pair.need_draft(), tokens)))


if __name__ == "__main__":
    main()
