"""Float64 numpy oracles, loops and sorts, that the float32 reference is tested against."""

import numpy as np


def attend(q, k, v, visible, scale=None):
    """q [B, T, N, H], k and v [B, K, S, H], visible [B, N, T, S] -> out, lse [B, T, N], weights [B, T, N, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, tokens, heads, head_dim = q.shape
    group, slots = heads // k.shape[1], k.shape[2]
    out = np.zeros_like(q)
    lse = np.full((batch, tokens, heads), -np.inf)
    weights = np.zeros((batch, tokens, heads, slots))
    for b, t, n in np.ndindex(batch, tokens, heads):
        seen = np.flatnonzero(visible[b, n, t])
        if seen.size:
            logits = k[b, n // group, seen] @ q[b, t, n] * (head_dim**-0.5 if scale is None else scale)
            lse[b, t, n] = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            weights[b, t, n, seen] = np.exp(logits - lse[b, t, n])
            out[b, t, n] = weights[b, t, n, seen] @ v[b, n // group, seen]
    return out, lse, weights


def visible_slots(q, k, lengths, plan=None):
    """[B, N, T, S]: what each query may see, with the past restricted to the blocks of a plan if there is one."""
    batch, tokens, heads, _ = q.shape
    kv_heads, slots = k.shape[1:3]
    visible = np.zeros((batch, heads, tokens, slots), bool)
    for b, n, t in np.ndindex(batch, heads, tokens):
        first_new = int(lengths[b]) - tokens
        past = np.ones(slots, bool)
        if plan is not None:
            past[:] = False
            kv_head = n // (heads // kv_heads)
            for block in np.asarray(plan.block_ids)[b, kv_head, : int(plan.counts[b, kv_head])]:
                past[block * plan.block_size : (block + 1) * plan.block_size] = True
        for slot in range(slots):
            visible[b, n, t, slot] = slot <= first_new + t and (slot >= first_new or past[slot])
    return visible


def nucleus_size(row, p):
    """Fewest scores, taken from the largest, whose sum reaches p of the total; ties of the last are not counted."""
    descending = np.sort(np.asarray(row, np.float64))[::-1]
    return int(np.searchsorted(np.cumsum(descending), p * descending.sum()) + 1)


def linear_threshold(row, p, steps=10):
    """The published bisection, masses in float64; thresholds in float32, since scores may lie right on them."""
    half, low, high = np.float32(0.5), np.float32(0.0), np.asarray(row, np.float32).max()
    row = np.asarray(row, np.float64)
    for _ in range(steps):
        middle = half * (low + high)
        if row[row >= middle].sum() >= p * row.sum():
            low = middle
        else:
            high = middle
    return low
