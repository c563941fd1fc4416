"""Text in, text out: the host side of generation around the jitted loop."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from specattn_jax.decoding.protocol import Models, Strategy, WindowRecord
from specattn_jax.decoding.state import DecodeState
from specattn_jax.errors import UserError
from specattn_jax.loading.pair import ModelPair
from specattn_jax.loading.tokenizer import Tokenizer
from specattn_jax.models.sharding import fetch
from specattn_jax.planning.acceptance import replay_prompts, text_acceptance
from specattn_jax.planning.gate import Choice, Decide, Decision, Situation, make_gate, prior_acceptance
from specattn_jax.reporting.shading import SelectionRecord
from specattn_jax.runtime.clock import Clock
from specattn_jax.runtime.faults import check_sound
from specattn_jax.runtime.request import (
    Request,
    check_draft,
    check_lengths,
    draft_end,
    encode_prompt,
    find_candidates,
    prompt_keys,
)
from specattn_jax.runtime.results import FinishReason, Generation, Generations, Timing
from specattn_jax.runtime.segments import Decoded, Decoding, chosen, end, new_tokens
from specattn_jax.runtime.session import Memory, Session
from specattn_jax.runtime.writer import Pace, Writer, find_stop
from specattn_jax.selection.reads import past_mask

# Windows between two looks at the text where several processes have to look at the same time.
_WINDOWS_TOGETHER = 8


def generate(
    pair: ModelPair,
    prompts: Sequence[str | Sequence[int]],
    request: Request | None = None,
    *,
    on_text: Callable[[int, str], None] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    on_decision: Callable[[Decision], None] | None = None,
    decide: Decide | None = None,
    memory: Memory | None = None,
    **changes: Any,
) -> Generations:
    """Continues a batch of prompts of any lengths.

    Mode `auto` predicts which of the others, with how many drafted tokens, is the fastest on this device, for these
    models, this batch and context. It looks again once some tokens were accepted or refused, and whenever the context
    has doubled. It takes `specattn`, which is approximate, only where the pair has an alignment and `lossless` is off.
    Without a draft it chooses among those that need none.

    Args:
        pair: target, draft, tokenizer and alignment, from `load_pair`.
        prompts: texts, or lists of token ids.
        request: what is wanted; the default one without it.
        on_text: receives the index of a prompt and what was added to its text, whole characters only, some five times
            a second; without it one call does everything.
        on_prefill: receives positions read and positions to read.
        on_decision: receives each decision of mode `auto` when it is made.
        decide: decides in mode `auto` in place of the library.
        memory: of these sequences, such as a conversation: what the caches hold of the prompts is not read again, and
            they are kept.
        changes: attributes of `Request` that are to be different: `mode`, `max_new_tokens`, `kv_reduction`,
            `temperature`, `seed` and so on.

    Returns:
        One `Generation` per prompt, and timings.

    Raises:
        UserError: an argument is out of range, a prompt is empty or too long, or memory does not suffice.
        ValueError: `decide` chose what cannot be had.

    Example:
        >>> from specattn_jax.examples import tiny_pair  # load_pair() gives one that makes sense
        >>> pieces = []
        >>> run = generate(
        ...     tiny_pair(),
        ...     ["Call me Ishmael.", "Once upon a time"],
        ...     mode="specattn",
        ...     kv_reduction=0.75,
        ...     max_new_tokens=8,
        ...     on_text=lambda index, text: pieces.append((index, text)),
        ... )
        >>> [len(result.tokens) for result in run.results]
        [8, 8]
        >>> run.results[1].text == "".join(text for index, text in pieces if index == 1)
        True
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts is one text, {prompts[:40]!r}; expected a list of prompts: put it into brackets.")
    request = (request or Request()).change(**changes)
    if memory is not None and memory.tokens and len(prompts) != len(memory.tokens):
        raise UserError(
            f"prompts holds {len(prompts)}, but memory {len(memory.tokens)} sequences; expected as many, or new memory."
        )
    encoded = [encode_prompt(pair, prompt, index) for index, prompt in enumerate(prompts)]
    check_lengths(pair, encoded, request.max_new_tokens)
    longest = max(map(len, encoded)) + request.max_new_tokens
    strategies, selection = find_candidates(pair, request, context=longest, batch=len(encoded))
    keys = prompt_keys(request, len(encoded))
    possible = check_draft(pair, strategies, encoded, request.max_new_tokens)
    if len(possible) > 1 and decide is None and _together():
        raise UserError(
            "mode or window is auto, but several processes, whose measurements differ, have to choose the same; give "
            "mode and window."
        )
    context, replays = sum(map(len, encoded)) // len(encoded), None
    known = Situation(context, request.max_new_tokens, prior_acceptance(pair), draft_reach=request.reach)
    if len(possible) > 1:
        if any(one.needs_text for one in possible):
            replays = replay_prompts(encoded)
            # A batch ends with its slowest sequence, which may be one that does not repeat itself.
            repeats = len(encoded) == 1 and request.sampling.greedy and not request.sampling.minds_history
            known = known._replace(text_acceptance=text_acceptance(replays, greedy=repeats))
        decide = decide or make_gate(pair, len(encoded), possible, selection)
        first = decide(known)
        if on_decision is not None:
            on_decision(first)
    else:
        decide, first = None, Decision(Choice.of(possible[0]), is_final=True)
        if len(strategies) > 1:
            first = dataclasses.replace(first, reason=_too_long_for_draft(pair, first.choice))
            if on_decision is not None:
                on_decision(first)
    by_choice = {Choice.of(strategy): strategy for strategy in possible}
    strategy = chosen(by_choice, first.choice)

    clock = Clock()
    session = Session(Models(pair.target, pair.draft), draft_reach=request.reach)
    state = session.prefill(
        encoded,
        request.max_new_tokens,
        settings=strategy.settings,
        # Where nothing longer comes this is the program of the fixed mode, to the shape.
        window=strategy.window if first.is_final else max(one.window for one in possible),
        with_draft=strategy.needs_draft,
        with_prompt=any(one.needs_text for one in ([strategy] if first.is_final else possible)),
        keys=keys,
        clock=clock,
        on_prefill=on_prefill,
        memory=memory,
    )
    writer = Writer(pair.tokenizer, len(encoded), on_text or (lambda index, text: None), request.stop)
    watched: list[_Window] = []
    if request.keep_selection:
        state, watched = _decode_watched(session, strategy, state, writer)
        clock.lap("decode", state)
        decoded = Decoded(state, first.choice, [])
    else:
        # Stop texts are looked for where text is shown.
        pace = None if on_text is None and not request.stop else Pace(_WINDOWS_TOGETHER if _together() else None)
        ends = draft_end(pair, encoded, request.max_new_tokens)
        decoding = Decoding(session, by_choice, clock, writer, pace, decide, on_decision, ends, replays)
        decoded = decoding.run(state, first, known)
    new = new_tokens(decoded.state)
    check_sound(session.models, decoded.state, [before + after for before, after in zip(encoded, new, strict=True)])
    writer.finish(new)
    if memory is not None:
        memory.keep(decoded.state, [[*before, *after] for before, after in zip(encoded, new, strict=True)])
    lossless = by_choice[decoded.choice].lossless
    draft_reads = None if lossless or selection is None else selection.policy.draft_reads
    results = _results(pair, encoded, new, decoded, lossless, draft_reads, watched, request)
    told = decoded.decisions or ([first] if first.reason else [])
    return Generations(results, Timing(**clock.seconds), told, _notes(pair, results))


def _notes(pair: ModelPair, results: Sequence[Generation]) -> list[str]:
    """What makes approximate results doubtful."""
    if pair.alignment is None or all(result.lossless for result in results):
        return []
    doubt = pair.alignment.doubt(max(result.prompt_tokens + len(result.tokens) for result in results))
    return [] if doubt is None else [doubt]


def _together() -> bool:
    """Whether several processes decode together, which then have to do the same whatever their clocks say."""
    return jax.process_count() > 1


def _too_long_for_draft(pair: ModelPair, choice: Choice) -> str:
    """Why no draft is asked."""
    context = pair.need_draft().config.max_context
    return f"{choice}, as the context of the draft, {pair.draft_name}, is {context} tokens and the prompt fills it."


@dataclasses.dataclass(frozen=True)
class _Window:
    """What the host saw of one window: the cache before it, whether a sequence still decoded, and who read what."""

    past: np.ndarray
    active: np.ndarray
    readers: np.ndarray


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _KeepReaders:
    """Keeps how many pairs of a layer and a kv head read each slot of the past."""

    def __call__(self, record: WindowRecord) -> Mapping[str, Array]:
        past, active, layers, cache = record.seen
        readers = [jnp.sum(past_mask(seen.plan, past, cache), axis=1, dtype=jnp.int32) for seen in layers]
        return {"past": past, "active": active, "readers": functools.reduce(jnp.add, readers)}


def _decode_watched(
    session: Session, strategy: Strategy, state: DecodeState, writer: Writer
) -> tuple[DecodeState, list[_Window]]:
    """Decodes window by window, keeping what each of them read."""
    windows = []
    state = session.start(strategy, state)
    while not fetch(state.done).all():
        state, kept = session.watch(strategy, state, 1, _KeepReaders())
        windows.append(_Window(**{name: value[0] for name, value in fetch(kept).items()}))
        writer.show(new_tokens(state))
        if any(writer.stopped):
            state = end(state, writer.stopped)
    return state, windows


def _record(
    pair: ModelPair, prompt: Sequence[int], new: Sequence[int], windows: Sequence[_Window], index: int
) -> SelectionRecord:
    """What the windows read of one sequence."""
    mine = [window for window in windows if window.active[index]]
    slots = len(prompt) + len(new)
    config = pair.target.config
    return SelectionRecord(
        pieces=pair.tokenizer.pieces([*prompt, *new]),
        past=np.array([window.past[index] for window in mine], np.int64),
        readers=np.array([window.readers[index, :slots] for window in mine], np.int64).reshape(len(mine), slots),
        num_readers=config.num_layers * config.num_kv_heads,
    )


def _results(
    pair: ModelPair,
    encoded: list[list[int]],
    new: list[list[int]],
    decoded: Decoded,
    lossless: bool,
    draft_reads: float | None,
    watched: Sequence[_Window],
    request: Request,
) -> list[Generation]:
    """What a finished state says, per prompt."""
    counts = fetch(decoded.state.statistics)
    results = []
    for index, (prompt, tokens) in enumerate(zip(encoded, new, strict=True)):
        windows, inner = int(counts.windows[index]), int(counts.inner_windows[index])
        reads = counts.read[index] / max(windows, 1)
        text, tokens, reason = _ending(pair.tokenizer, tokens, request)
        results.append(
            Generation(
                text=text,
                tokens=tokens,
                prompt_tokens=len(prompt),
                mode=decoded.choice.mode,
                window=decoded.choice.window or None,
                windows=windows,
                accepted_per_window=float(counts.accepted[index]) / max(windows, 1),
                kv_reduction=1.0 - float(reads.mean()) if windows else 0.0,
                layer_reads=[float(read) for read in reads],
                lossless=lossless,
                selection=_record(pair, prompt, tokens, watched, index) if watched else None,
                finish_reason=reason,
                inner_accepted_per_window=float(counts.inner_accepted[index]) / inner if inner else None,
                draft_reads=draft_reads,
            )
        )
    return results


def _ending(tokenizer: Tokenizer, tokens: list[int], request: Request) -> tuple[str, list[int], FinishReason]:
    """The text up to a stop text, the tokens up to the one that completes it, and why the text ends there."""
    text = tokenizer.decode(tokens)
    ends = find_stop(text, request.stop)
    if ends is not None:

        def complete(count: int) -> bool:
            return find_stop(tokenizer.decode(tokens[:count]), request.stop) is not None

        needed = bisect.bisect_left(range(len(tokens)), True, key=complete)
        return text[:ends], tokens[:needed], "stop text"
    at_end = request.stop_at_eos and tokens[-1] in tokenizer.eos_ids
    return text, tokens, "end token" if at_end else "length"
