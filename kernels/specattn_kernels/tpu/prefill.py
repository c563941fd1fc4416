"""Prefill attention as a TPU kernel.

One program attends with a block of query rows, for all query heads that share a kv head. It copies tiles of the cache
by hand, from slot 0 to its own last slot, into one of two buffers while the other is computed on. Tiles that all of its
queries see whole need no mask.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from specattn_kernels.common import group_queries, ungroup
from specattn_kernels.tpu.limits import LANES, sublanes
from specattn_kernels.tpu.products import dot
from specattn_kernels.types import AttentionOutput

# Query rows of a program, and slots of a step. Reckoned, not measured: their logits take 2 MB of vector memory.
ROWS, SLOTS = 1024, 512
VECTOR_BYTES = 32 << 20


class _Tile(NamedTuple):
    """How a program works.

    Attributes:
        rows: query rows.
        group: G, of which each token has one.
        slots: of a step.
    """

    rows: int
    group: int
    slots: int


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
    rows = tokens * group
    # Whole tokens, whole lanes.
    unit = LANES * group
    tile = _Tile(min(max(ROWS // unit, 1), -(-rows // unit)) * unit, group, min(SLOTS, slots // LANES * LANES))
    queries = group_queries(q, kv_heads).reshape(batch, kv_heads, rows, head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, -rows % tile.rows), (0, 0)))
    queries = queries.astype(jnp.promote_types(q.dtype, k.dtype))
    out, *lse = _call(starts, limits, jnp.asarray(scale, jnp.float32)[None], queries, k, v, tile, return_lse)

    def public(x: jax.Array) -> jax.Array:
        return ungroup(x[:, :, :rows].reshape(batch, kv_heads, tokens, group, *x.shape[3:]))

    # A row of lanes for each program.
    return AttentionOutput(public(out).astype(q.dtype), public(lse[0].reshape(out.shape[:3])) if lse else None)


def _call(
    starts: jax.Array,
    limits: jax.Array,
    scale: jax.Array,
    queries: Float[Array, "B K rows H"],
    k: jax.Array,
    v: jax.Array,
    tile: _Tile,
    return_lse: bool,
) -> tuple[jax.Array, ...]:
    """Output, and lse [B, K, blocks, 1, rows of a block] if it is wanted."""
    batch, kv_heads, rows, head_dim = queries.shape
    blocks = rows // tile.rows
    # Not left open: XLA might copy a small cache into vector memory as a whole.
    where_it_lies = pl.BlockSpec(memory_space=pltpu.HBM)
    per_block = pl.BlockSpec((None, None, tile.rows, head_dim), lambda b, h, i, *_: (b, h, i, 0))
    out_specs, out_shape = [per_block], [jax.ShapeDtypeStruct(queries.shape, queries.dtype)]
    if return_lse:
        out_specs.append(pl.BlockSpec((None, None, None, 1, tile.rows), lambda b, h, i, *_: (b, h, i, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((batch, kv_heads, blocks, 1, tile.rows), jnp.float32))
    results: tuple[jax.Array, ...] = pl.pallas_call(
        functools.partial(_attend, tile=tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, blocks),
            in_specs=[per_block, where_it_lies, where_it_lies],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((2, tile.slots, head_dim), k.dtype),
                pltpu.VMEM((2, tile.slots, head_dim), v.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VECTOR_BYTES
        ),
        name="prefill",
    )(starts, limits, scale, queries, k, v)
    return results


def _attend(
    starts_ref: Any,
    limits_ref: Any,
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    *refs: Any,
    tile: _Tile,
) -> None:
    """One block of query rows: online softmax, tile by tile."""
    lse_refs, (k_buffer, v_buffer, semaphores) = refs[:-3], refs[-3:]
    batch, kv_head = pl.program_id(0), pl.program_id(1)
    slots, tokens = k_ref.shape[2], tile.rows // tile.group
    first, limit = starts_ref[batch] + pl.program_id(2) * tokens, limits_ref[batch]
    # A block of nothing but padding has no way to go.
    end = jnp.where(first < limit, jnp.minimum(first + tokens, limit), 0)
    steps = lax.div(end + tile.slots - 1, tile.slots)
    whole = lax.div(jnp.maximum(jnp.minimum(first + 1, end), 0), tile.slots)
    row = lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0)
    position = first + lax.div(row, tile.group)

    def start_of(index: Any) -> Any:
        # The last tile of a cache is moved back inside it.
        return pl.multiple_of(jnp.minimum(index * tile.slots, slots - tile.slots), sublanes(k_ref.dtype))

    def copy(index: Any, which: int) -> Any:
        source, target = ((k_ref, k_buffer), (v_ref, v_buffer))[which]
        turn = lax.rem(index, 2)
        here = source.at[batch, kv_head, pl.ds(start_of(index), tile.slots)]
        return pltpu.make_async_copy(here, target.at[turn], semaphores.at[which, turn])

    def fetch(index: Any) -> None:
        for which in range(2):
            copy(index, which).start()

    def step(masked: bool, index: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, total, acc = carry
        turn = lax.rem(index, 2)
        pl.when(index + 1 < steps)(functools.partial(fetch, index + 1))
        copy(index, 0).wait()
        logits = dot(q_ref[...], k_buffer[turn], contract=1) * scale_ref[0]
        if masked:
            slot = start_of(index) + lax.broadcasted_iota(jnp.int32, (1, tile.slots), 1)
            in_use = (slot < limit) & (slot >= index * tile.slots)
            logits = jnp.where(in_use & (slot <= position), logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        fade, chance = jnp.exp(top - shift), jnp.exp(logits - shift)
        copy(index, 1).wait()
        if masked:
            _silence(v_buffer.at[turn], start_of(index), limit)
        acc = acc * fade + dot(chance.astype(q_ref.dtype), v_buffer[turn], contract=0)
        return new_top, total * fade + jnp.sum(chance, axis=1, keepdims=True), acc

    pl.when(steps > 0)(functools.partial(fetch, 0))
    carry = jnp.full(row.shape, -jnp.inf), jnp.zeros(row.shape), jnp.zeros(q_ref.shape, jnp.float32)
    carry = lax.fori_loop(0, whole, functools.partial(step, False), carry)
    top, total, acc = lax.fori_loop(whole, steps, functools.partial(step, True), carry)
    divisor = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (acc / divisor).astype(out_ref.dtype)
    if lse_refs:
        lse = jnp.where(total > 0, top + jnp.log(divisor), -jnp.inf)
        lse_refs[0][...] = jnp.broadcast_to(lse, (tile.rows, LANES)).T[:1]


def _silence(values: Any, start: Any, limit: Any) -> None:
    """Zeroes values that are not in use: they may be NaN, which a weight of zero would not silence."""

    @pl.when(start + values.shape[0] > limit)
    def clear() -> None:
        slot = start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values[...] = jnp.where(slot < limit, values[...].astype(jnp.float32), 0.0).astype(values.dtype)
