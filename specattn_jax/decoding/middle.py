"""The middle level of a hierarchy: short windows, verified by the target over few entries of its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key
from specattn_kernels import SelectionPlan

from specattn_jax.decoding.judging import Judge, judge_exactly
from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.sampling import Sampling, token_distribution
from specattn_jax.decoding.state import DecodeState
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.selection.own import attend_by


class Standing(NamedTuple):
    """Where the middle level stands before an inner window.

    Attributes:
        have: how many tokens lie before each sequence's newest one.
        last: the last two tokens, the newest second.
        tokens: what the middle level gave since the last dense pass, up to the newest; beyond that meaningless.
    """

    have: Int32[Array, " B"]
    last: Int32[Array, "B 2"]
    tokens: Int32[Array, "B places"]


class InnerDraft(NamedTuple):
    """What the lowest level proposes in an inner window.

    Attributes:
        tokens: the proposed tokens.
        probs: the distributions that they were drawn from; None when greedy.
        carried: what it carries to the next inner window, shaped as what it was given.
    """

    tokens: Int32[Array, "B inner"]
    probs: Float[Array, "B inner V"] | None
    carried: Any


# The lowest level: proposes the tokens of an inner window. Takes what it carries from one to the next, where the middle
# level stands, and a key per sequence.
InnerDrafter: TypeAlias = Callable[[Any, Standing, Key[Array, " B"]], InnerDraft]


class Proposed(NamedTuple):
    """What inner windows gave.

    Attributes:
        target_cache: with leftovers behind the past.
        carried: what the lowest level carries.
        tokens: the proposed tokens; beyond `filled` meaningless.
        probs: the distributions that they were drawn from, those of the target over few entries; None when greedy.
        filled: how many there are.
        round: inner windows, until the slowest sequence had what it wanted.
        windows: those of each sequence.
        accepted: tokens that these accepted of the lowest level.
    """

    target_cache: KVCache
    carried: Any
    tokens: Int32[Array, "B places"]
    probs: Float[Array, "B places V"] | None
    filled: Int32[Array, " B"]
    round: Int32[Array, ""]
    windows: Int32[Array, " B"]
    accepted: Int32[Array, " B"]


def propose(
    models: Models,
    state: DecodeState,
    keys: Key[Array, " B"],
    wanted: Int32[Array, " B"],
    draft: InnerDrafter,
    carried: Any,
    *,
    plan: SelectionPlan,
    sampling: Sampling,
    inner: int,
    most: int,
    judge: Judge = judge_exactly,
) -> Proposed:
    """Inner windows, until every sequence has as many tokens as are wanted; those that have wait.

    Args:
        models: with the target.
        state: where decoding stands.
        keys: one per sequence.
        wanted: tokens to propose; what is more is forgotten.
        draft: the lowest level.
        carried: what it carries at first.
        plan: what the target reads.
        sampling: how tokens are drawn.
        inner: tokens that the lowest level proposes at a time.
        most: the largest `wanted` there can be.
        judge: decides what of an inner window is kept.
    """
    past, vocab = state.target_cache.lengths, models.target.config.vocab_size
    batch, places = len(past), most + inner + 1
    write: Any = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))

    def advance(middle: Proposed) -> Proposed:
        now = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, middle.round)))(keys)
        known = jnp.concatenate([state.last, middle.tokens], axis=1)
        last = jnp.take_along_axis(known, middle.filled[:, None] + jnp.arange(2), axis=1)
        have = past + middle.filled
        drafted = draft(middle.carried, Standing(have, last, middle.tokens), now[:, 0])
        tokens = jnp.concatenate([last[:, 1:], drafted.tokens], axis=1)
        waits, cache = middle.filled >= wanted, middle.target_cache.at(have)
        read = forward(models.target, tokens, cache.waiting(waits), attend_by(plan))
        logits = models.target.logits(read.hidden)
        verdict = judge(now[:, 1], drafted.tokens, drafted.probs, logits, sampling, middle.windows)
        probs = middle.probs
        if probs is not None:
            probs = write(probs, token_distribution(logits, sampling), middle.filled)
        return Proposed(
            read.cache.waiting(cache.waits),
            drafted.carried,
            write(middle.tokens, verdict.tokens, middle.filled),
            probs,
            jnp.minimum(middle.filled + verdict.accepted + 1, wanted),
            middle.round + 1,
            middle.windows + ~waits,
            middle.accepted + jnp.where(waits, 0, verdict.accepted),
        )

    none = jnp.zeros_like(wanted)
    first = Proposed(
        state.target_cache,
        carried,
        jnp.zeros((batch, places), jnp.int32),
        None if sampling.greedy else jnp.zeros((batch, places, vocab), jnp.float32),
        # Nobody waits for a sequence that is done.
        jnp.where(state.done, wanted, 0),
        jnp.int32(0),
        none,
        none,
    )
    return jax.lax.while_loop(lambda middle: jnp.any(middle.filled < wanted), advance, first)
