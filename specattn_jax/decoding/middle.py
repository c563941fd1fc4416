"""The middle level of a hierarchy: windows of a draft, verified by the target over few entries of its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key
from specattn_kernels import SelectionPlan

from specattn_jax.decoding.drafting import draft_window
from specattn_jax.decoding.protocol import Models, drafting
from specattn_jax.decoding.sampling import Sampling, choose, token_distribution, verify
from specattn_jax.decoding.state import DecodeState
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.selection.own import attend_by
from specattn_jax.selection.reads import ReadEverything


class Proposed(NamedTuple):
    """What inner windows gave.

    Attributes:
        target_cache: with leftovers behind the past.
        draft_cache: likewise; it has read the proposed tokens but for the last two perhaps.
        tokens: the proposed tokens; beyond `filled` meaningless.
        probs: the distributions that they were drawn from, those of the target over few entries; None when greedy.
        filled: how many there are.
        round: inner windows.
    """

    target_cache: KVCache
    draft_cache: KVCache
    tokens: Int32[Array, "B places"]
    probs: Float[Array, "B places V"] | None
    filled: Int32[Array, " B"]
    round: Int32[Array, ""]


def propose(
    models: Models,
    state: DecodeState,
    keys: Key[Array, " B"],
    wanted: Int32[Array, " B"],
    *,
    plan: SelectionPlan,
    sampling: Sampling,
    inner: int,
    most: int,
) -> Proposed:
    """Inner windows, until every sequence has as many tokens as are wanted; those that have wait.

    Args:
        models: target and draft.
        state: where decoding stands.
        keys: one per sequence.
        wanted: tokens to propose; what is more is forgotten.
        plan: what the target reads.
        sampling: how tokens are drawn.
        inner: tokens that the draft proposes at a time.
        most: the largest `wanted` there can be.
    """
    draft, draft_cache = drafting(models, state)
    past, vocab = state.target_cache.lengths, models.target.config.vocab_size
    batch, places = len(past), most + inner + 1
    write: Any = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))

    def advance(middle: Proposed) -> Proposed:
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
            window=inner,
            choose=lambda _, key, logits: choose(key, logits, sampling),
            vocab_size=vocab,
            sampling=sampling,
        )
        tokens = jnp.concatenate([last[:, 1:], drafted.tokens], axis=1)
        read = forward(models.target, tokens, middle.target_cache.at(have), attend_by(plan))
        logits = models.target.logits(read.hidden)
        verdict = verify(now[:, 1], drafted.tokens, drafted.probs, logits, sampling)
        probs = middle.probs
        if probs is not None:
            probs = write(probs, token_distribution(logits, sampling), middle.filled)
        return Proposed(
            read.cache,
            drafted.cache,
            write(middle.tokens, verdict.tokens, middle.filled),
            probs,
            jnp.minimum(middle.filled + verdict.accepted + 1, wanted),
            middle.round + 1,
        )

    first = Proposed(
        state.target_cache,
        draft_cache.at(past - 1),
        jnp.zeros((batch, places), jnp.int32),
        None if sampling.greedy else jnp.zeros((batch, places, vocab), jnp.float32),
        # Nobody waits for a sequence that is done.
        jnp.where(state.done, wanted, 0),
        jnp.int32(0),
    )
    return jax.lax.while_loop(lambda middle: jnp.any(middle.filled < wanted), advance, first)
