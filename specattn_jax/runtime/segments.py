"""Decoding to the end: one program, or several where a gate finds that another one has become faster."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specattn_jax.decoding.speculative import DecodeSettings, DecodeState, Mode, Statistics, decode, prepare_windows
from specattn_jax.loading.pair import ModelPair
from specattn_jax.loading.tokenizer import TextStream, Tokenizer
from specattn_jax.planning.gate import Acceptance, Decide, Decision, Plan, Situation
from specattn_jax.runtime.starting import Clock
from specattn_jax.selection.policies import Selector

# Windows after which the true acceptance is looked at for the first time.
TRIAL_WINDOWS = 8
# How often text is shown. Every call costs the host some milliseconds, in which nothing is decoded.
_SHOWN_EVERY_S = 0.2


class Writer:
    """Tells the text of each prompt's new tokens as they arrive."""

    def __init__(self, tokenizer: Tokenizer, count: int, on_text: Callable[[int, str], None]) -> None:
        self._streams = [TextStream(tokenizer) for _ in range(count)]
        self._shown = [0] * count
        self._on_text = on_text

    def show(self, tokens: list[list[int]]) -> None:
        """Tells what is new in `tokens`, which are all new tokens so far."""
        for index, (stream, ids) in enumerate(zip(self._streams, tokens, strict=True)):
            self._tell(index, stream.push(ids[self._shown[index] :]))
            self._shown[index] = len(ids)

    def finish(self, tokens: list[list[int]]) -> None:
        """Tells what is left, unfinished characters included."""
        self.show(tokens)
        for index, stream in enumerate(self._streams):
            self._tell(index, stream.flush())

    def _tell(self, index: int, text: str) -> None:
        if text:
            self._on_text(index, text)


class Pace:
    """How many windows the next call takes while text is shown: as many as fit between two looks at it."""

    def __init__(self, windows: int | None = None) -> None:
        """With a fixed number of windows, or one that begins with one window and at most doubles from call to call."""
        self._fixed = windows is not None
        self.windows = windows or 1

    def took(self, windows: int, seconds: float) -> None:
        """Learns how long a call took; the first of a program may be slow, and the last may end early."""
        if not self._fixed:
            fitting = int(windows * _SHOWN_EVERY_S / max(seconds, 1e-9))
            self.windows = max(1, min(fitting, 2 * self.windows))


def new_tokens(state: DecodeState) -> list[list[int]]:
    """The new tokens of every sequence so far."""
    output, emitted = jax.device_get((state.output, state.emitted))
    return [row[:count].tolist() for row, count in zip(output, emitted, strict=True)]


class Decoded(NamedTuple):
    """What decoding to the end gave.

    Attributes:
        state: the last state; its statistics are those of all segments.
        plan: the mode that most tokens were decoded in, and the window that most of those had.
        decisions: every decision, the first included; empty where nobody decided.
    """

    state: DecodeState
    plan: Plan
    decisions: list[Decision]


@dataclasses.dataclass
class Decoding:
    """Everything that does not change while decoding.

    Attributes:
        pair: target and draft.
        selector: what the target reads in mode `specattn`; None where that mode cannot be chosen.
        base: settings, of which mode and window are the plan's.
        clock: told what took how long.
        writer: told the text.
        pace: after how many windows text is shown; None is at the end.
        decide: asked again after the first windows, and when the context enters the next power of two, unless it said
            that its decision is final.
        on_decision: told every decision after the first.
    """

    pair: ModelPair
    selector: Selector | None
    base: DecodeSettings
    clock: Clock
    writer: Writer
    pace: Pace | None
    decide: Decide | None = None
    on_decision: Callable[[Decision], None] | None = None

    def run(self, state: DecodeState, first: Decision, acceptance: Acceptance) -> Decoded:
        """Decodes to the end.

        Args:
            state: where decoding starts; it has a draft's cache unless the first plan needs none.
            first: the first decision, or the fixed plan, which is final.
            acceptance: what is assumed until windows have passed.
        """
        known = Situation(0, 0, acceptance)
        decisions = [first]
        done, tokens = _zeros(state.statistics), collections.Counter[Plan]()
        while True:
            plan = decisions[-1].plan
            state, known = self._ready(state, plan, known)
            before = _Seen.of(state)
            state, seen = self._segment(state, decisions[-1], before, trial=not tokens)
            tokens[plan] += int(np.sum(seen.emitted - before.emitted))
            if self.decide is None or seen.finished:
                break
            known = _learn(known, plan, before, seen)
            new = self.decide(known)
            decisions.append(new)
            if self.on_decision is not None:
                self.on_decision(new)
            if new.plan != plan:
                # What `specattn` read is steered by what it read before, not by what other modes did.
                done = jax.tree.map(np.add, done, jax.device_get(state.statistics))
                state = dataclasses.replace(state, statistics=jax.tree.map(jnp.zeros_like, state.statistics))
        totals = jax.tree.map(np.add, done, jax.device_get(state.statistics))
        return Decoded(
            dataclasses.replace(state, statistics=totals), _most(tokens), decisions if self.decide is not None else []
        )

    def _settings(self, plan: Plan) -> DecodeSettings:
        window = self.base.window if plan.mode == "autoregressive" else plan.window
        return dataclasses.replace(self.base, mode=plan.mode, window=window)

    def _decode(self, state: DecodeState, plan: Plan, windows: int) -> DecodeState:
        draft = None if plan.mode == "autoregressive" else self.pair.draft
        selector = self.selector if plan.mode == "specattn" else None
        settings = self._settings(plan)
        return decode(self.pair.target, draft, selector, state, jnp.int32(windows), settings=settings)

    def _ready(self, state: DecodeState, plan: Plan, known: Situation) -> tuple[DecodeState, Situation]:
        """Drops the draft's cache where nobody needs it any more, and compiles the plan's programs."""
        if plan.window > self.base.window:
            raise ValueError(f"decide chose window {plan.window}; caches and output have room for {self.base.window}.")
        if plan.mode == "autoregressive" and state.draft_cache is not None:
            state = dataclasses.replace(state, draft_cache=None)
        compiled, seconds = plan in known.compiled, 0.0
        if plan != known.current:
            # What the draft reads was planned for another window, or not at all.
            state = dataclasses.replace(state, draft_plan=None)
            if plan.mode == "specattn":
                state, seconds = self._prepare(state, plan, compiled=compiled)
        known = known._replace(current=plan)
        if compiled:
            return state, known
        self.clock.lap("decode", state)
        state = self._decode(state, plan, 0)
        seconds += self.clock.lap("compile", state)
        return state, known._replace(compiled=known.compiled | {plan}, compile_s=max(known.compile_s, seconds))

    def _prepare(self, state: DecodeState, plan: Plan, *, compiled: bool) -> tuple[DecodeState, float]:
        """The state with what the draft reads in the next window, and the seconds that compiling took."""
        if self.selector is None:
            raise ValueError(f"decide chose {plan}, but there is no selector.")
        settings, seconds = self._settings(plan), 0.0
        if not compiled:
            self.clock.lap("decode", state)
            # Not by a call: a pass of the draft belongs to decoding.
            prepare_windows.lower(self.pair.draft, self.selector, state, settings=settings).compile()
            seconds = self.clock.lap("compile")
        return prepare_windows(self.pair.draft, self.selector, state, settings=settings), seconds

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
        plan, ends = decision.plan, self._ends(decision, begun, trial=trial)
        seen, windows = begun, 0
        most = self._settings(plan).tokens_per_window
        while not seen.finished and (ends.windows is None or windows < ends.windows) and seen.context < ends.context:
            steps = seen.wanted if self.pace is None else self.pace.windows
            if ends.windows is not None:
                steps = min(steps, ends.windows - windows)
            elif decision.may_change:
                # A window gives each sequence so many tokens at most: the end of a bucket is not run over.
                steps = min(steps, max(1, -(-(ends.context - seen.context) // most)))
            called = time.perf_counter()
            state = self._decode(state, plan, steps)
            windows += steps
            seen = _Seen.of(state)
            if self.pace is not None:
                self.pace.took(steps, time.perf_counter() - called)
                self.writer.show(new_tokens(state))
        self.clock.lap("decode", state)
        return state, seen

    def _ends(self, decision: Decision, seen: _Seen, *, trial: bool) -> _Ends:
        """When to decide again."""
        if not decision.may_change:
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
        return cls(*jax.device_get(arrays))

    @property
    def finished(self) -> bool:
        return bool(np.all(self.done))

    @property
    def context(self) -> int:
        """Mean entries in a cache, of the sequences that still decode."""
        return int(np.mean(self.lengths[~self.done])) if not self.finished else int(np.mean(self.lengths))

    @property
    def wanted(self) -> int:
        """Most tokens that a sequence still wants, and so the most windows."""
        return int(np.max(self.limit - self.emitted))


def _learn(known: Situation, plan: Plan, before: _Seen, seen: _Seen) -> Situation:
    """What is known after a segment."""
    then, now = before.statistics, seen.statistics
    windows = int(np.sum(now.windows) - np.sum(then.windows))
    accepted = int(np.sum(now.accepted) - np.sum(then.accepted))
    known = known._replace(context=seen.context, remaining=seen.wanted)
    if plan.mode == "autoregressive" or not windows:
        return known
    if plan.mode == "specattn":
        known = known._replace(kv_reduction=1.0 - float(np.sum(np.mean(now.read - then.read, axis=1))) / windows)
    return known._replace(acceptance=known.acceptance.observe(plan.window, windows, accepted))


def _zeros(statistics: Statistics) -> Statistics:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), statistics)


def _most(tokens: collections.Counter[Plan]) -> Plan:
    """The mode of most tokens, and the window of most of those."""
    modes = collections.Counter[Mode]()
    for plan, count in tokens.items():
        modes[plan.mode] += count
    mode = max(modes, key=lambda one: modes[one])
    return max((plan for plan in tokens if plan.mode == mode), key=lambda plan: tokens[plan])
