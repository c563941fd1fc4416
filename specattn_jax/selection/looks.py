"""How tokens looked at a cache, and what that says of its entries: what selections watch, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32
from specattn_kernels import SelectionPlan

from specattn_jax.models.cache import KVCache, Look
from specattn_jax.models.forward import Attend, Attended


def attend_and_look(plan: SelectionPlan | None) -> Attend:
    """Attends as a plan of all layers says, without one to everything; notes how tokens looked at what they read."""

    def attend(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> Attended:
        own = None if plan is None else plan.at_layer(layer)
        result = cache.attend(layer, q, own, return_lse=True)
        assert result.lse is not None
        return Attended(result.out, Look(q, result.lse))

    return attend


def newest_look(looks: Sequence[Look]) -> Look:
    """One look for all layers, `[M, B, N, H]`, each with the newest token alone."""
    newest: Look = jax.tree.map(lambda *layers: jnp.stack([layer[:, -1] for layer in layers]), *looks)
    return newest


def note_look(watched: Look, looks: Sequence[Look], step: Int32[Array, ""]) -> Look:
    """The looks of a window's steps, `[W, M, B, N, H]`, with that of one more step."""
    # A plain update: `at[step].set` would first look whether the step is inside, in several kernels of its own.
    noted: Look = jax.tree.map(
        lambda steps, one: jax.lax.dynamic_update_index_in_dim(steps, one, step, 0), watched, newest_look(looks)
    )
    return noted


def window_looks(watched: Look) -> list[Look]:
    """One look per layer: the steps of a window become its tokens."""
    num_layers = watched.lse.shape[1]
    return [jax.tree.map(lambda x, i=layer: jnp.swapaxes(x[:, i], 0, 1), watched) for layer in range(num_layers)]


def score_looks(looks: Sequence[Any], cache: KVCache, past: Int32[Array, " B"]) -> Float[Array, "B M K S"]:
    """Largest attention of every kv head over the tokens of a look per layer, in the cache's dtype.

    Where a draft read sparsely all weights of a query are too large by what it left out, but none is above 1: it may be
    the answer itself that was left out, which else would outweigh a window's other tokens.
    """
    scores = jnp.zeros((past.shape[0], len(looks), cache.num_kv_heads, cache.num_slots), cache.dtype)
    for layer, look in enumerate(looks):
        # In place, where stacking so many arrays would be slow.
        scores = jax.lax.dynamic_update_index_in_dim(scores, cache.score(layer, look, past), layer, axis=1)
    return scores
