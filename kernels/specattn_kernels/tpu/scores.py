"""How strongly some tokens look at every cache slot, as a TPU kernel.

Keys go through vector memory tile by tile, copied by Pallas's own pipeline; each is scored for all T * G query rows of
its kv head at once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int32

from specattn_kernels.common import group_queries
from specattn_kernels.tpu.limits import LANES, padded_rows
from specattn_kernels.tpu.products import dot

# Slots of one tile.
TILE_SLOTS = 512


def score_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    lse: Float[Array, "B T N"],
    lengths: Int32[Array, " B"],
    *,
    scale: float | Float[Array, ""],
    dtype: DTypeLike,
) -> Float[Array, "B K S"]:
    """Largest mean weight of every slot; see `api.score_cache`."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group = heads // kv_heads
    rows = padded_rows(tokens * group)
    padding = ((0, 0), (0, rows - tokens * group), (0, 0))
    queries = group_queries(q, kv_heads).reshape(batch * kv_heads, tokens * group, head_dim)
    queries = jnp.pad(queries.astype(jnp.promote_types(q.dtype, k.dtype)), padding)
    total = group_queries(lse[..., None], kv_heads).reshape(batch * kv_heads, tokens * group, 1)
    # A row that saw nothing gives every slot a weight of zero.
    total = jnp.pad(jnp.where(total > -jnp.inf, total, jnp.inf), padding, constant_values=jnp.inf)
    tile = min(TILE_SLOTS, -(-slots // LANES) * LANES)
    tiles = -(-slots // tile)
    scores = pl.pallas_call(
        functools.partial(_score, tokens=tokens, group=group, kv_heads=kv_heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch * kv_heads, tiles),
            in_specs=[
                pl.BlockSpec((None, rows, head_dim), lambda h, s, *_: (h, 0, 0)),
                pl.BlockSpec((None, tile, head_dim), lambda h, s, *_: (h, s, 0)),
                pl.BlockSpec((None, rows, 1), lambda h, s, *_: (h, 0, 0)),
            ],
            out_specs=pl.BlockSpec((None, 1, tile), lambda h, s, *_: (h, 0, s)),
        ),
        out_shape=jax.ShapeDtypeStruct((batch * kv_heads, 1, tiles * tile), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="score_cache",
    )(
        lengths,
        jnp.asarray(scale, jnp.float32)[None],
        queries,
        k.reshape(batch * kv_heads, slots, head_dim),
        total,
    )
    return scores[:, 0, :slots].reshape(batch, kv_heads, slots).astype(dtype)


def _score(
    lengths_ref: Any,
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    total_ref: Any,
    out_ref: Any,
    *,
    tokens: int,
    group: int,
    kv_heads: int,
) -> None:
    """One tile of slots of one kv head."""
    tile = k_ref.shape[0]
    slot = pl.program_id(1) * tile + lax.broadcasted_iota(jnp.int32, (1, tile), 1)
    weights = jnp.exp(jnp.minimum(dot(q_ref[...], k_ref[...], contract=1) * scale_ref[0] - total_ref[...], 0.0))
    best = jnp.zeros((1, tile), jnp.float32)
    for token in range(tokens):
        one = jnp.sum(weights[token * group : (token + 1) * group], axis=0, keepdims=True)
        best = jnp.maximum(best, one / group)
    # Slots that are not valid may hold NaN, which no maximum silences.
    out_ref[...] = jnp.where(slot < lengths_ref[lax.div(pl.program_id(0), kv_heads)], best, 0.0)
