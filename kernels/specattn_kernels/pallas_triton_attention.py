"""Dense and sparse decode attention at token granularity, as kernels of Pallas's Triton lowering.

One program attends to one share of one kv head's entries, for all T * G query rows that use that head, so K and V are
read once. The entries are the plan's slots (all past slots where there is no plan) followed by the T new tokens; each
of the splits takes an equal part of them, whatever the lengths and counts, and `merge_partials` joins what they give.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from specattn_kernels.common import LOG2_E, group_queries, interpreted, merge_partials, ungroup
from specattn_kernels.dispatch import current_device
from specattn_kernels.types import AttentionOutput, SelectionPlan

# Programs that keep the largest GPUs busy: a few for each of about 132 multiprocessors. More make merging dearer.
WANTED_PROGRAMS = 512
MAX_SPLITS = 128
# K and V of one step, on GPUs with 227 KiB of shared memory per program; the others get half.
STEP_BYTES = 1 << 16
LARGE_MEMORY_CAPABILITIES = (9, 10)
# Query rows of one program: T * G.
MAX_QUERY_ROWS = 128


class _Tile(NamedTuple):
    """How a program works.

    Attributes:
        rows: query rows, padded to what a matrix unit takes.
        parts: beginning and width, a power of two, of the pieces of the head dim.
        block: entries per step.
        splits: programs per kv head.
        warps: per program.
        stages: steps whose loads are in flight at once.
    """

    rows: int
    parts: tuple[tuple[int, int], ...]
    block: int
    splits: int
    warps: int
    stages: int


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int32[Array, " B"],
    *,
    scale: float | Float[Array, ""],
    return_scores: bool = False,
    return_lse: bool = False,
) -> AttentionOutput:
    """Attention over the whole cache; see `api.decode_attention`."""
    return _attention(q, k, v, None, lengths, scale, return_scores, return_lse)


def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    plan: SelectionPlan,
    lengths: Int32[Array, " B"],
    *,
    scale: float | Float[Array, ""],
    return_lse: bool = False,
) -> AttentionOutput:
    """Attention over the plan's blocks and the new tokens; see `api.sparse_decode_attention`."""
    return _attention(q, k, v, plan, lengths, scale, False, return_lse)


def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: SelectionPlan | None,
    lengths: jax.Array,
    scale: float | jax.Array,
    return_scores: bool,
    return_lse: bool,
) -> AttentionOutput:
    """Groups the queries by kv head, attends in splits, merges, and puts everything into the public layout."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group = heads // kv_heads
    dtype = jnp.promote_types(q.dtype, k.dtype)
    tile = _choose_tile(k, tokens * group, plan)
    queries = group_queries(q, kv_heads).reshape(batch, kv_heads, tokens * group, head_dim).astype(dtype)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, tile.rows - tokens * group), (0, 0)))
    part, lse, logits = _attend_in_splits(queries, k, v, plan, lengths, scale, tokens, group, tile, return_scores)
    out, lse = merge_partials(part, lse)

    def public(x: jax.Array) -> jax.Array:
        """From [B, K, rows, ...] to [B, T, N, ...]."""
        return ungroup(x[:, :, : tokens * group].reshape(batch, kv_heads, tokens, group, *x.shape[3:]))

    scores = None
    if logits is not None:
        position = lengths[:, None] - tokens + jnp.arange(tokens)
        visible = (jnp.arange(slots) <= position[..., None])[:, :, None]
        # Logits of slots that no program came to are not there; those of rows that see nothing are never read.
        scores = jnp.where(visible, jnp.exp2(public(logits) - public(lse)[..., None]), 0.0)
    return AttentionOutput(
        out=public(out).astype(q.dtype), lse=public(lse) / LOG2_E if return_lse else None, scores=scores
    )


def refusal(cache: tuple[int, ...], query_rows: int) -> str | None:
    """Why the kernels cannot attend to a cache of shape [B, K, S, H] with T * G query rows; None if they can."""
    head_dim, size = cache[3], math.prod(cache)
    if head_dim % 16 or head_dim > 256:
        return f"head dim {head_dim}; expected a multiple of 16 up to 256"
    if size >= 1 << 31:
        return f"a cache of {size} numbers per layer; expected fewer than 2 ** 31, of a smaller batch"
    if query_rows > MAX_QUERY_ROWS:
        return f"{query_rows} query rows per kv head (new tokens times group); expected at most {MAX_QUERY_ROWS}"
    return None


def _step_bytes() -> int:
    """Bytes of K and V of one step on the GPU at hand."""
    capability = current_device().compute_capability
    small = capability is not None and capability[0] not in LARGE_MEMORY_CAPABILITIES
    return STEP_BYTES // 2 if small else STEP_BYTES


def _choose_tile(k: jax.Array, rows: int, plan: SelectionPlan | None) -> _Tile:
    """A tile for these shapes.

    Raises:
        NotImplementedError: the head dim is no multiple of 16, there are too many query rows, or a layer's cache is
            beyond 32-bit addresses.
    """
    batch, kv_heads, slots, head_dim = k.shape
    refused = refusal(k.shape, rows)
    if refused is not None:
        raise NotImplementedError(f"pallas_triton: {refused}; use implementation='xla'.")
    padded = max(16, 1 << (rows - 1).bit_length())
    parts, begin = [], 0
    for power in (256, 128, 64, 32, 16):
        while begin + power <= head_dim:
            parts.append((begin, power))
            begin += power
    # As many entries as fit the shared memory twice, K and V, while one step is loaded and another is computed.
    fitting = _step_bytes() // (2 * head_dim * k.dtype.itemsize)
    block = max(16, min(128, 1 << (max(fitting, 1).bit_length() - 1)))
    capacity = slots if plan is None else min(slots, plan.block_ids.shape[2] * plan.block_size)
    splits = max(1, min(MAX_SPLITS, WANTED_PROGRAMS // (batch * kv_heads), -(-capacity // (2 * block))))
    return _Tile(padded, tuple(parts), block, splits, warps=4, stages=2)


def _attend_in_splits(
    queries: Float[Array, "B K rows H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    plan: SelectionPlan | None,
    lengths: Int32[Array, " B"],
    scale: float | jax.Array,
    tokens: int,
    group: int,
    tile: _Tile,
    emit_logits: bool,
) -> tuple[Float[Array, "B K splits rows H"], Float[Array, "B K splits rows"], Float[Array, "B K rows S"] | None]:
    """Partial outputs and log2-sum-exps of every split, and the logits in powers of two if they are wanted."""
    batch, kv_heads, slots, head_dim = k.shape
    rows, splits = tile.rows, tile.splits

    def per_head(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *block), lambda b, h, _: (b, h, *[0] * len(block)))

    def per_split(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *block), lambda b, h, s: (b, h, s, *[0] * len(block)))

    arrays = [queries, k, v, lengths[:, None], jnp.asarray(scale * LOG2_E, jnp.float32)[None]]
    in_specs = [
        per_head(rows, head_dim),
        per_head(slots, head_dim),
        per_head(slots, head_dim),
        pl.BlockSpec((None, 1), lambda b, *_: (b, 0)),
        pl.BlockSpec((1,), lambda *_: (0,)),
    ]
    if plan is not None:
        arrays += [plan.block_ids, plan.counts[..., None]]
        in_specs += [per_head(plan.block_ids.shape[2]), per_head(1)]
    out_shape = [
        jax.ShapeDtypeStruct((batch, kv_heads, splits, rows, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, splits, rows), jnp.float32),
    ]
    out_specs = [per_split(rows, head_dim), per_split(rows)]
    if emit_logits:
        # Rows of padding have room, but are neither written nor read.
        padded = -(-slots // tile.block) * tile.block
        out_shape.append(jax.ShapeDtypeStruct((batch, kv_heads, rows, padded), jnp.float32))
        out_specs.append(per_head(rows, padded))
    kernel = functools.partial(
        _attend,
        tile=tile,
        tokens=tokens,
        group=group,
        block_size=None if plan is None else plan.block_size,
        emit_logits=emit_logits,
    )
    part, lse, *logits = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, splits),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpreted(),
        name="sparse_decode" if plan is not None else "dense_decode",
    )(*arrays)
    return part, lse, logits[0][..., :slots] if emit_logits else None


def _attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    length_ref: Any,
    scale_ref: Any,
    *refs: Any,
    tile: _Tile,
    tokens: int,
    group: int,
    block_size: int | None,
    emit_logits: bool,
) -> None:
    """One split of one kv head: online softmax over its entries, in powers of two."""
    inputs, outputs = refs[: -3 if emit_logits else -2], refs[-3 if emit_logits else -2 :]
    first_new, scale = length_ref[0] - tokens, scale_ref[0]
    if block_size is None:
        past, total = 0, length_ref[0]
    else:
        ids_ref, count_ref = inputs
        past = count_ref[0] * block_size
        total = past + tokens
    position = first_new + lax.broadcasted_iota(jnp.int32, (tile.rows,), 0) // group
    # Each split takes the same number of whole steps; the last ones may find nothing left.
    share = pl.cdiv(pl.cdiv(total, tile.splits), tile.block) * tile.block
    begin = pl.program_id(2) * share
    end = jnp.minimum(begin + share, total)

    def step(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, weight, acc = carry
        entry = begin + index * tile.block + lax.broadcasted_iota(jnp.int32, (tile.block,), 0)
        slot, valid = entry, entry < end
        if block_size is not None:
            is_new = entry >= past
            within = jnp.where(is_new, 0, entry)
            planned = ids_ref[within // block_size] * block_size + within % block_size
            slot = jnp.where(is_new, first_new + entry - past, planned)
            # A plan may reach into the new tokens, which are read once, as themselves.
            valid &= (slot >= 0) & (is_new | (slot < first_new))
        place = jnp.where(valid, slot, 0)
        keys = [k_ref[place, pl.ds(at, width)] for at, width in tile.parts]
        values = [v_ref[place, pl.ds(at, width)] for at, width in tile.parts]
        logits = sum(_dot(q_ref[:, pl.ds(at, width)], key.T) for (at, width), key in zip(tile.parts, keys, strict=True))
        visible = valid[None] & (slot[None] <= position[:, None])
        logits = jnp.where(visible, logits * scale, -jnp.inf)
        if emit_logits:
            is_row = lax.broadcasted_iota(jnp.int32, (tile.rows,), 0) < tokens * group
            here = outputs[2].at[:, pl.ds(begin + index * tile.block, tile.block)]
            plgpu.store(here, logits, mask=is_row[:, None] & valid[None])
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        fade, chance = jnp.exp2(top - shift), jnp.exp2(logits - shift[:, None])
        # Slots that are not valid may hold NaN, which a weight of zero would not silence.
        kept = [jnp.where(valid[:, None], value, 0) for value in values]
        acc = tuple(
            part * fade[:, None] + _dot(chance.astype(q_ref.dtype), value)
            for part, value in zip(acc, kept, strict=True)
        )
        return new_top, weight * fade + jnp.sum(chance, axis=1), acc

    empty = tuple(jnp.zeros((tile.rows, width), jnp.float32) for _, width in tile.parts)
    start = jnp.full((tile.rows,), -jnp.inf), jnp.zeros((tile.rows,)), empty
    steps = pl.cdiv(jnp.maximum(end - begin, 0), tile.block)
    top, weight, acc = lax.fori_loop(0, steps, step, start)
    divisor = jnp.where(weight > 0, weight, 1.0)
    for (at, width), part in zip(tile.parts, acc, strict=True):
        outputs[0][:, pl.ds(at, width)] = part / divisor[:, None]
    outputs[1][...] = jnp.where(weight > 0, top + jnp.log2(divisor), -jnp.inf)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Float32 sum of products; float32 means float32, not TF32."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.dot(a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)
