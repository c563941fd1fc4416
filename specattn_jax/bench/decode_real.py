"""The decode benchmark's real pair: a long prompt of a book, true acceptance, and the text that came out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specattn_jax.bench.decode_cases import TINY, DecodeCase
from specattn_jax.bench.decode_methods import REAL_METHODS
from specattn_jax.loading.pair import ModelPair, load_pair
from specattn_jax.planning.gate import Choice
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.results import Generations
from specattn_jax.texts import read_text, shipped_books
from specattn_jax.timing import median_and_spread


@functools.lru_cache(maxsize=1)
def _pair(name: str) -> ModelPair:
    if name == TINY:
        from specattn_jax.examples import tiny_pair

        return tiny_pair()
    return load_pair(name)


def _book() -> Path:
    """What is continued."""
    return shipped_books("valid")[0]


@functools.lru_cache(maxsize=1)
def _side_by_side(case: DecodeCase, methods: tuple[str, ...], repeats: int) -> dict[str, list[Generations]]:
    """Runs all methods in turns: once for compiling, then so often for timing.

    Each alone, one after the other, they would not be equals: windows of one program were measured 15 % slower once
    another, larger one had been loaded.
    """
    pair = _pair(case.target)
    # A part of the text suffices: no token of any tokenizer is longer than some letters on average.
    prompt = list(pair.encode(read_text(_book())[: 16 * case.context]))[: case.context]

    def run(method: str) -> Generations:
        arguments: dict[str, Any] = {"max_new_tokens": case.room, "window": case.window, **REAL_METHODS[method]}
        return generate(pair, [prompt], stop_at_eos=False, **arguments)

    found: dict[str, list[Generations]] = {method: [] for method in methods}
    for _ in range(1 + repeats):
        for method, runs in found.items():
            runs.append(run(method))
    return found


def measure_real(case: DecodeCase, method: str, methods: Sequence[str], repeats: int) -> dict[str, Any]:
    """Continues the first tokens of a shipped book that neither draft nor calibration has seen.

    Args:
        case: of a real pair.
        method: of `REAL_METHODS`.
        methods: all that are measured in turns, this one among them; the first call measures all.
        repeats: runs of which the median counts.

    Raises:
        UserError: the weights cannot be fetched.
    """
    first, *runs = _side_by_side(case, tuple(methods), repeats)[method]
    seconds = [run.timing.decode_s for run in runs]
    median, spread = median_and_spread(seconds)
    # The text is the same in all of them.
    run = dataclasses.replace(runs[-1], timing=dataclasses.replace(runs[-1].timing, decode_s=median))
    result = run.results[0]
    return {
        "tokens_per_second": run.tokens_per_s,
        "window_seconds": median / max(result.windows, 1),
        "spread": spread,
        "decode_seconds": seconds,
        "repeats": repeats,
        "windows": result.windows,
        "accepted_per_window": result.accepted_per_window,
        "density": 1.0 - result.kv_reduction,
        "compile_seconds": first.timing.compile_s,
        "first_decode_seconds": first.timing.decode_s,
        "prefill_seconds": run.timing.prefill_s,
        "prompt_tokens": result.prompt_tokens,
        "book": _book().name,
        "text": result.text,
        "plan": str(Choice(result.mode, result.window or 0)),
        "decisions": [decision.reason for decision in run.decisions],
    }
