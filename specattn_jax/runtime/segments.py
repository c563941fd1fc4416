"""Decoding to the end: one program, or several where a gate finds that another one has become faster."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from specattn_jax.decoding import loop
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.state import DecodeState, Statistics
from specattn_jax.decoding.work import Drafter
from specattn_jax.models.sharding import fetch
from specattn_jax.planning.acceptance import Replay
from specattn_jax.planning.gate import Choice, Decide, Decision, Situation
from specattn_jax.runtime.clock import Clock
from specattn_jax.runtime.session import Session
from specattn_jax.runtime.writer import Pace, Writer

# Windows after which the true acceptance is looked at for the first time.
TRIAL_WINDOWS = 8


def new_tokens(state: DecodeState) -> list[list[int]]:
    """The new tokens of every sequence so far."""
    output, emitted = fetch((state.output, state.emitted))
    return [row[:count].tolist() for row, count in zip(output, emitted, strict=True)]


def end(state: DecodeState, stopped: Sequence[bool]) -> DecodeState:
    """The state in which some sequences are done."""
    return dataclasses.replace(state, done=state.done | jnp.asarray(stopped))


def chosen(strategies: Mapping[Choice, Strategy], choice: Choice) -> Strategy:
    """The strategy of a choice.

    Raises:
        ValueError: it is none of them.
    """
    if choice not in strategies:
        raise ValueError(f"decide chose {choice}; expected one of {', '.join(map(str, strategies))}.")
    return strategies[choice]


class Decoded(NamedTuple):
    """What decoding to the end gave.

    Attributes:
        state: the last state; its statistics are those of all segments.
        choice: the mode that most tokens were decoded in, and the window that most of those had.
        decisions: every decision, the first included; empty where nobody decided.
    """

    state: DecodeState
    choice: Choice
    decisions: list[Decision]


@dataclasses.dataclass
class Decoding:
    """Everything that does not change while decoding.

    Attributes:
        session: the models.
        strategies: those that may be chosen.
        clock: told what took how long.
        writer: told the text.
        pace: after how many windows text is shown; None is at the end.
        decide: asked again after the first windows, and when the context enters the next power of two, unless it said
            that its decision is final.
        on_decision: told every decision after the first.
        draft_context: where the draft's context ends, if that may be before the end.
        replays: what looking up would have found in each text; None where nobody may look up.
    """

    session: Session
    strategies: Mapping[Choice, Strategy]
    clock: Clock
    writer: Writer
    pace: Pace | None
    decide: Decide | None = None
    on_decision: Callable[[Decision], None] | None = None
    draft_context: int | None = None
    replays: Sequence[Replay] | None = None

    def run(self, state: DecodeState, first: Decision, known: Situation) -> Decoded:
        """Decodes to the end.

        Args:
            state: where decoding begins, fresh from prefill.
            first: the first decision, or the fixed choice, which is final.
            known: what was known when it was made.
        """
        decisions, tokens = [first], collections.Counter[Choice]()
        while True:
            choice = decisions[-1].choice
            state, known = self._ready(state, choice, known)
            before = _Seen.of(state)
            state, seen = self._segment(state, decisions[-1], before, trial=not tokens)
            tokens[choice] += int(np.sum(seen.emitted - before.emitted))
            if self.decide is None or seen.finished:
                break
            known = self._replay(state, _learn(known, self.strategies[choice], before, seen), before)
            full = self._windows_of_draft(self.strategies[choice], seen) == 0
            decisions.append(self._without_draft() if full else self.decide(known))
            if self.on_decision is not None:
                self.on_decision(decisions[-1])
        return Decoded(state, _most(tokens), decisions if self.decide is not None else [])

    def _replay(self, state: DecodeState, known: Situation, before: _Seen) -> Situation:
        """What looking up would have found of a segment's tokens, if it was another strategy that wrote them."""
        if self.replays is None:
            return known
        tokens, found = (sum(getattr(one, name) for one in self.replays) for name in ("tokens", "found"))
        for replay, new, begun in zip(self.replays, new_tokens(state), before.emitted, strict=True):
            replay.push(new[int(begun) :])
        if known.current is not None and self.strategies[known.current].drafter is Drafter.TEXT:
            return known
        tokens = sum(one.tokens for one in self.replays) - tokens
        found = sum(one.found for one in self.replays) - found
        return known._replace(text_acceptance=known.text_acceptance.observe(1, tokens, found))

    def _ready(self, state: DecodeState, choice: Choice, known: Situation) -> tuple[DecodeState, Situation]:
        """Lets the chosen strategy take over, and compiles its programs."""
        strategy, compiled, seconds = chosen(self.strategies, choice), choice in known.compiled, 0.0
        if not compiled:
            self.clock.lap("decode", state)
        if choice != known.current:
            if not compiled:
                # Not by a call: a pass of the draft belongs to decoding.
                loop.start.lower(strategy, self.session.of(strategy), state).compile()
                seconds = self.clock.lap("compile")
            state = self.session.start(strategy, state)
        known = known._replace(current=choice)
        if compiled:
            return state, known
        self.clock.lap("decode", state)
        state = self.session.decode(strategy, state, 0)
        seconds += self.clock.lap("compile", state)
        return state, known._replace(compiled=known.compiled | {choice}, compile_s=max(known.compile_s, seconds))

    def _segment(
        self, state: DecodeState, decision: Decision, begun: _Seen, *, trial: bool
    ) -> tuple[DecodeState, _Seen]:
        """Decodes until it is time to decide again, or to the end.

        Args:
            state: where decoding stands.
            decision: how to decode.
            begun: what is seen of the state.
            trial: whether the first windows may be the last.
        """
        strategy = self.strategies[decision.choice]
        ends = self._ends(decision, begun, trial=trial)
        seen, windows = begun, 0
        while not seen.finished and (ends.windows is None or windows < ends.windows) and seen.context < ends.context:
            room = self._windows_of_draft(strategy, seen)
            if room == 0:
                break
            steps = min(room, seen.wanted if self.pace is None else self.pace.windows)
            if ends.windows is not None:
                steps = min(steps, ends.windows - windows)
            elif not decision.is_final:
                # A window gives each sequence so many tokens at most: the end of a bucket is not run over.
                steps = min(steps, max(1, -(-(ends.context - seen.context) // (strategy.window + 1))))
            called = time.perf_counter()
            state = self.session.decode(strategy, state, steps)
            windows += steps
            seen = _Seen.of(state)
            if self.pace is not None:
                self.pace.took(steps, time.perf_counter() - called)
                self.writer.show(new_tokens(state))
                if np.any(np.array(self.writer.stopped) & ~seen.done):
                    state = end(state, self.writer.stopped)
                    seen = _Seen.of(state)
        self.clock.lap("decode", state)
        return state, seen

    def _windows_of_draft(self, strategy: Strategy, seen: _Seen) -> int:
        """Windows for which the draft has surely room; very many where it has no end, or is not asked."""
        if self.draft_context is None or not strategy.needs_draft:
            return _NEVER
        # A window gives each sequence so many tokens at most.
        return max(0, (self.draft_context - seen.longest) // (strategy.window + 1))

    def _without_draft(self) -> Decision:
        """The first strategy that needs no draft, to the end."""
        choice = next(choice for choice, strategy in self.strategies.items() if not strategy.needs_draft)
        return Decision(choice, reason=f"{choice}, as the draft's context ends at {self.draft_context}.", is_final=True)

    def _ends(self, decision: Decision, seen: _Seen, *, trial: bool) -> _Ends:
        """When to decide again."""
        if decision.is_final:
            return _Ends(None, _NEVER)
        return _Ends(TRIAL_WINDOWS if trial else None, next_bucket(seen.context))


_NEVER = 2**62


class _Ends(NamedTuple):
    """A segment ends after so many windows, if they are limited, or when caches hold so much on average."""

    windows: int | None
    context: int


def next_bucket(context: int) -> int:
    """The power of two at which a context leaves its bucket."""
    return 1 << context.bit_length()


class _Seen(NamedTuple):
    """What the host looks at between calls: few small arrays."""

    lengths: np.ndarray
    emitted: np.ndarray
    limit: np.ndarray
    done: np.ndarray
    statistics: Statistics

    @classmethod
    def of(cls, state: DecodeState) -> _Seen:
        arrays = state.target_cache.lengths, state.emitted, state.limit, state.done, state.statistics
        return cls(*fetch(arrays))

    @property
    def finished(self) -> bool:
        return bool(np.all(self.done))

    @property
    def context(self) -> int:
        """Mean entries in a cache, of the sequences that still decode."""
        return int(np.mean(self.lengths[~self.done])) if not self.finished else int(np.mean(self.lengths))

    @property
    def longest(self) -> int:
        """Entries in the longest cache, of the sequences that still decode."""
        return int(np.max(self.lengths[~self.done], initial=0))

    @property
    def wanted(self) -> int:
        """Most tokens that a sequence still wants, and so the most windows."""
        return int(np.max(self.limit - self.emitted))


def _learn(known: Situation, strategy: Strategy, before: _Seen, seen: _Seen) -> Situation:
    """What is known after a segment."""
    then, now = before.statistics, seen.statistics
    windows = int(np.sum(now.windows) - np.sum(then.windows))
    accepted = int(np.sum(now.accepted) - np.sum(then.accepted))
    proposed = int(np.sum(now.drafted) - np.sum(then.drafted))
    can_draft = known.can_draft and strategy.needs_draft
    known = known._replace(context=seen.context, remaining=seen.wanted, can_draft=can_draft)
    if not proposed or not windows:
        return known
    if not strategy.lossless:
        known = known._replace(kv_reduction=1.0 - float(np.sum(np.mean(now.read - then.read, axis=1))) / windows)
    return known.observe(strategy, round(proposed / windows), windows, accepted)


def _most(tokens: collections.Counter[Choice]) -> Choice:
    """The mode of most tokens, and the window of most of those."""
    modes = collections.Counter[str]()
    for choice, count in tokens.items():
        modes[choice.mode] += count
    mode = max(modes, key=lambda one: modes[one])
    return max((choice for choice in tokens if choice.mode == mode), key=lambda choice: tokens[choice])
