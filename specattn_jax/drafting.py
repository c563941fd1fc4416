"""The draft's part of a window: W tokens one after the other, and what its attention says about the target's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray
from specattn_kernels import Implementation, SelectionPlan

from specattn_jax.cache import KVCache
from specattn_jax.config import ModelConfig
from specattn_jax.model import LanguageModel, Look, forward
from specattn_jax.sampling import Sampling, choose, match_vocabulary
from specattn_jax.selection import DraftScores, Selection


class Drafted(NamedTuple):
    """What W draft steps produced.

    Attributes:
        tokens: the drafted tokens.
        probs: the distributions they were drawn from, over the target's vocabulary; None when greedy.
        cache: the draft's cache, lengths unchanged.
        scores: what the draft's attention says about the target's; None without a selector.
        next_plan: what the draft reads in the next window; None is everything.
    """

    tokens: Int32[Array, "B W"]
    probs: Float[Array, "B W V"] | None
    cache: KVCache
    scores: DraftScores | None
    next_plan: SelectionPlan | None = None


def draft_window(
    draft: LanguageModel,
    cache: KVCache,
    last: Int32[Array, "B 2"],
    keys: PRNGKeyArray,
    selector: Selection | None,
    *,
    window: int,
    sampling: Sampling,
    vocab_size: int,
    plan: SelectionPlan | None = None,
    forced: Int32[Array, "B W"] | None = None,
    implementation: Implementation | None = None,
) -> Drafted:
    """Drafts W tokens, one after the other, collecting scores on the way.

    Args:
        draft: the draft.
        cache: what it has read; its lengths exclude the two tokens in `last`.
        last: the last two committed tokens.
        keys: one key per sequence.
        selector: turns attention into scores, or None.
        window: W.
        sampling: how tokens are drawn.
        vocab_size: the target's V.
        plan: what the draft reads, kv head by kv head of all its layers; None is everything.
        forced: tokens to take instead of the draft's own, for teacher-forced evaluation.
        implementation: backend of the attention ops; None lets the library choose.
    """
    step_keys = jnp.swapaxes(jax.vmap(lambda key: jax.random.split(key, window))(keys), 0, 1)
    imposed = None if forced is None else forced.T

    choices = _of_layers(plan, draft.config)
    scores_windows = selector is not None and selector.scores_windows

    def step(
        read: _DraftState, step_input: tuple[PRNGKeyArray, Int32[Array, " B"] | None]
    ) -> tuple[_DraftState, _DraftedToken]:
        step_keys, token = step_input
        out = forward(
            draft,
            read.last,
            read.cache,
            plans=choices,
            observe_layers=selector.observed_layers if selector is not None else (),
            observe=selector.observe if selector is not None else None,
            keep_looks=scores_windows,
            implementation=implementation,
        )
        logits = match_vocabulary(draft.logits(out.hidden[:, -1]), vocab_size)
        own, probs = choose(step_keys, logits, sampling)
        token = own if token is None else token
        scores = read.scores
        if selector is not None and scores is not None:
            scores = selector.update(scores, out.observed, out.cache.lengths)
        moved = out.cache.at_lengths(read.cache.lengths + 1)
        last = jnp.stack([read.last[:, 1], token], axis=1)
        return _DraftState(moved, last, scores), _DraftedToken(token, probs, _newest(out.looks))

    scores = None
    if selector is not None and not scores_windows:
        scores = selector.start(last.shape[0], cache.num_slots, draft.dtype)
    state, drafted = jax.lax.scan(step, _DraftState(cache, last, scores), (step_keys, imposed))
    scores, next_plan, past = state.scores, None, cache.lengths + 1
    if selector is not None and drafted.looks is not None:
        layers = range(draft.config.num_layers)
        looks = [jax.tree.map(lambda x, i=i: jnp.swapaxes(x[:, i], 0, 1), drafted.looks) for i in layers]
        scores = selector.score(looks, state.cache, past, implementation)
        next_plan = selector.draft_plan(scores, past, window)
    tokens, probs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (drafted.token, drafted.probs))
    return Drafted(tokens, probs, state.cache.at_lengths(cache.lengths), scores, next_plan)


def _newest(looks: tuple[Look, ...]) -> Look | None:
    """How all layers looked at the cache for the newest token, one array for all of them; None without looks."""
    if not looks:
        return None
    return jax.tree.map(lambda *layers: jnp.stack([layer[:, -1] for layer in layers]), *looks)


def _of_layers(plan: SelectionPlan | None, config: ModelConfig) -> tuple[SelectionPlan, ...] | None:
    """The plans of all layers, from one for all of their kv heads."""
    if plan is None:
        return None
    return tuple(plan.at_layer(index) for index in range(config.num_layers))


class _DraftedToken(NamedTuple):
    """What one draft step gives: the token, its distribution, and how the layers looked at the cache for it."""

    token: Int32[Array, " B"]
    probs: Float[Array, "B V"] | None
    looks: Look | None


class _DraftState(NamedTuple):
    """Between two draft steps.

    Attributes:
        cache: what was read; its lengths exclude the last two tokens.
        last: the last two tokens. The first of them was read before, but for the first step perhaps.
        scores: what attention said so far, where it is noted step by step.
    """

    cache: KVCache
    last: Int32[Array, "B 2"]
    scores: DraftScores | None
