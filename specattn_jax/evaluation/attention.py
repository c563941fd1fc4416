"""What of its own attention a layer saw: measured densely beside sparse reading, as evaluation may."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32
from specattn_kernels import SelectionPlan

from specattn_jax.models.cache import KVCache
from specattn_jax.selection.reads import past_mask


def mass_read(layer: int, q: Float[Array, "B T N H"], cache: KVCache, plan: SelectionPlan | None) -> Float[Array, " B"]:
    """Share of the full attention mass that lies on what the plan reads, averaged over tokens and heads.

    Args:
        layer: which layer.
        q: queries of the T tokens behind the cache's lengths.
        cache: holds them.
        plan: what they read of the past; None is everything.
    """
    if plan is None:
        return jnp.ones(cache.lengths.shape, jnp.float32)
    sparse = cache.attend(layer, q, plan, return_lse=True).lse
    whole = cache.attend(layer, q, return_lse=True).lse
    assert sparse is not None
    assert whole is not None
    return jnp.mean(jnp.exp(sparse - whole), axis=(1, 2))


def attention_read(
    layer: int,
    q: Float[Array, "B T N H"],
    cache: KVCache,
    plan: SelectionPlan | None,
    tokens: int | Int32[Array, ""] | None = None,
) -> Float[Array, "B K S"]:
    """The attention that verification has seen: softmax over what was read alone, 0 elsewhere.

    Averaged over the heads that share a kv head, then the largest over the T tokens. Computed densely and masked
    afterwards.

    Args:
        layer: which layer.
        q: queries of the T tokens behind the cache's lengths.
        cache: holds them.
        plan: what they read of the past; None is everything.
        tokens: how many of them count, from the first on; None is all.
    """
    scores = cache.attend(layer, q, return_scores=True).scores
    assert scores is not None
    counts = True if tokens is None else jnp.arange(q.shape[1])[:, None, None] < tokens
    slots, past = cache.num_slots, cache.lengths
    grouped = scores.reshape(*scores.shape[:2], cache.num_kv_heads, -1, slots)
    if plan is not None:
        fresh = jnp.arange(slots) >= past[:, None, None]
        grouped = grouped * (past_mask(plan, past, cache) | fresh)[:, None, :, None]
        grouped = grouped / jnp.sum(grouped, axis=-1, keepdims=True)
    return jnp.max(jnp.where(counts, jnp.mean(grouped, axis=3), 0.0), axis=1)


def remember(
    before: Float[Array, "B K S"], seen: Float[Array, "B K S"], decay: float | Float[Array, ""]
) -> Float[Array, "B K S"]:
    """Attention as last seen: what has some now replaces it, the rest decays."""
    return jnp.where(seen > 0, seen, decay * before)
