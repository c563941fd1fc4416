"""Two levels: a draft, the target over what it looked at most, and only for what that kept the target over everything.

Source: the hierarchy of TriForce (arXiv 2404.11912).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from specattn_kernels import SelectionPlan, lay

from specattn_jax.decoding.middle import propose
from specattn_jax.decoding.pacing import Tally, tokens_ahead
from specattn_jax.decoding.protocol import (
    DecodeSettings,
    Models,
    WindowRecord,
    check_window,
    drafting,
    newest,
    next_keys,
    target_logits,
)
from specattn_jax.decoding.refreshing import read_and_refresh
from specattn_jax.decoding.sampling import verify
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.models.forward import forward
from specattn_jax.selection.own import OwnReads
from specattn_jax.selection.reads import layer_shares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Own:
    """What the middle level reads, and what the dense passes kept of it."""

    plan: SelectionPlan
    tally: Tally


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hierarchical:
    """The draft proposes, the target over selected entries keeps some, the target over everything verifies those.

    Inner windows follow each other until every sequence has as many tokens as it is to have, which depends on what
    dense passes kept of it so far. As the inner rule is exact, tokens are drawn from the target's sparse distribution,
    which is kept for the outer rule.

    Attributes:
        settings: how tokens are drawn, and where sequences end.
        window: most places that a window writes behind the newest token: those that are verified densely, and those of
            one inner window.
        inner: tokens that the draft proposes at a time.
        reads: how much of its cache the middle level reads.
    """

    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings)
    window: int = 15
    inner: int = 3
    reads: OwnReads = dataclasses.field(default_factory=OwnReads)

    name: ClassVar[str] = "hierarchical"
    needs_draft: ClassVar[bool] = True
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

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Reads the newest token densely, to see what it looks at; the first window reads it again."""
        _, draft_cache = drafting(models, state)
        read = read_and_refresh(models, state, newest(state), state.target_cache, self.reads, self.window)
        cache = draft_cache.at(read.seen.past - 1)
        own = _Own(read.plan, lay(cache.split, Tally.start(len(state.last)), "B"))
        return dataclasses.replace(state, target_cache=read.seen.cache, draft_cache=cache, own=own)

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One window: inner windows, one dense pass over what they gave, and rollback of both caches."""
        draft, _ = drafting(models, state)
        for_inner, for_verdict, later = next_keys(state, 3)
        past, sampling, tally = state.target_cache.lengths, self.settings.sampling, state.own.tally
        wanted = tally.tokens_ahead(self.verified)
        middle = propose(
            models,
            state,
            for_inner,
            wanted,
            plan=state.own.plan,
            sampling=sampling,
            inner=self.inner,
            most=self.verified,
        )
        drafted = middle.tokens[:, : self.verified]
        probs = None if middle.probs is None else middle.probs[:, : self.verified]

        tokens = jnp.concatenate([newest(state), drafted], axis=1)
        read = read_and_refresh(models, state, tokens, middle.target_cache, self.reads, self.window)
        state, logits = target_logits(models, state, read.hidden, drafted, sampling)
        verdict = verify(for_verdict, drafted, probs, logits, sampling, wanted)
        # If all are kept, the draft has to have read all of them but the last.
        newer = jnp.take_along_axis(tokens, wanted[:, None] + jnp.arange(-1, 1), axis=1)
        caught_up = forward(draft, newer, middle.draft_cache.at(past + wanted - 1)).cache
        shares, own = layer_shares(read.seen), _Own(read.plan, tally.add(verdict, wanted, ~state.done))
        state = dataclasses.replace(state, target_cache=read.seen.cache, draft_cache=caught_up, keys=later, own=own)
        state = commit(state, verdict, shares, drafted=wanted, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(read.seen, shares, read.hidden, verdict)

    def cost(self, scenario: Scenario) -> Work:
        """Inner windows of the draft and of the target over few entries, and one dense pass."""
        wanted = tokens_ahead(scenario.rate, self.verified)
        # The target's own token comes with what is kept of others.
        given = sum(scenario.draft_rate**place for place in range(self.inner + 1))
        rounds = max(1.0, wanted / given)
        return Work(
            tokens=sum(scenario.rate**place for place in range(wanted + 1)),
            verified=self.verified + 1,
            steps=rounds * self.inner,
            own_steps=rounds,
            own_tokens=self.inner + 1,
            own_reads=self.reads.share_of(scenario.context),
        )
