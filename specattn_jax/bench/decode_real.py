"""The decode benchmark's real pair: a long prompt of a book, true acceptance, and the text that came out."""

from __future__ import annotations

import functools
from typing import Any

from specattn_jax.bench.decode_cases import REAL_METHODS, TINY, DecodeCase
from specattn_jax.gating import Plan
from specattn_jax.generation import generate
from specattn_jax.pair import ModelPair, load_pair
from specattn_jax.texts import read_text, shipped_books


@functools.lru_cache(maxsize=1)
def _pair(name: str) -> ModelPair:
    if name == TINY:
        from specattn_jax.examples import tiny_pair

        return tiny_pair()
    return load_pair(name)


def measure_real(case: DecodeCase, method: str) -> dict[str, Any]:
    """Continues the first tokens of a shipped book that neither draft nor calibration has seen.

    The second of two runs counts: in the first, programs are compiled.

    Raises:
        UserError: the weights cannot be fetched.
    """
    pair = _pair(case.target)
    book = shipped_books("valid")[0]
    # A part of the text suffices: no token of any tokenizer is longer than some letters on average.
    prompt = list(pair.encode(read_text(book)[: 16 * case.context]))[: case.context]
    arguments: dict[str, Any] = {"max_new_tokens": case.room, "window": case.window, **REAL_METHODS[method]}
    first = generate(pair, [prompt], stop_at_eos=False, **arguments)
    run = generate(pair, [prompt], stop_at_eos=False, **arguments)
    result = run.results[0]
    return {
        "tokens_per_second": run.tokens_per_s,
        "window_seconds": run.timing.decode_s / max(result.windows, 1),
        "windows": result.windows,
        "accepted_per_window": result.accepted_per_window,
        "density": 1.0 - result.kv_reduction,
        "compile_seconds": first.timing.compile_s,
        "prefill_seconds": run.timing.prefill_s,
        "prompt_tokens": result.prompt_tokens,
        "book": book.name,
        "text": result.text,
        "plan": str(Plan(result.mode, result.window or 0)),
        "decisions": [decision.reason for decision in run.decisions],
    }
