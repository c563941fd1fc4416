"""The decode benchmark's real pair: a long prompt of a book, true acceptance, and the text that came out."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from specattn_jax.bench.decode_cases import TINY, DecodeCase
from specattn_jax.bench.decode_methods import AUTOREGRESSIVE, REAL_METHODS
from specattn_jax.loading.pair import NO_DRAFT, ModelPair, load_pair
from specattn_jax.planning.gate import Choice
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import NEVER_DRAFTED
from specattn_jax.runtime.results import Generations
from specattn_jax.runtime.session import Memory, begin_alike
from specattn_jax.texts import read_text, shipped_books, spread_parts
from specattn_jax.timing import median_and_spread

# More tokens than this are read once for all methods: reading them would take most of the time.
_READ_ANEW = 100_000


@functools.lru_cache(maxsize=1)
def _pair(name: str) -> ModelPair:
    if name == TINY:
        from specattn_jax.examples import tiny_pair

        return tiny_pair()
    return load_pair(name)


def _book() -> Path:
    """What is continued."""
    return shipped_books("valid")[0]


def book_prompts(pair: ModelPair, tokens: int, count: int) -> list[list[int]]:
    """So many parts of the book that begin at evenly spaced places, the first one at its beginning; long ones overlap.

    Args:
        pair: whose tokenizer cuts the book.
        tokens: of each part.
        count: how many.
    """
    book = read_text(_book())
    # A part of the text suffices for one: no token of any tokenizer is longer than some letters on average.
    return spread_parts(pair.encode(book[: 16 * tokens] if count == 1 else book), tokens, count)


def real_method(pair: ModelPair, method: str) -> tuple[ModelPair, dict[str, Any]]:
    """The pair of which a method of `REAL_METHODS` is asked, which may lose its draft, and what is asked of it."""
    how = dict(REAL_METHODS[method])
    if how.pop("draft", None) == NO_DRAFT:
        pair = dataclasses.replace(pair, draft=None, alignment=None)
    return pair, how


class _Run(NamedTuple):
    """One run of a method on one batch of prompts, and the seconds that reading them takes with the models it needs."""

    made: Generations
    prefill_seconds: float


class _Runner:
    """Runs methods on the same batches of prompts; where there are many tokens, they are read once for all methods."""

    def __init__(self, case: DecodeCase) -> None:
        self._case, self._pair = case, _pair(case.target)
        prompts = book_prompts(self._pair, case.context, case.batch * case.texts)
        self._batches = [prompts[at : at + case.batch] for at in range(0, len(prompts), case.batch)]
        # Caches of several batches would not fit.
        self._shares = case.texts == 1 and case.batch * case.context > _READ_ANEW
        self._memory, self._seconds = Memory(new_tokens=case.room), dict[str, float]()

    def __call__(self, method: str) -> list[_Run]:
        """Runs one on every batch; where reading is shared, the first one must need no draft."""
        return [self._run(method, prompts) for prompts in self._batches]

    def _run(self, method: str, prompts: Sequence[Sequence[int]]) -> _Run:
        arguments: dict[str, Any] = {"max_new_tokens": self._case.room, "window": self._case.window}
        memory, had = self._memory if self._shares else None, set(self._memory.caches)
        pair, how = real_method(self._pair, method)
        made = generate(pair, prompts, stop_at_eos=False, memory=memory, **{**arguments, **how})
        if memory is None:
            return _Run(made, made.timing.prefill_s)
        for role in set(memory.caches) - had:
            # One at a time: those that need no draft come first.
            self._seconds.setdefault(role, made.timing.prefill_s)
        modes = {made.results[0].mode, *(decision.mode for decision in made.decisions)}
        roles = ("target",) if pair.draft is None or modes <= set(NEVER_DRAFTED) else ("target", "draft")
        return _Run(made, sum(self._seconds[role] for role in roles))


@functools.lru_cache(maxsize=1)
def _side_by_side(case: DecodeCase, methods: tuple[str, ...], repeats: int) -> dict[str, list[list[_Run]]]:
    """Runs all methods in turns: once for compiling, then so often for timing; each time on every batch of prompts.

    Each alone, one after the other, they would not be equals: windows of one program were measured 15 % slower once
    another, larger one had been loaded.
    """
    run = _Runner(case)
    found: dict[str, list[list[_Run]]] = {method: [] for method in methods}
    for _ in range(1 + repeats):
        # What needs no draft comes first, so that what each model reads is timed by itself.
        for method in sorted(found, key=_may_draft):
            found[method].append(run(method))
    return found


def _may_draft(method: str) -> bool:
    asked = REAL_METHODS[method]
    return asked["mode"] not in NEVER_DRAFTED and asked.get("draft") != NO_DRAFT


def measure_real(case: DecodeCase, method: str, methods: Sequence[str], repeats: int) -> dict[str, Any]:
    """Continues parts of a shipped book that neither draft nor calibration has seen.

    Args:
        case: of a real pair.
        method: of `REAL_METHODS`.
        methods: all that are measured in turns, this one among them; the first call measures all.
        repeats: runs of which the median counts.

    Raises:
        UserError: the weights cannot be fetched.
    """
    found = _side_by_side(case, tuple(methods), repeats)
    first, *timed = found[method]
    seconds = [statistics.mean(run.made.timing.decode_s for run in runs) for runs in timed]
    median, spread = median_and_spread(seconds)
    # The texts are the same in all of them.
    made = [run.made for run in timed[-1]]
    results = [result for one in made for result in one.results]
    windows = statistics.mean(max(result.windows for result in one.results) for one in made)
    return {
        "tokens_per_second": sum(len(result.tokens) - 1 for result in results) / len(made) / median,
        "window_seconds": median / max(windows, 1),
        "spread": spread,
        "decode_seconds": seconds,
        "repeats": repeats,
        "windows": windows,
        "accepted_per_window": statistics.mean(result.accepted_per_window for result in results),
        "density": 1.0 - statistics.mean(result.kv_reduction for result in results),
        "compile_seconds": sum(run.made.timing.compile_s for run in first),
        "first_decode_seconds": first[0].made.timing.decode_s,
        "prefill_seconds": statistics.median(run.prefill_seconds for runs in timed for run in runs),
        "prompt_tokens": results[0].prompt_tokens,
        "book": _book().name,
        "text": results[0].text,
        "accepted": [result.accepted_per_window for result in results],
        "leaves_autoregressive_at": _departures(found, method),
        "plan": str(Choice(results[0].mode, results[0].window or 0)),
        "decisions": [decision.reason for one in made for decision in one.decisions],
    }


def _departures(found: Mapping[str, Sequence[Sequence[_Run]]], method: str) -> list[int] | None:
    """Where each text first has another token than autoregressive decoding, or its length; None without such a run."""
    if AUTOREGRESSIVE not in found:
        return None
    texts, alone = ([one for run in found[name][-1] for one in run.made.results] for name in (method, AUTOREGRESSIVE))
    return [begin_alike(one.tokens, other.tokens) for one, other in zip(texts, alone, strict=True)]
