"""Dense and sparse decode attention at token granularity, as kernels of Pallas's Triton lowering.

One program attends to one share of one kv head's entries, for all T * G query rows that use that head, so K and V are
read once. The entries are the plan's slots (all past slots where there is no plan) followed by the T new tokens; each
of the splits takes an equal part of them, whatever the lengths and counts. A second kernel joins the partial results
and puts them into the public layout.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from specattn_kernels.common import LOG2_E, interpreted, power_of_two, ungroup
from specattn_kernels.devices import current_device
from specattn_kernels.triton.memory import remember
from specattn_kernels.triton.merge import merge_splits, parts_of, place_of
from specattn_kernels.types import AttentionOutput, Scores, SelectionPlan

# What a multiprocessor's shared memory has room for at once: so all programs run together, and none waits for a place.
PROGRAMS_PER_CORE = 2
# Where a multiprocessor has no more gathering steps than this, one program with more loads in flight does them sooner
# than two that both have to begin and end. With fewer still it would have no time to get going.
FEW_STEPS = range(10, 20)
# Multiprocessors where the device does not tell.
USUAL_CORES = 132
MAX_SPLITS = 128
# K and V of one step where they are contiguous, on GPUs with 227 KiB of shared memory per program; half where they are
# gathered, which has one more step in flight, and half on other GPUs.
STEP_BYTES = 1 << 16
LARGE_MEMORY_CAPABILITIES = (9, 10)
# What float16 holds.
LARGEST_LOGIT = 65504.0


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
    return_scores: Scores = False,
    return_lse: bool = False,
) -> AttentionOutput:
    """Attention over the whole cache; see `api.decode_attention`."""
    return _attention(q, k, v, None, lengths, scale, None, return_scores, return_lse)


def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    plan: SelectionPlan,
    lengths: Int32[Array, " B"],
    *,
    scale: float | Float[Array, ""],
    memory: Float[Array, "B K S"] | None = None,
    return_lse: bool = False,
) -> AttentionOutput:
    """Attention over the plan's blocks and the new tokens; see `api.sparse_decode_attention`."""
    return _attention(q, k, v, plan, lengths, scale, memory, False, return_lse)


def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: SelectionPlan | None,
    lengths: jax.Array,
    scale: float | jax.Array,
    memory: jax.Array | None,
    return_scores: Scores,
    return_lse: bool,
) -> AttentionOutput:
    """Attends in splits and merges them."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    tile = _choose_tile(k, tokens * (heads // kv_heads), plan)
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    shown = range(tokens - 1 if return_scores == "newest" else 0, tokens) if return_scores else range(0)
    if memory is not None:
        shown = range(1)
    part, lse, logits = _attend_in_splits(
        grouped,
        k,
        v,
        plan,
        lengths,
        jnp.asarray(scale, jnp.float32),
        tile=tile,
        shown=shown,
        interpret=interpreted(),
    )
    out, lse = merge_splits(part, lse, grouped, tile.splits)
    scores = None
    if return_scores and logits is not None:
        logits = logits[..., : k.shape[2]].reshape(batch, kv_heads, len(shown), heads // kv_heads, -1)
        position = lengths[:, None] - tokens + jnp.arange(shown.start, tokens)
        visible = (jnp.arange(k.shape[2]) <= position[..., None])[:, :, None]
        total = lse[:, shown.start :, :, None]
        # Logits of slots that no program came to are not there; those of rows that see nothing are never read.
        scores = jnp.where(visible, jnp.exp2(ungroup(logits).astype(jnp.float32) - total), 0.0)
    if memory is not None and logits is not None and plan is not None:
        memory = remember(memory, logits, lse, plan, lengths - tokens)
    return AttentionOutput(out, lse / LOG2_E if return_lse else None, scores, memory)


def _choose_tile(k: jax.Array | jax.ShapeDtypeStruct, rows: int, plan: SelectionPlan | None) -> _Tile:
    """A tile for these shapes; looks at nothing else."""
    batch, kv_heads, slots, head_dim = k.shape
    padded = max(16, power_of_two(rows))
    device = current_device()
    capability = device.compute_capability
    small = capability is not None and capability[0] not in LARGE_MEMORY_CAPABILITIES
    # Where rows are gathered one more step is in flight, for the ids that tell where; short rows want longer steps.
    gathers, short = plan is not None, head_dim <= 64
    stages, step_bytes, most = (3, STEP_BYTES // 2, 64) if gathers and not short else (2, STEP_BYTES, 128)
    fitting = (step_bytes // 2 if small else step_bytes) // (2 * head_dim * k.dtype.itemsize)
    block = max(16, min(most, 1 << (max(fitting, 1).bit_length() - 1)))
    # A warp takes 16 rows; more warps than that have to share sums over the entries.
    warps = max(2 if gathers and not short else 4, padded // 16)
    if is_float32 := k.dtype == jnp.float32:
        # No matrix unit takes part, so a step's products have to fit the registers.
        block = min(block, 32)
        warps = max(warps, block // 8)
    capacity = slots if plan is None else min(slots, plan.block_ids.shape[-1] * plan.block_size)
    cores = device.cores or USUAL_CORES
    programs = (PROGRAMS_PER_CORE + (gathers and short)) * cores
    steps = capacity * batch * kv_heads // (cores * block)
    if gathers and not (short or small or is_float32) and steps in FEW_STEPS:
        programs, warps, stages = cores, max(warps, 4), 5
    # Of few gathered entries each program takes one step: there are not enough of them for a second one to wait for.
    least = block if gathers else 2 * block
    splits = max(1, min(MAX_SPLITS, programs // (batch * kv_heads), -(-capacity // least)))
    return _Tile(padded, parts_of(head_dim), block, splits, warps, stages)


# Of the many layers of a model only the first is traced.
@functools.partial(jax.jit, static_argnames=("tile", "shown", "interpret"))
def _attend_in_splits(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    plan: SelectionPlan | None,
    lengths: Int32[Array, " B"],
    scale: Float[Array, ""],
    *,
    tile: _Tile,
    shown: range,
    interpret: bool,
) -> tuple[Float[Array, "B K room rows H"], Float[Array, "B K room rows"], Float[Array, "B K shown entries"] | None]:
    """Partial outputs and log2-sum-exps of every split, and the logits in powers of two if they are wanted.

    Logits are those of the tokens `shown`, for the slots of the cache or the entries of the plan, and some room behind
    them. They have as many bits as the cache: they only pass through memory, and float16 gives a weight to within a
    hundredth.

    Rows beyond T * G, and splits beyond those of the tile, only have room: nothing writes or reads them.
    """
    batch, tokens, kv_heads, group, head_dim = q.shape
    slots, rows = k.shape[2], tile.rows

    def per_head(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *block), lambda b, h, _: (b, h, *[0] * len(block)))

    def per_split(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *block), lambda b, h, s: (b, h, s, *[0] * len(block)))

    arrays = [q, k, v, lengths[:, None], (scale * LOG2_E)[None]]
    in_specs = [
        pl.BlockSpec((None, tokens, None, group, head_dim), lambda b, h, _: (b, 0, h, 0, 0)),
        per_head(slots, head_dim),
        per_head(slots, head_dim),
        pl.BlockSpec((None, 1), lambda b, *_: (b, 0)),
        pl.BlockSpec((1,), lambda *_: (0,)),
    ]
    if plan is not None:
        # All layers' parts go in as they lie; the kernel reads that of one.
        ids, counts, layer = plan.stacked()
        arrays += [ids, counts, layer]
        layers, capacity = ids.shape[1], ids.shape[3]
        in_specs += [
            pl.BlockSpec((None, layers, None, capacity), lambda b, h, _: (b, 0, h, 0)),
            pl.BlockSpec((None, layers, None), lambda b, h, _: (b, 0, h)),
            pl.BlockSpec((1,), lambda *_: (0,)),
        ]
    room = power_of_two(tile.splits)
    out_shape = [
        jax.ShapeDtypeStruct((batch, kv_heads, room, rows, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, room, rows), jnp.float32),
    ]
    out_specs = [per_split(rows, head_dim), per_split(rows)]
    shown_rows = range(shown.start * group, shown.stop * group)
    if shown:
        entries = slots if plan is None else capacity * plan.block_size
        # Splits begin anywhere, so the last step may reach so far beyond the end.
        padded = -(-entries // 16) * 16 + tile.block
        logits_dtype = jnp.float32 if k.dtype == jnp.float32 else jnp.float16
        out_shape.append(jax.ShapeDtypeStruct((batch, kv_heads, len(shown_rows), padded), logits_dtype))
        out_specs.append(per_head(len(shown_rows), padded))
    kernel = functools.partial(
        _attend,
        tile=tile,
        tokens=tokens,
        group=group,
        dtype=jnp.promote_types(q.dtype, k.dtype),
        block_size=None if plan is None else plan.block_size,
        shown=shown_rows,
    )
    part, lse, *logits = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, tile.splits),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="sparse_decode" if plan is not None else "dense_decode",
    )(*arrays)
    return part, lse, logits[0] if shown else None


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
    dtype: jnp.dtype,
    block_size: int | None,
    shown: range,
) -> None:
    """One split of one kv head: online softmax over its entries, in powers of two.

    `shown` are the query rows whose logits are written, of everything or of a plan's entries.
    """
    inputs, outputs = refs[: -3 if shown else -2], refs[-3 if shown else -2 :]
    first_new, scale = length_ref[0] - tokens, scale_ref[0]
    if block_size is None:
        past, total = 0, length_ref[0]
        last_shown = total
    else:
        ids_ref, counts_ref, layer_ref = inputs
        layer = layer_ref[0]
        past = counts_ref[layer] * block_size
        total, last_shown = past + tokens, past
    row = lax.broadcasted_iota(jnp.int32, (tile.rows,), 0)
    is_row = row < tokens * group
    token, member = place_of(jnp.where(is_row, row, 0), group)
    position = first_new + token
    queries = [q_ref[token, member, pl.ds(at, width)].astype(dtype) for at, width in tile.parts]
    # As equal as alignment allows; the last splits may find nothing left.
    share = pl.cdiv(pl.cdiv(total, tile.splits), 16) * 16
    begin = pl.program_id(2) * share
    end = jnp.minimum(begin + share, total)

    def step(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, weight, acc = carry
        entry = begin + index * tile.block + lax.broadcasted_iota(jnp.int32, (tile.block,), 0)
        slot, valid = entry, entry < end
        if block_size is not None:
            is_new = entry >= past
            within = jnp.where(is_new, 0, entry)
            planned = ids_ref[layer, within // block_size] * block_size + within % block_size
            slot = jnp.where(is_new, first_new + entry - past, planned)
            # A plan may reach into the new tokens, which are read once, as themselves.
            valid &= (slot >= 0) & (is_new | (slot < first_new))
        place = jnp.where(valid, slot, 0)
        keys = [k_ref[place, pl.ds(at, width)] for at, width in tile.parts]
        values = [v_ref[place, pl.ds(at, width)] for at, width in tile.parts]
        logits = sum(dot(query, key.T) for query, key in zip(queries, keys, strict=True))
        visible = valid[None] & (slot[None] <= position[:, None])
        logits = jnp.where(visible, logits * scale, -jnp.inf)
        if shown:
            place = row - shown.start
            is_shown = (row >= shown.start) & (row < shown.stop)
            here = outputs[2].at[jnp.maximum(place, 0)[:, None], entry[None]]
            # Those that float16 has no room for are infinite only where they do not count.
            bounded = jnp.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT)
            bounded = jnp.where(visible, bounded, -jnp.inf).astype(outputs[2].dtype)
            is_kept = (entry < end) & (entry < last_shown)
            plgpu.store(here, bounded, mask=is_shown[:, None] & is_kept[None])
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        fade, chance = jnp.exp2(top - shift), jnp.exp2(logits - shift[:, None])
        # Slots that are not valid may hold NaN, which a weight of zero would not silence.
        kept = [jnp.where(valid[:, None], value, 0) for value in values]
        acc = tuple(
            part * fade[:, None] + dot(chance.astype(dtype), value) for part, value in zip(acc, kept, strict=True)
        )
        return new_top, weight * fade + jnp.sum(chance, axis=1), acc

    empty = tuple(jnp.zeros((tile.rows, width), jnp.float32) for _, width in tile.parts)
    start = jnp.full((tile.rows,), -jnp.inf), jnp.zeros((tile.rows,)), empty
    steps = pl.cdiv(jnp.maximum(end - begin, 0), tile.block)
    top, weight, acc = lax.fori_loop(0, steps, step, start)
    divisor = jnp.where(weight > 0, weight, 1.0)
    for (at, width), part in zip(tile.parts, acc, strict=True):
        plgpu.store(outputs[0].at[:, pl.ds(at, width)], part / divisor[:, None], mask=is_row[:, None])
    plgpu.store(outputs[1].at[...], jnp.where(weight > 0, top + jnp.log2(divisor), -jnp.inf), mask=is_row)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Float32 sum of products; float32 means float32, not TF32."""
    dtype = jnp.promote_types(a.dtype, b.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.dot(a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)
