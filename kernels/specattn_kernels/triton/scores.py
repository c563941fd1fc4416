"""How strongly some tokens look at every cache slot, as a kernel of Pallas's Triton lowering.

One program scores one share of one kv head's slots for all T * G query rows that use that head, so that the keys are
read once, and writes one number a slot. It needs no second pass, because what the weights add up to is known.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, DTypeLike, Float, Int32

from specattn_kernels.common import LOG2_E, interpreted
from specattn_kernels.devices import current_device
from specattn_kernels.triton.attention import USUAL_CORES, dot
from specattn_kernels.triton.limits import padded_rows
from specattn_kernels.triton.merge import parts_of

# Keys of one step.
STEP_BYTES = 1 << 14
# Of head dim 128; shorter keys leave room for more.
PROGRAMS_PER_CORE = 2
MAX_SPLITS = 128


class _Rows(NamedTuple):
    """Query rows of a program: tokens and group members, each padded to a power of two, 16 rows at least."""

    tokens: int
    group: int
    padded_tokens: int
    padded_group: int


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
    rows = _Rows(tokens, group, *padded_rows(tokens, group))
    parts = parts_of(head_dim)
    fitting = STEP_BYTES // (head_dim * k.dtype.itemsize)
    block = max(16, min(64, 1 << (fitting.bit_length() - 1)))
    programs = PROGRAMS_PER_CORE * max(1, 128 // head_dim) * (current_device().cores or USUAL_CORES)
    splits = max(1, min(MAX_SPLITS, programs // (batch * kv_heads), -(-slots // block)))

    def per_head(*size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *size), lambda b, h, _: (b, h, *[0] * len(size)))

    def per_token(*size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tokens, None, *size), lambda b, h, _: (b, 0, h, *[0] * len(size)))

    scores: jax.Array = pl.pallas_call(
        functools.partial(
            _score, rows=rows, parts=parts, block=block, splits=splits, dtype=jnp.promote_types(q.dtype, k.dtype)
        ),
        grid=(batch, kv_heads, splits),
        in_specs=[
            per_token(group, head_dim),
            per_head(slots, head_dim),
            per_token(group),
            pl.BlockSpec((None, 1), lambda b, *_: (b, 0)),
            pl.BlockSpec((1,), lambda *_: (0,)),
        ],
        out_specs=per_head(slots),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, slots), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpreted(),
        name="score_cache",
    )(
        q.reshape(batch, tokens, kv_heads, group, head_dim),
        k,
        lse.reshape(batch, tokens, kv_heads, group) * LOG2_E,
        lengths[:, None],
        jnp.asarray(scale * LOG2_E, jnp.float32)[None],
    )
    return scores


def _score(
    q_ref: Any,
    k_ref: Any,
    lse_ref: Any,
    length_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    *,
    rows: _Rows,
    parts: tuple[tuple[int, int], ...],
    block: int,
    splits: int,
    dtype: jnp.dtype,
) -> None:
    """One share of the slots of one kv head."""
    slots, length, scale = k_ref.shape[0], length_ref[0], scale_ref[0]
    row = lax.broadcasted_iota(jnp.int32, (rows.padded_tokens * rows.padded_group,), 0)
    token, member = row // rows.padded_group, row % rows.padded_group
    is_row = (token < rows.tokens) & (member < rows.group)
    token, member = jnp.where(is_row, token, 0), jnp.where(is_row, member, 0)
    queries = [q_ref[token, member, pl.ds(at, width)].astype(dtype) for at, width in parts]
    total = lse_ref[token, member]
    # Rows that are not there, and those that saw nothing, give every slot a weight of zero.
    total = jnp.where(is_row & (total > -jnp.inf), total, jnp.inf)
    share = -(-slots // (splits * block)) * block
    begin = pl.program_id(2) * share

    def step(index: jax.Array, _: None) -> None:
        first = begin + index * block
        slot = first + lax.broadcasted_iota(jnp.int32, (block,), 0)
        valid = slot < jnp.minimum(length, slots)
        place = jnp.where(valid, slot, 0)
        keys = [k_ref[place, pl.ds(at, width)] for at, width in parts]
        # Slots are the rows, so that the sums over a group are of numbers that one thread, or four of them, hold.
        logits = sum(dot(key, query.T) for query, key in zip(queries, keys, strict=True))
        weights = jnp.exp2(jnp.minimum(logits * scale - total[None], 0.0))
        by_token = weights.reshape(block, rows.padded_tokens, rows.padded_group)
        best = jnp.max(jnp.sum(by_token, axis=2), axis=1) / rows.group
        best = jnp.where(valid, best, 0.0).astype(out_ref.dtype)
        plgpu.store(out_ref.at[pl.ds(first, block)], best, mask=slot < slots)

    steps = pl.cdiv(jnp.minimum(share, jnp.maximum(slots - begin, 0)), block)
    lax.fori_loop(0, steps, step, None)
