"""Float32 oracles of every op, written for reading: dense, one idea per line, no care for speed or memory.

They take the same arguments as the public ops (api.py, which documents them) and check nothing. The efficient
implementations are tested against them, and they against float64 numpy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Int32

from specattn_kernels.types import AttentionOutput, SelectionPlan

FLOAT32_MAX = float(np.finfo(np.float32).max)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    visible: Bool[Array, "B N T S"],
    scale: float | Float[Array, ""] | None,
) -> AttentionOutput:
    """Softmax attention in float32 of every query over exactly the cache slots that `visible` allows it.

    Args:
        q: queries; query head n reads kv head n // (N / K).
        k: keys.
        v: values.
        visible: which slots each query may see; keys and values of slots that no query sees may be anything.
        scale: factor on the logits; H ** -0.5 if None.

    Returns:
        out, lse and scores. A query that sees nothing gets zeros and an lse of -inf.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[1]
    keys = jnp.repeat(k, group, axis=1).astype(jnp.float32)
    values = jnp.repeat(v, group, axis=1).astype(jnp.float32)
    seen = visible.any(axis=2)[..., None]  # zero weight times NaN would be NaN
    keys, values = jnp.where(seen, keys, 0.0), jnp.where(seen, values, 0.0)

    logits = jnp.einsum("btnh,bnsh->bnts", q.astype(jnp.float32), keys, precision="highest") * scale
    lse = jax.nn.logsumexp(logits, axis=-1, where=visible)
    weights = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0.0)
    out = jnp.einsum("bnts,bnsh->btnh", weights, values, precision="highest")
    return AttentionOutput(out.astype(q.dtype), lse.swapaxes(1, 2), weights.swapaxes(1, 2))


def causal_mask(lengths: Int32[Array, " B"], tokens: int, slots: int) -> Bool[Array, "B 1 T S"]:
    """Query t sits at slot lengths - T + t and sees the slots up to its own."""
    position = lengths[:, None] - tokens + jnp.arange(tokens)
    return (jnp.arange(slots) <= position[..., None])[:, None]


def plan_mask(plan: SelectionPlan, slots: int) -> Bool[Array, "B K S"]:
    """Which slots a plan selects."""
    entry_used = jnp.arange(plan.block_ids.shape[-1]) < plan.counts[..., None]
    block_of_slot = jnp.arange(slots) // plan.block_size
    hit = plan.block_ids[..., :, None] == block_of_slot
    return (hit & entry_used[..., :, None]).any(axis=-2)


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int32[Array, " B"],
    *,
    scale: float | Float[Array, ""] | None = None,
) -> AttentionOutput:
    """Oracle of `api.decode_attention`; always returns lse and scores."""
    visible = causal_mask(lengths, q.shape[1], k.shape[2])
    return attend(q, k, v, jnp.broadcast_to(visible, (q.shape[0], q.shape[2], q.shape[1], k.shape[2])), scale)


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    starts: Int32[Array, " B"],
    *,
    lengths: Int32[Array, " B"] | None = None,
    scale: float | Float[Array, ""] | None = None,
) -> AttentionOutput:
    """Oracle of `api.prefill_attention`; always returns lse and scores."""
    tokens, slots = q.shape[1], k.shape[2]
    visible = causal_mask(starts + tokens, tokens, slots)
    if lengths is not None:
        visible &= (jnp.arange(slots) < lengths[:, None])[:, None, None]
    return attend(q, k, v, jnp.broadcast_to(visible, (q.shape[0], q.shape[2], tokens, slots)), scale)


def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    plan: SelectionPlan,
    lengths: Int32[Array, " B"],
    *,
    scale: float | Float[Array, ""] | None = None,
    memory: Float[Array, "B K S"] | None = None,
) -> AttentionOutput:
    """Oracle of `api.sparse_decode_attention`; always returns lse, and scores over the cache slots."""
    tokens, slots, group = q.shape[1], k.shape[2], q.shape[2] // k.shape[1]
    plan = plan.take_layer()
    selected = jnp.repeat(plan_mask(plan, slots), group, axis=1)[:, :, None]
    is_new = (jnp.arange(slots) >= lengths[:, None] - tokens)[:, None, None]
    attended = attend(q, k, v, causal_mask(lengths, tokens, slots) & (selected | is_new), scale)
    if memory is None:
        return attended
    assert attended.scores is not None
    oldest = attended.scores[:, 0].reshape(q.shape[0], k.shape[1], group, slots).mean(axis=2)
    was_read = plan_mask(plan, slots) & ~is_new[:, 0]
    return attended._replace(memory=jnp.where(was_read, oldest.astype(memory.dtype), memory))


def score_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    lse: Float[Array, "B T N"],
    lengths: Int32[Array, " B"],
    *,
    scale: float | Float[Array, ""] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B K S"]:
    """Oracle of `api.score_cache`: every weight, of at most 1, the mean over a group, the largest over the tokens."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    valid = (jnp.arange(k.shape[2]) < lengths[:, None])[:, None]
    keys = jnp.where(valid[..., None], k.astype(jnp.float32), 0.0)
    queries = q.reshape(*q.shape[:2], k.shape[1], -1, q.shape[-1]).astype(jnp.float32)
    logits = jnp.einsum("btkgh,bksh->btkgs", queries, keys, precision="highest") * scale

    total = lse.reshape(queries.shape[:-1])[..., None]
    weights = jnp.where(total > -jnp.inf, jnp.minimum(jnp.exp(logits - total), 1.0), 0.0)
    largest = weights.mean(axis=3).max(axis=1)
    return jnp.where(valid, largest, 0.0).astype(dtype)


def top_p_threshold(
    scores: Float[Array, "*rows S"],
    p: Float[Array, ...] | float,
    *,
    lengths: Int[Array, ...] | int | None = None,
    method: str = "exact",
    steps: int = 10,
) -> Float[Array, "*rows"]:
    """Oracle of `api.top_p_threshold`: by sorting; the published bisection step by step."""
    slots = scores.shape[-1]
    valid = jnp.arange(slots) < (slots if lengths is None else jnp.asarray(lengths)[..., None])
    clean = jnp.nan_to_num(scores.astype(jnp.float32), nan=0.0)
    clean = jnp.where(valid, jnp.clip(clean, 0.0, FLOAT32_MAX / 2 / slots), 0.0)
    p = jnp.broadcast_to(jnp.asarray(p, jnp.float32), scores.shape[:-1])
    wanted = p * clean.sum(axis=-1)
    if method == "linear":
        low, high = jnp.zeros_like(p), clean.max(axis=-1)
        for _ in range(steps):
            middle = 0.5 * (low + high)
            enough = jnp.where(clean >= middle[..., None], clean, 0.0).sum(axis=-1) >= wanted
            low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle)
        threshold = low
    else:
        descending = jnp.sort(clean, axis=-1, descending=True)
        reached = jnp.cumsum(descending, axis=-1) >= wanted[..., None]
        last_needed = jnp.where(reached.any(axis=-1), reached.argmax(axis=-1), slots - 1)
        threshold = jnp.take_along_axis(descending, last_needed[..., None], axis=-1)[..., 0]
    return jnp.where(p >= 1.0, 0.0, threshold)


def count_threshold(
    scores: Float[Array, "*rows P"], p: Float[Array, ...] | float, valid: Int[Array, ...]
) -> Float[Array, "*rows"]:
    """The threshold of the share p of a row's valid blocks, by sorting; scores are clean, and 0 is never selected."""
    p = jnp.broadcast_to(jnp.asarray(p, jnp.float32), scores.shape[:-1])
    valid = jnp.broadcast_to(valid, p.shape)
    clean = jnp.minimum(jnp.where(scores >= np.finfo(np.float32).tiny, scores, 0.0), FLOAT32_MAX / 2 / scores.shape[-1])
    last = jnp.clip(jnp.ceil(p * valid.astype(jnp.float32)).astype(jnp.int32) - 1, 0, scores.shape[-1] - 1)
    descending = jnp.sort(clean, axis=-1, descending=True)
    least_positive = jnp.where(clean > 0, clean, jnp.inf).min(axis=-1)
    threshold = jnp.maximum(jnp.take_along_axis(descending, last[..., None], axis=-1)[..., 0], least_positive)
    return jnp.where(p >= 1.0, 0.0, threshold)


def compact_blocks(mask: Bool[Array, "B K P"], *, block_size: int) -> SelectionPlan:
    """Oracle of `api.compact_blocks`: selected blocks first, each group in ascending order."""
    selected_first = jnp.argsort(~mask, axis=-1, stable=True)
    return SelectionPlan(selected_first.astype(jnp.int32), mask.sum(axis=-1, dtype=jnp.int32), block_size)


def select_blocks(
    scores: Float[Array, "B K S"],
    p: Float[Array, ...] | float,
    lengths: Int32[Array, " B"],
    *,
    block_size: int = 1,
    num_sink: int = 0,
    num_recent: int = 0,
    method: str = "exact",
    steps: int = 10,
    measure: str = "mass",
    capacity: int | None = None,
) -> SelectionPlan:
    """Oracle of `api.select_blocks`: what each of three reasons selects, their union, and what there is room for."""
    slots = scores.shape[-1]
    length = lengths[:, None]
    valid = jnp.arange(slots) < length[..., None]
    clean = jnp.where(valid, jnp.nan_to_num(scores.astype(jnp.float32), nan=0.0), 0.0)
    start = jnp.arange(0, slots, block_size)
    slot_in_block = jnp.arange(slots)[:, None] // block_size == jnp.arange(len(start))
    block_scores = jnp.einsum("bks,sp->bkp", clean, slot_in_block.astype(jnp.float32), precision="highest")
    valid_blocks = -(-length // block_size)
    if measure == "mass":
        threshold = top_p_threshold(block_scores, p, lengths=valid_blocks, method=method, steps=steps)
    else:
        threshold = count_threshold(block_scores, p, valid_blocks)

    in_nucleus = block_scores >= threshold[..., None]
    is_sink = start < num_sink
    is_recent = (num_recent > 0) & (start + block_size > length[..., None] - num_recent)
    chosen = (in_nucleus | is_sink | is_recent) & (start < length[..., None])

    capacity = len(start) if capacity is None else capacity
    last_recent = chosen & is_recent & (jnp.cumsum((chosen & is_recent)[..., ::-1], axis=-1)[..., ::-1] <= capacity)
    room = capacity - last_recent.sum(axis=-1, keepdims=True)
    others = chosen & ~is_recent
    plan = compact_blocks(last_recent | (others & (jnp.cumsum(others, axis=-1) <= room)), block_size=block_size)
    return SelectionPlan(plan.block_ids[..., :capacity], plan.counts, block_size)


def merge_states(
    out_a: Float[Array, "*rows H"],
    lse_a: Float[Array, "*rows"],
    out_b: Float[Array, "*rows H"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
    """Oracle of `api.merge_states`: the average of the two outputs, weighted by the mass each of them saw."""
    lse = jnp.logaddexp(lse_a, lse_b)
    weight_a = jnp.where(lse_a == -jnp.inf, 0.0, jnp.exp(lse_a - lse))[..., None]
    weight_b = jnp.where(lse_b == -jnp.inf, 0.0, jnp.exp(lse_b - lse))[..., None]
    out = weight_a * out_a.astype(jnp.float32) + weight_b * out_b.astype(jnp.float32)
    return out.astype(out_a.dtype), lse
