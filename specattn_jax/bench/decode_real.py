"""The decode benchmark's real pair: a long prompt of a book, true acceptance, and the text that came out."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from specattn_jax.bench.decode_cases import REAL_METHODS, TINY, DecodeCase
from specattn_jax.gating import Plan
from specattn_jax.generation import Generations, generate
from specattn_jax.pair import ModelPair, load_pair
from specattn_jax.texts import read_text, shipped_books


@functools.lru_cache(maxsize=1)
def _pair(name: str) -> ModelPair:
    if name == TINY:
        from specattn_jax.examples import tiny_pair

        return tiny_pair()
    return load_pair(name)


class _Runs(NamedTuple):
    """What one method gave.

    Attributes:
        first: the run in which its programs were compiled.
        others: the runs that count.
    """

    first: Generations
    others: list[Generations]


@functools.lru_cache(maxsize=1)
def _side_by_side(case: DecodeCase, methods: tuple[str, ...], repeats: int) -> dict[str, _Runs]:
    """Runs all methods in turns, once for compiling and so often for timing.

    Each alone, one after the other, they would not be equals: windows of one program were measured 15 % slower once
    another, larger one had been loaded.
    """
    pair = _pair(case.target)
    book = shipped_books("valid")[0]
    # A part of the text suffices: no token of any tokenizer is longer than some letters on average.
    prompt = list(pair.encode(read_text(book)[: 16 * case.context]))[: case.context]

    def run(method: str) -> Generations:
        arguments: dict[str, Any] = {"max_new_tokens": case.room, "window": case.window, **REAL_METHODS[method]}
        return generate(pair, [prompt], stop_at_eos=False, **arguments)

    found = {method: _Runs(run(method), []) for method in methods}
    for _ in range(repeats):
        for method, runs in found.items():
            runs.others.append(run(method))
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
    first, runs = _side_by_side(case, tuple(methods), repeats)[method]
    seconds = [run.timing.decode_s for run in runs]
    run, median = runs[-1], statistics.median(seconds)
    result = run.results[0]
    return {
        # The first token is the prefill's.
        "tokens_per_second": (len(result.tokens) - 1) / median,
        "window_seconds": median / max(result.windows, 1),
        "spread": (max(seconds) - min(seconds)) / median,
        "decode_seconds": seconds,
        "repeats": repeats,
        "windows": result.windows,
        "accepted_per_window": result.accepted_per_window,
        "density": 1.0 - result.kv_reduction,
        "compile_seconds": first.timing.compile_s,
        "first_decode_seconds": first.timing.decode_s,
        "prefill_seconds": run.timing.prefill_s,
        "prompt_tokens": result.prompt_tokens,
        "book": shipped_books("valid")[0].name,
        "text": result.text,
        "plan": str(Plan(result.mode, result.window or 0)),
        "decisions": [decision.reason for decision in run.decisions],
    }
