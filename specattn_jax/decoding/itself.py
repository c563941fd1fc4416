"""Self-speculation: the target drafts for itself, reading a small share of its own cache."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Key

from specattn_jax.decoding.judging import Judge, judge_exactly
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
from specattn_jax.decoding.sampling import choose
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.selection.own import OwnReads, attend_by
from specattn_jax.selection.reads import layer_shares


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SelfSpeculative:
    """The target drafts over what its last dense pass looked at most, and verifies over everything.

    Weights and cache are shared: what drafting appends to the cache, verification writes anew. What the strategy keeps
    for itself is the plan of what drafting reads. To choose it takes half a read of the cache, so that a plan may serve
    several windows.

    Attributes:
        settings: how tokens are drawn, and where sequences end.
        window: W, tokens drafted per window.
        reads: how much of its cache the target reads while it drafts.
        every: windows after which it chooses anew what it reads.
        judge: decides what is kept; another one than the exact rule is for measuring.
    """

    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings)
    window: int = 5
    reads: OwnReads = dataclasses.field(default_factory=OwnReads)
    every: int = 4
    judge: Judge = judge_exactly

    name: ClassVar[str] = "self"
    needs_draft: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    drafter: ClassVar[Drafter] = Drafter.TARGET
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.every < 1:
            raise UserError(f"every is {self.every}; expected at least 1 window.")

    @property
    def _room(self) -> int:
        """Most places that are written behind a past whose keys are scored, until they are again."""
        return (self.every + 1) * (self.window + 1)

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Reads the newest token densely, to see what it looks at; the first window reads it again."""
        read = read_and_refresh(models, state, newest(state), state.target_cache, self.reads, self._room)
        return dataclasses.replace(state, target_cache=read.seen.cache, draft_cache=None, own=read.plan)

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One window: draft sparsely, read densely, accept or reject, roll back."""
        for_draft, for_verdict, later = next_keys(state, 3)
        sampling = self.settings.sampling
        attend = attend_by(state.own)

        def draft(
            carry: tuple[KVCache, Int32[Array, " B"]], keys: Key[Array, " B"]
        ) -> tuple[tuple[KVCache, Int32[Array, " B"]], tuple[Array, Array | None]]:
            cache, last = carry
            read = forward(models.target, last[:, None], cache, attend)
            token, probs = choose(keys, models.target.logits(read.hidden[:, -1]), sampling)
            return (read.cache, token), (token, probs)

        step_keys = jnp.swapaxes(jax.vmap(lambda key: jax.random.split(key, self.window))(for_draft), 0, 1)
        (cache, _), drafts = jax.lax.scan(draft, (state.target_cache, state.last[:, 1]), step_keys)
        drafted, probs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), drafts)

        tokens = jnp.concatenate([newest(state), drafted], axis=1)
        # All sequences that still decode have had as many windows as the longest, whoever is beside them.
        due = jnp.max(state.statistics.windows) % self.every == self.every - 1 if self.every > 1 else None
        read = read_and_refresh(models, state, tokens, cache, self.reads, self._room, due=due, before=state.own)
        state, logits = target_logits(models, state, read.hidden, drafted, sampling)
        verdict = self.judge(for_verdict, drafted, probs, logits, sampling, state.statistics.windows)
        shares = layer_shares(read.seen)
        state = dataclasses.replace(state, target_cache=read.seen.cache, keys=later, own=read.plan)
        state = commit(state, verdict, shares, drafted=self.window, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(read.seen, shares, read.hidden, verdict)

    def cost(self, scenario: Scenario) -> Work:
        """W sparse steps of the target, one dense pass, and in some windows its keys once more."""
        return Work(
            tokens=scenario.accepted + 1.0,
            verified=self.window + 1,
            own_steps=self.window,
            own_reads=self.reads.share_of(scenario.context),
            own_scores=1 / self.every,
        )
