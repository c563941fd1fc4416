"""Two levels: a draft, the target over what it looked at most, and only for what that kept the target over everything.

Source: the hierarchy of TriForce (arXiv 2404.11912).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from specattn_jax.decoding.drafting import draft_window
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
from specattn_jax.decoding.sampling import choose, token_distribution, verify
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.selection.own import OwnReads, attend_by
from specattn_jax.selection.reads import ReadEverything, layer_shares


class _Middle(NamedTuple):
    """Between two inner windows: `filled` tokens of the middle level, with their distributions, wait to be verified."""

    target_cache: KVCache
    draft_cache: KVCache
    tokens: Int32[Array, "B places"]
    probs: Float[Array, "B places V"] | None
    filled: Int32[Array, " B"]
    round: Int32[Array, ""]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hierarchical:
    """The draft proposes, the target over selected entries keeps some, the target over everything verifies those.

    Inner windows follow each other until every sequence has `verified` tokens; what is more is forgotten. As the inner
    rule is exact, they are drawn from the target's sparse distribution, which is kept for the outer rule.

    Attributes:
        settings: how tokens are drawn, and where sequences end.
        window: most places that a window writes behind the newest token: those that are verified densely, and those of
            one inner window.
        inner: tokens that the draft proposes at a time.
        reads: how much of its cache the middle level reads.
    """

    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings)
    window: int = 11
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
        """Tokens of the middle level that the dense pass verifies."""
        return self.window - self.inner

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Reads the newest token densely, to see what it looks at; the first window reads it again."""
        _, draft_cache = drafting(models, state)
        read = read_and_refresh(models, state, newest(state), state.target_cache, self.reads, self.window)
        cache = draft_cache.at(read.seen.past - 1)
        return dataclasses.replace(state, target_cache=read.seen.cache, draft_cache=cache, own=read.plan)

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One window: inner windows, one dense pass over what they gave, and rollback of both caches."""
        draft, _ = drafting(models, state)
        for_inner, for_verdict, later = next_keys(state, 3)
        past, sampling, wanted = state.target_cache.lengths, self.settings.sampling, self.verified
        middle = self._propose(models, state, for_inner)
        drafted = middle.tokens[:, :wanted]
        probs = None if middle.probs is None else middle.probs[:, :wanted]

        tokens = jnp.concatenate([newest(state), drafted], axis=1)
        read = read_and_refresh(models, state, tokens, middle.target_cache, self.reads, self.window)
        state, logits = target_logits(models, state, read.hidden, drafted, sampling)
        verdict = verify(for_verdict, drafted, probs, logits, sampling)
        # If all are kept, the draft has to have read all of them but the last.
        caught_up = forward(draft, tokens[:, -2:], middle.draft_cache.at(past + wanted - 1)).cache
        shares = layer_shares(read.seen)
        state = dataclasses.replace(
            state, target_cache=read.seen.cache, draft_cache=caught_up, keys=later, own=read.plan
        )
        state = commit(state, verdict, shares, drafted=wanted, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(read.seen, shares, read.hidden, verdict)

    def _propose(self, models: Models, state: DecodeState, keys: Key[Array, " B"]) -> _Middle:
        """Inner windows, until every sequence has as many tokens as are verified; those that have wait."""
        draft, draft_cache = drafting(models, state)
        past, sampling = state.target_cache.lengths, self.settings.sampling
        attend, vocab, batch = attend_by(state.own), models.target.config.vocab_size, state.done.shape[0]
        places = self.window + 1
        write: Any = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))

        def advance(middle: _Middle) -> _Middle:
            now = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, middle.round)))(keys)
            known = jnp.concatenate([state.last, middle.tokens], axis=1)
            last = jnp.take_along_axis(known, middle.filled[:, None] + jnp.arange(2), axis=1)
            have = past + middle.filled
            drafted = draft_window(
                draft,
                middle.draft_cache.at(have - 1),
                last,
                now[:, 0],
                ReadEverything(),
                (),
                window=self.inner,
                choose=lambda _, key, logits: choose(key, logits, sampling),
                vocab_size=vocab,
                sampling=sampling,
            )
            tokens = jnp.concatenate([last[:, 1:], drafted.tokens], axis=1)
            read = forward(models.target, tokens, middle.target_cache.at(have), attend)
            logits = models.target.logits(read.hidden)
            verdict = verify(now[:, 1], drafted.tokens, drafted.probs, logits, sampling)
            probs = middle.probs
            if probs is not None:
                probs = write(probs, token_distribution(logits, sampling), middle.filled)
            return _Middle(
                read.cache,
                drafted.cache,
                write(middle.tokens, verdict.tokens, middle.filled),
                probs,
                jnp.minimum(middle.filled + verdict.accepted + 1, self.verified),
                middle.round + 1,
            )

        first = _Middle(
            state.target_cache,
            draft_cache.at(past - 1),
            jnp.zeros((batch, places), jnp.int32),
            None if sampling.greedy else jnp.zeros((batch, places, vocab), jnp.float32),
            # Nobody waits for a sequence that is done.
            jnp.where(state.done, self.verified, 0),
            jnp.int32(0),
        )
        return jax.lax.while_loop(lambda middle: jnp.any(middle.filled < self.verified), advance, first)

    def cost(self, scenario: Scenario) -> Work:
        """Inner windows of the draft and of the target over few entries, and one dense pass."""
        # The target's own token comes with what a round keeps of the draft's.
        kept = 1.0 + sum(scenario.draft_rate**place for place in range(1, self.inner + 1))
        rounds = max(1.0, self.verified / kept)
        return Work(
            tokens=min(scenario.accepted, self.verified) + 1.0,
            verified=self.verified + 1,
            steps=rounds * self.inner,
            own_steps=rounds,
            own_tokens=self.inner + 1,
            own_reads=self.reads.share_of(scenario.context),
        )
