"""What the backends have in common: the layout of grouped queries, and what surrounds the threshold of a selection."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

LOG2_E = math.log2(math.e)
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)

# Radix of the summation tree: 3 levels for 32k slots, so rounding errors add up over at most 3 * 32 additions.
SUM_RADIX = 32


def interpreted() -> bool:
    """Whether Pallas kernels run in Pallas's interpreter: on a CPU, where nothing else runs them."""
    return jax.default_backend() == "cpu"


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller: the only lengths that a tile of Triton has."""
    return 1 << (number - 1).bit_length()


def group_queries(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K T G H"]:
    """Puts the query heads that share a kv head side by side."""
    batch, tokens, heads, head_dim = q.shape
    return q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 1, 3, 4)


def ungroup(x: Float[Array, "B K T G *rest"]) -> Float[Array, "B T N *rest"]:
    """Back from grouped queries to the public layout."""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], *x.shape[4:])


def clean_scores(scores: jax.Array, valid: jax.Array | None, slots: int) -> jax.Array:
    """Float32 scores in [0, max / 2 / slots]: NaN, negative, subnormal and invalid ones become 0.

    Subnormals go because hardware that flushes them would compare them differently as numbers and as bits. The cap
    keeps sums of a row finite. Plain arithmetic, so that kernels call it on parts of rows.

    Args:
        scores: scores, or a part of them.
        valid: which of them count, of a shape that broadcasts; None: all.
        slots: scores in a whole row.
    """
    x = scores.astype(jnp.float32)
    keep = x >= FLOAT32_TINY
    if valid is not None:
        keep &= valid
    return jnp.where(keep, jnp.minimum(x, FLOAT32_MAX / 2 / slots), 0.0)


def leading(lengths: Int32[Array, " B"], rows: jax.Array) -> jax.Array:
    """A number per sequence with axes of 1, so that it broadcasts against `rows` [B, ...]."""
    return lengths.reshape(-1, *[1] * (rows.ndim - 1))


def row_sum(x: Float[Array, "*rows S"]) -> Float[Array, "*rows"]:
    """Sums the last axis as a tree: right to about 1e-6 for 128k addends, where a running sum would drift."""
    while x.shape[-1] > SUM_RADIX:
        padding = -x.shape[-1] % SUM_RADIX
        if padding:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        # Adding up columns, not rows, keeps the innermost axis long for vector units.
        x = x.reshape(*x.shape[:-1], SUM_RADIX, x.shape[-1] // SUM_RADIX).sum(axis=-2)
    total: jax.Array = x.sum(axis=-1)
    return total


def block_sums(
    scores: Float[Array, "B *layers K S"], lengths: Int32[Array, " B"], block_size: int
) -> Float[Array, "B *layers K P"]:
    """Clean scores of the blocks: each the sum over its valid slots."""
    *rows, slots = scores.shape
    clean = clean_scores(scores, jnp.arange(slots) < leading(lengths, scores), slots)
    padded = jnp.pad(clean, [*[(0, 0)] * len(rows), (0, -slots % block_size)])
    return padded.reshape(*rows, -1, block_size).sum(axis=-1)


def wanted_blocks(p: Float[Array, "*rows"], valid: Int[Array, "*#rows"]) -> Float[Array, "*rows"]:
    """How many blocks a nucleus by count wants of those that are valid; infinity stands for all, zeros included."""
    return jnp.where(p >= 1.0, jnp.inf, jnp.maximum(jnp.ceil(p * valid.astype(jnp.float32)), 1.0))


def recent_blocks(length: Any, block_size: int, num_recent: int) -> Any:
    """How many blocks the recent window has: those that touch the last `num_recent` of `length` slots."""
    if not num_recent:
        return length * 0
    first = jnp.maximum(length - num_recent, 0) // block_size
    return (length + block_size - 1) // block_size - first


def fit_mask(
    mask: Bool[Array, "B *layers K P"], lengths: Int32[Array, " B"], capacity: int, *, block_size: int, num_recent: int
) -> Bool[Array, "B *layers K P"]:
    """At most `capacity` of the chosen blocks: the recent window, and of those before it the first ones.

    So the sinks stay, and of the nucleus what does not fit between them and the window goes. A window that does not fit
    loses its first blocks.
    """
    if capacity >= mask.shape[-1]:
        return mask
    rank = jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
    count, recent = rank[..., -1:] + 1, recent_blocks(leading(lengths, mask), block_size, num_recent)
    is_recent = rank >= count - recent
    return mask & jnp.where(is_recent, rank >= count - capacity, rank < capacity - recent)


def mask_blocks(
    block_scores: Float[Array, "B *layers K P"],
    threshold: Float[Array, "B *layers K"],
    lengths: Int32[Array, " B"],
    *,
    block_size: int,
    num_sink: int,
    num_recent: int,
) -> Bool[Array, "B *layers K P"]:
    """The blocks at or above the threshold, the sinks and the recent window, as far as they are valid."""
    length = leading(lengths, block_scores)
    start = jnp.arange(block_scores.shape[-1]) * block_size
    chosen = block_scores >= threshold[..., None]
    chosen |= start < num_sink
    if num_recent:
        chosen |= start + block_size > length - num_recent
    return chosen & (start < length)
