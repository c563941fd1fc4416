"""Prefill attention in plain JAX: blocks of queries against chunks of the cache, with a running softmax.

Each block of queries walks the cache from slot 0 to its own last slot and no further, so that slots which are not in
use cost nothing and no array has both a T and an S axis. Sequences are taken one after the other: each has bounds of
its own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int32

from specattn_kernels.common import group_queries, ungroup
from specattn_kernels.types import AttentionOutput


class Tile(NamedTuple):
    """Queries of one block and slots of one chunk."""

    tokens: int
    slots: int


# Measured on two cores: chunks of 256 slots take a tenth longer at 8,192 tokens and are as fast at 2,048; 1,024 slots
# are slower at both. Elsewhere a step has to be worth starting: on an H100 the other size takes 3.1 ms (float32, 32
# heads, 2,048 tokens), and small ones a third more.
CPU_TILE = Tile(256, 512)
TILE = Tile(512, 2048)


class _Softmax(NamedTuple):
    """A running softmax of rows [K, R]: weighted values [K, R, H], maximum and sum of exponentials, all float32."""

    acc: jax.Array
    top: jax.Array
    total: jax.Array


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    starts: Int32[Array, " B"],
    limits: Int32[Array, " B"],
    *,
    scale: float | Float[Array, ""],
    return_lse: bool = False,
) -> AttentionOutput:
    """Attention of many new tokens over the cache, see `api.prefill_attention`."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group = heads // kv_heads
    tile = CPU_TILE if jax.default_backend() == "cpu" else TILE
    block, chunk = min(tile.tokens, tokens), min(tile.slots, slots)
    blocks = -(-tokens // block)
    queries = jnp.pad(group_queries(q, kv_heads), ((0, 0), (0, 0), (0, blocks * block - tokens), (0, 0), (0, 0)))
    queries = queries.reshape(batch, kv_heads, blocks, block * group, head_dim)

    def attend(place: Int32[Array, ""]) -> tuple[jax.Array, jax.Array]:
        sequence, number = place // blocks, place % blocks
        rows = lax.dynamic_slice(
            queries, (sequence, 0, number, 0, 0), (1, kv_heads, 1, block * group, head_dim)
        ).reshape(kv_heads, block * group, head_dim)
        first = starts[sequence] + number * block
        return _attend_block(rows, k, v, sequence, first, limits[sequence], group, chunk, scale)

    out, lse = lax.map(attend, jnp.arange(batch * blocks, dtype=jnp.int32))

    def public(x: jax.Array) -> jax.Array:
        rest = x.shape[3:]
        x = x.reshape(batch, blocks, kv_heads, block, group, *rest)
        return ungroup(jnp.moveaxis(x, 1, 2).reshape(batch, kv_heads, blocks * block, group, *rest))[:, :tokens]

    return AttentionOutput(public(out).astype(q.dtype), public(lse) if return_lse else None)


def _attend_block(
    rows: Float[Array, "K R H"],
    k: jax.Array,
    v: jax.Array,
    sequence: jax.Array,
    first: jax.Array,
    limit: jax.Array,
    group: int,
    chunk: int,
    scale: float | jax.Array,
) -> tuple[Float[Array, "K R H"], Float[Array, "K R"]]:
    """Output and lse of a block of queries, the first of which is at slot `first`."""
    kv_heads, size, head_dim = rows.shape
    slots = k.shape[2]
    position = first + jnp.arange(size, dtype=jnp.int32) // group
    end = jnp.where(first < limit, jnp.minimum(first + size // group, limit), 0)

    def load(cache: jax.Array, start: jax.Array) -> jax.Array:
        part = lax.dynamic_slice(cache, (sequence, 0, start, 0), (1, kv_heads, chunk, head_dim))
        return part.reshape(kv_heads, chunk, head_dim)

    def past(index: jax.Array, state: _Softmax) -> _Softmax:
        start = index * chunk
        return _update(state, _logits(rows, load(k, start), scale), load(v, start), rows.dtype)

    def edge(index: jax.Array, state: _Softmax) -> _Softmax:
        # The last chunk is moved back inside the cache; what it shares with the one before does not count again.
        start = jnp.minimum(index * chunk, slots - chunk)
        slot = start + jnp.arange(chunk, dtype=jnp.int32)
        visible = (slot >= index * chunk) & (slot <= position[:, None]) & (slot < limit)
        logits = jnp.where(visible, _logits(rows, load(k, start), scale), -jnp.inf)
        # Slots that are not in use may hold NaN, which a weight of zero would not silence.
        return _update(state, logits, jnp.where((slot < limit)[:, None], load(v, start), 0), rows.dtype)

    state = _Softmax(
        jnp.zeros(rows.shape, jnp.float32), jnp.full((kv_heads, size), -jnp.inf), jnp.zeros((kv_heads, size))
    )
    whole = jnp.maximum(jnp.minimum(first + 1, end), 0) // chunk
    state = lax.fori_loop(0, whole, past, state)
    state = lax.fori_loop(whole, -(-end // chunk), edge, state)
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1.0)
    return state.acc / total[..., None], jnp.where(seen, state.top + jnp.log(total), -jnp.inf)


def _logits(rows: jax.Array, keys: jax.Array, scale: float | jax.Array) -> Float[Array, "K R s"]:
    """Scaled float32 logits."""
    precision = _precision(jnp.result_type(rows, keys))
    logits: jax.Array = jnp.einsum("krh,ksh->krs", rows, keys, precision=precision, preferred_element_type=jnp.float32)
    return logits * scale


def _update(state: _Softmax, logits: jax.Array, values: jax.Array, query_dtype: DTypeLike) -> _Softmax:
    """Takes a chunk into the running softmax; weights are no coarser than queries and values."""
    dtype = jnp.promote_types(query_dtype, values.dtype)
    top = jnp.maximum(state.top, logits.max(axis=-1))
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    exps = jnp.exp(logits - shift[..., None])
    fade = jnp.exp(state.top - shift)
    seen = jnp.einsum(
        "krs,ksh->krh", exps.astype(dtype), values, precision=_precision(dtype), preferred_element_type=jnp.float32
    )
    return _Softmax(state.acc * fade[..., None] + seen, top, state.total * fade + exps.sum(axis=-1))


def _precision(dtype: DTypeLike) -> lax.Precision:
    """Float32 means float32: accelerators would otherwise multiply in bfloat16 or TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
