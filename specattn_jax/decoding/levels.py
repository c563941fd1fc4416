"""Two levels: the target over what it looked at most proposes, and the target over everything verifies that once.

What is below them, who proposes to the target over few entries, is a matter of each strategy.

Source: the hierarchy of TriForce (arXiv 2404.11912).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32
from specattn_kernels import SelectionPlan, lay

from specattn_jax.decoding.judging import Judge, judge_exactly
from specattn_jax.decoding.middle import InnerDrafter, Proposed, propose
from specattn_jax.decoding.pacing import Tally, passes_for, tokens_ahead
from specattn_jax.decoding.protocol import (
    DecodeSettings,
    Models,
    WindowRecord,
    check_window,
    newest,
    next_keys,
    target_logits,
)
from specattn_jax.decoding.refreshing import read_and_refresh
from specattn_jax.decoding.sampling import Verdict
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.selection.own import OwnReads
from specattn_jax.selection.reads import layer_shares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Levels:
    """What a strategy of two levels keeps for itself.

    Attributes:
        plan: what the middle level reads.
        tally: what the dense passes kept of it.
        text: the text so far, of those who look up in it; else None.
    """

    plan: SelectionPlan
    tally: Tally
    text: Int32[Array, "B S"] | None = None


@dataclasses.dataclass(frozen=True)
class TwoLevels(abc.ABC):
    """Somebody proposes, the target over selected entries keeps some, the target over everything verifies those.

    Inner windows follow each other until every sequence has as many tokens as it is to have, which depends on what
    dense passes kept of it so far. As the inner rule is exact, tokens are drawn from the target's sparse distribution,
    which is kept for the outer rule.

    Attributes:
        settings: how tokens are drawn, and where sequences end.
        window: most places that a window writes behind the newest token: those that are verified densely, and those of
            one inner window.
        inner: tokens that are proposed to the middle level at a time.
        reads: how much of its cache the middle level reads.
        judge: decides what the dense pass keeps; another one than the exact rule is for measuring. Likewise
        inner_judge: what the middle level keeps.
    """

    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings)
    window: int = 15
    inner: int = 3
    reads: OwnReads = dataclasses.field(default_factory=OwnReads)
    judge: Judge = judge_exactly
    inner_judge: Judge = judge_exactly

    name: ClassVar[str] = "hierarchical"
    drafter: ClassVar[Drafter] = Drafter.TARGET
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_window(self.window)
        if not 1 <= self.inner < self.window:
            raise UserError(
                f"window is {self.window}, but mode {self.name} drafts {self.inner} tokens at a time; expected a "
                "larger window, so that the dense pass has some to verify."
            )

    @property
    def verified(self) -> int:
        """Tokens of the middle level that a dense pass verifies at most."""
        return self.window - self.inner

    @abc.abstractmethod
    def lowest(self, models: Models, state: DecodeState) -> tuple[InnerDrafter, Any]:
        """Who proposes the tokens of inner windows, and what it carries into the first."""

    @abc.abstractmethod
    def catch_up(
        self, models: Models, state: DecodeState, middle: Proposed, wanted: Int32[Array, " B"], verdict: Verdict
    ) -> DecodeState:
        """The state in which the lowest level knows all that may be kept of a window.

        Args:
            models: target, and draft if there is one.
            state: before the window is committed.
            middle: what the middle level gave.
            wanted: how many tokens of it were verified.
            verdict: what the dense pass kept of them.
        """

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Reads the newest token densely, to see what it looks at; the first window reads it again."""
        read = read_and_refresh(models, state, newest(state), state.target_cache, self.reads, 2 * (self.window + 1))
        own = Levels(read.plan, lay(read.seen.cache.split, Tally.start(len(state.last)), "B"))
        return dataclasses.replace(state, target_cache=read.seen.cache, own=own)

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One window: inner windows, one dense pass over what they gave, and rollback."""
        for_inner, for_verdict, later = next_keys(state, 3)
        sampling, tally = self.settings.sampling, state.own.tally
        wanted = tally.tokens_ahead(self.verified)
        draft, carried = self.lowest(models, state)
        middle = propose(
            models,
            state,
            for_inner,
            wanted,
            draft,
            carried,
            plan=state.own.plan,
            sampling=sampling,
            inner=self.inner,
            most=self.verified,
            judge=self.inner_judge,
        )
        drafted = middle.tokens[:, : self.verified]
        probs = None if middle.probs is None else middle.probs[:, : self.verified]

        tokens = jnp.concatenate([newest(state), drafted], axis=1)
        read = read_and_refresh(models, state, tokens, middle.target_cache, self.reads, 2 * (self.window + 1))
        state, logits = target_logits(models, state, read.hidden, drafted, sampling)
        verdict = self.judge(for_verdict, drafted, probs, logits, sampling, state.statistics.windows, wanted)
        own = dataclasses.replace(state.own, plan=read.plan, tally=tally.add(verdict, wanted, ~state.done))
        counts = state.statistics.add_inner(middle.windows, middle.accepted)
        state = dataclasses.replace(state, target_cache=read.seen.cache, keys=later, own=own, statistics=counts)
        state = self.catch_up(models, state, middle, wanted, verdict)
        shares = layer_shares(read.seen)
        state = commit(state, verdict, shares, drafted=wanted, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(read.seen, shares, read.hidden, verdict)

    def work(self, scenario: Scenario, rate: float) -> Work:
        """The two levels of a window: passes of the target over few entries, and one dense pass.

        Args:
            scenario: what is decoded.
            rate: the chance that the middle level keeps a proposed token, if it kept all before it.
        """
        wanted = tokens_ahead(scenario.rate, self.verified)
        return Work(
            tokens=sum(scenario.rate**place for place in range(wanted + 1)),
            verified=self.verified + 1,
            own_steps=passes_for(wanted, rate, self.inner, scenario.batch),
            own_tokens=self.inner + 1,
            own_reads=self.reads.share_of(scenario.context),
        )
