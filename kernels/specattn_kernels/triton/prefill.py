"""Prefill attention as a kernel of Pallas's Triton lowering.

One program attends with a block of one head's queries. It walks the cache from slot 0: first over tiles that all of its
queries see whole, without a mask, then over those at their own places. Programs with the longest way start first.
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

from specattn_kernels.common import LOG2_E, interpreted, power_of_two
from specattn_kernels.devices import current_device
from specattn_kernels.triton.attention import LARGE_MEMORY_CAPABILITIES, dot
from specattn_kernels.triton.merge import parts_of
from specattn_kernels.types import AttentionOutput


class _Tile(NamedTuple):
    """How a program works.

    Attributes:
        tokens: queries of a program.
        slots: of a step.
        warps: per program.
        stages: steps whose loads are in flight at once.
    """

    tokens: int
    slots: int
    warps: int
    stages: int


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
    tile = _choose_tile(q.shape[1], k.shape[3], jnp.promote_types(q.dtype, k.dtype))
    factor = jnp.asarray(scale, jnp.float32) * LOG2_E
    out, lse = _attend_in_blocks(q, k, v, starts, limits, factor, tile=tile, interpret=interpreted())
    return AttentionOutput(out, lse if return_lse else None)


def _choose_tile(tokens: int, head_dim: int, dtype: DTypeLike) -> _Tile:
    """A tile for these shapes. On an H100 with H 128 twice the slots are 6 % faster; others have no room for them."""
    capability = current_device().compute_capability
    small = capability is not None and capability[0] not in LARGE_MEMORY_CAPABILITIES
    if dtype == jnp.float32:
        # No matrix unit takes part, so a step's products have to fit the registers: twice as many take 10 times longer.
        tile = _Tile(64, 32, 8, 2)
    elif head_dim > 128:
        tile = _Tile(64, 32 if small else 64, 4, 2)
    else:
        tile = _Tile(128, 64, 8, 2 if small else 3)
    return tile._replace(tokens=min(tile.tokens, max(16, power_of_two(tokens))))


# Of the many layers of a model only the first is traced.
@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def _attend_in_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    starts: Int32[Array, " B"],
    limits: Int32[Array, " B"],
    scale: Float[Array, ""],
    *,
    tile: _Tile,
    interpret: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Output and lse; `scale` is that of logits in powers of two."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group, blocks = heads // kv_heads, pl.cdiv(tokens, tile.tokens)

    def number(place: Any) -> Any:
        return blocks - 1 - place

    per_block = pl.BlockSpec((None, tile.tokens, None, head_dim), lambda h, i, b: (b, number(i), h, 0))
    per_head = pl.BlockSpec((None, None, slots, head_dim), lambda h, i, b: (b, h // group, 0, 0))
    per_sequence = pl.BlockSpec((1,), lambda h, i, b: (b,))
    kernel = functools.partial(
        _attend, tile=tile, blocks=blocks, tokens=tokens, dtype=jnp.promote_types(q.dtype, k.dtype)
    )
    out, lse = pl.pallas_call(
        kernel,
        # The first axis is the fastest: the heads that share keys run at the same time.
        grid=(heads, blocks, batch),
        in_specs=[
            per_block,
            per_head,
            per_head,
            per_sequence,
            per_sequence,
            pl.BlockSpec((1,), lambda *_: (0,)),
        ],
        out_specs=[per_block, pl.BlockSpec((None, None, tile.tokens), lambda h, i, b: (b, h, number(i)))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="prefill",
    )(q, k, v, starts, limits, scale[None])
    return out, lse.swapaxes(1, 2) / LOG2_E


def _attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    start_ref: Any,
    limit_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    tile: _Tile,
    blocks: int,
    tokens: int,
    dtype: jnp.dtype,
) -> None:
    """One block of one head's queries: online softmax, in powers of two."""
    slots, parts = k_ref.shape[0], parts_of(k_ref.shape[1])
    limit, scale = limit_ref[0], scale_ref[0]
    begin = (blocks - 1 - pl.program_id(1)) * tile.tokens
    row = begin + lax.broadcasted_iota(jnp.int32, (tile.tokens,), 0)
    is_row = row < tokens
    first = start_ref[0] + begin
    position = start_ref[0] + row
    # A block of nothing but padding has no way to go.
    end = jnp.where(first < limit, jnp.minimum(first + tile.tokens, limit), 0)
    whole = jnp.maximum(jnp.minimum(first + 1, end), 0) // tile.slots
    queries = [
        plgpu.load(q_ref.at[:, pl.ds(at, width)], mask=is_row[:, None], other=0).astype(dtype) for at, width in parts
    ]

    def update(logits: jax.Array, values: list[jax.Array], carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, total, acc = carry
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        fade, chance = jnp.exp2(top - shift), jnp.exp2(logits - shift[:, None])
        seen = [dot(chance.astype(dtype), value) for value in values]
        acc = tuple(part * fade[:, None] + new for part, new in zip(acc, seen, strict=True))
        return new_top, total * fade + jnp.sum(chance, axis=1), acc

    def past(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        here = pl.ds(index * tile.slots, tile.slots)
        keys = [k_ref[here, pl.ds(at, width)] for at, width in parts]
        values = [v_ref[here, pl.ds(at, width)] for at, width in parts]
        logits = sum(dot(query, key.T) for query, key in zip(queries, keys, strict=True))
        return update(logits * scale, values, carry)

    def edge(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        slot = index * tile.slots + lax.broadcasted_iota(jnp.int32, (tile.slots,), 0)
        valid = slot < limit
        place = jnp.minimum(slot, slots - 1)
        keys = [k_ref[place, pl.ds(at, width)] for at, width in parts]
        # Slots that are not in use may hold NaN, which a weight of zero would not silence.
        values = [jnp.where(valid[:, None], v_ref[place, pl.ds(at, width)], 0) for at, width in parts]
        logits = sum(dot(query, key.T) for query, key in zip(queries, keys, strict=True))
        visible = valid[None] & (slot[None] <= position[:, None])
        return update(jnp.where(visible, logits * scale, -jnp.inf), values, carry)

    empty = tuple(jnp.zeros((tile.tokens, width), jnp.float32) for _, width in parts)
    carry = jnp.full((tile.tokens,), -jnp.inf), jnp.zeros((tile.tokens,)), empty
    carry = lax.fori_loop(0, whole, past, carry)
    top, total, acc = lax.fori_loop(whole, pl.cdiv(end, tile.slots), edge, carry)
    divisor = jnp.where(total > 0, total, 1.0)
    for (at, width), part in zip(parts, acc, strict=True):
        out = (part / divisor[:, None]).astype(out_ref.dtype)
        plgpu.store(out_ref.at[:, pl.ds(at, width)], out, mask=is_row[:, None])
    plgpu.store(lse_ref.at[:], jnp.where(total > 0, top + jnp.log2(divisor), -jnp.inf), mask=is_row)
