"""Block-granular decode attention for NVIDIA Hopper, as a kernel of Pallas's Mosaic GPU lowering.

One program attends to one share of one kv head's blocks, for all T * G query rows that use that head, so K and V are
read once. Its last warpgroup is the producer: it walks the share, a tile of a few blocks at a time, and has the copy
engine bring each block of K and V into shared memory, several tiles ahead. The other warpgroups take turns with the
tiles: Q K^T and P V on the tensor cores, online softmax in between. Every consumer writes a partial result of its own.

The blocks of a share are the plan's (all past ones where there is no plan) followed by those that hold the T new
tokens. Copies start at multiples of `ALIGNMENT` slots, so new tokens come in whatever aligned blocks cover them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from specattn_kernels.common import LOG2_E, group_queries, interpreted
from specattn_kernels.mosaic_gpu.compat import mosaic_gpu_interpreter
from specattn_kernels.mosaic_gpu.limits import ALIGNMENT, QUERY_ROWS, TILE_SLOTS
from specattn_kernels.mosaic_gpu.merge import merge_parts
from specattn_kernels.types import AttentionOutput, Scores, SelectionPlan
from specattn_kernels.xla import remember

CONSUMERS = 2
# Shared memory of a program, less what the compiler keeps for itself.
MEMORY_BYTES = 220 << 10
# Programs that run at once: one on each multiprocessor of an H100 or H200.
WANTED_PROGRAMS = 132
# Registers per thread: the producer gives to the consumers what it does not need.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


class _Tile(NamedTuple):
    """How a program works.

    Attributes:
        block: slots per block, one copy each of K and V.
        blocks: per tile.
        stages: tiles that have room in shared memory; a multiple of `consumers`, as a consumer must see every use of
            the stages that it waits for.
        consumers: warpgroups that compute.
        splits: programs per kv head.
    """

    block: int
    blocks: int
    stages: int
    consumers: int
    splits: int

    @property
    def slots(self) -> int:
        """Slots of a tile."""
        return self.block * self.blocks


class _Share(NamedTuple):
    """What one program reads: `tiles` tiles from block `begin` on, of `total` blocks of which `past` are planned.

    `layer` is where the plan of this one is among those of all layers; None without a plan.
    Block e < past holds slots of the past, the others cover the slots `first_new` to `length`.
    """

    batch: Any
    layer: Any
    head: Any
    begin: Any
    tiles: Any
    past: Any
    total: Any
    first_new: Any
    length: Any


class _Block(NamedTuple):
    """Where a block is copied from, and which of the copied slots, `low` up to `high`, count."""

    start: Any
    low: Any
    high: Any


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
    """Attention over the whole cache, without scores; see `api.decode_attention`."""
    return _attention(q, k, v, None, lengths, scale, return_lse)


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
    """Attention over the plan's blocks and the new tokens; see `api.sparse_decode_attention`.

    What is remembered is worked out beside it: the keys are read once more, all of them.
    """
    attended = _attention(q, k, v, plan, lengths, scale, True)
    return remember(attended, q, k, plan, lengths, scale, memory, return_lse)


def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: SelectionPlan | None,
    lengths: jax.Array,
    scale: float | jax.Array,
    return_lse: bool,
) -> AttentionOutput:
    """Groups the queries by kv head, attends in splits, merges, and puts everything into the public layout."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    rows = tokens * heads // kv_heads
    tile = _choose_tile(k, plan)
    queries = group_queries(q, kv_heads).reshape(batch, kv_heads, rows, head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, QUERY_ROWS - rows), (0, 0)))
    part, lse = _attend_in_splits(queries, k, v, plan, lengths, scale, tokens, heads // kv_heads, tile)
    out, lse = merge_parts(part, lse, tokens, heads // kv_heads)
    return AttentionOutput(out.astype(q.dtype), lse / LOG2_E if return_lse else None)


def _choose_tile(k: jax.Array, plan: SelectionPlan | None) -> _Tile:
    """A tile for these shapes: as many stages as fit, and no more splits than there are programs or tiles."""
    batch, kv_heads, slots, head_dim = k.shape
    block = TILE_SLOTS if plan is None else plan.block_size
    blocks = max(1, TILE_SLOTS // block)
    # Besides the stages there are the queries and a float32 result of each consumer.
    kept = QUERY_ROWS * head_dim * (k.dtype.itemsize + 4 * CONSUMERS)
    fitting = (MEMORY_BYTES - kept) // (2 * block * blocks * head_dim * k.dtype.itemsize)
    capacity = slots if plan is None else min(slots, plan.block_ids.shape[-1] * block)
    tiles = -(-capacity // (block * blocks))
    splits = max(1, min(WANTED_PROGRAMS // (batch * kv_heads), -(-tiles // CONSUMERS)))
    return _Tile(block, blocks, max(1, min(fitting, 8) // CONSUMERS) * CONSUMERS, CONSUMERS, splits)


def _attend_in_splits(
    queries: Float[Array, "B K 64 H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    plan: SelectionPlan | None,
    lengths: Int32[Array, " B"],
    scale: float | jax.Array,
    tokens: int,
    group: int,
    tile: _Tile,
) -> tuple[Float[Array, "B K parts rows H"], Float[Array, "B K parts 64"]]:
    """Partial outputs and log2-sum-exps of every consumer of every split; of the outputs only rows that count."""
    batch, kv_heads, _, head_dim = k.shape
    parts, rows = tile.splits * tile.consumers, -(-tokens * group // ALIGNMENT) * ALIGNMENT
    arrays = [queries, k, v, lengths, jnp.asarray(scale * LOG2_E, jnp.float32)[None]]
    if plan is not None:
        ids, counts, layer = plan.stacked()
        if not ids.shape[-1]:
            # Something to point at, even if nothing is ever selected.
            ids = jnp.zeros((*ids.shape[:-1], 1), jnp.int32)
        arrays += [ids, counts, layer]
    staged = (tile.stages, tile.slots, head_dim)
    kernel = plgpu.kernel(
        functools.partial(_attend, tile=tile, tokens=tokens, group=group, planned=plan is not None),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, parts, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, parts, QUERY_ROWS), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((QUERY_ROWS, head_dim), k.dtype),
            plgpu.SMEM(staged, k.dtype),
            plgpu.SMEM(staged, k.dtype),
            plgpu.SMEM((tile.consumers, QUERY_ROWS, head_dim), jnp.float32),
            plgpu.SMEM((tile.consumers, QUERY_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=1),
            plgpu.Barrier(num_arrivals=tile.blocks, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=tile.blocks, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=tile.stages),
        ),
        grid=(batch, kv_heads, tile.splits),
        grid_names=("batch", "head", "split"),
        num_threads=tile.consumers + 1,
        thread_name="warpgroup",
        kernel_name="mosaic_sparse_decode" if plan is not None else "mosaic_dense_decode",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=mosaic_gpu_interpreter() if interpreted() else False,
    )
    part, lse = kernel(*arrays)
    return part, lse


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
    planned: bool,
) -> None:
    """One program: a share of one kv head's blocks, brought by the last warpgroup, attended by the others."""
    inputs, (part_ref, lse_ref, q_smem, k_smem, v_smem, part_smem, lse_smem, *barriers) = refs[:-11], refs[-11:]
    ids_ref, count_ref, layer_ref = inputs if planned else (None, None, None)
    share = _find_share(length_ref, count_ref, layer_ref, tokens, tile)
    find = functools.partial(_find_block, share, ids_ref, tile=tile, slots=k_ref.shape[2])
    worker = lax.axis_index("warpgroup")

    @pl.when(worker == tile.consumers)
    def produce() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        source = [ref.at[share.batch, share.head] for ref in (k_ref, v_ref)]
        plgpu.copy_gmem_to_smem(q_ref.at[share.batch, share.head], q_smem, barriers[0])
        _produce(share, find, source, (k_smem, v_smem), barriers[1:], tile)

    @pl.when(worker < tile.consumers)
    def consume() -> None:
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        plgpu.barrier_wait(barriers[0])
        step = functools.partial(_step, share, find, q_smem, k_smem, v_smem, barriers[1:], scale_ref[0], group, tile)
        out, lse = _consume(share, step, worker, q_smem.shape, tile)
        part_smem[worker] = out
        lse_smem[worker] = lse
        plgpu.commit_smem()
        place = share.batch, share.head, lax.axis_index("split") * tile.consumers + worker
        plgpu.copy_smem_to_gmem(part_smem.at[worker, pl.ds(0, part_ref.shape[3])], part_ref.at[place])
        plgpu.copy_smem_to_gmem(lse_smem.at[worker], lse_ref.at[place])
        plgpu.wait_smem_to_gmem(0)


def _find_share(length_ref: Any, count_ref: Any, layer_ref: Any, tokens: int, tile: _Tile) -> _Share:
    """The share of this program: each split of a kv head takes the same number of tiles, the last ones what is left."""
    batch, head, split = (lax.axis_index(name) for name in ("batch", "head", "split"))
    length = length_ref[batch]
    first_new = length - tokens
    if count_ref is None:
        layer, past = None, _ceil_div(jnp.maximum(first_new, 0), tile.block)
    else:
        layer = layer_ref[0]
        past = count_ref[batch, layer, head]
    new = _ceil_div(jnp.maximum(length, 0) - _aligned(first_new), tile.block)
    total = past + new
    tiles = _ceil_div(total, tile.blocks)
    per_split = _ceil_div(tiles, tile.splits)
    begin = split * per_split
    mine = jnp.clip(tiles - begin, 0, per_split)
    return _Share(batch, layer, head, begin * tile.blocks, mine, past, total, first_new, length)


def _ceil_div(number: Any, divisor: int) -> Any:
    """Upward quotient of a number that is not negative."""
    return lax.div(number + (divisor - 1), jnp.int32(divisor))


def _aligned(slot: Any) -> Any:
    """The last place at or before a slot where a copy may begin."""
    return lax.div(jnp.maximum(slot, 0), jnp.int32(ALIGNMENT)) * ALIGNMENT


def _find_block(share: _Share, ids_ref: Any, number: Any, *, tile: _Tile, slots: int) -> _Block:
    """Where a block is. One beyond the last is somewhere in the cache, and none of its slots count."""
    is_past = number < share.past
    if ids_ref is None:
        planned = number * tile.block
    else:
        # The id of a block that is not planned is read all the same, wherever that is in the plan, and not used.
        place = jnp.clip(number, 0, ids_ref.shape[3] - 1)
        planned = ids_ref[share.batch, share.layer, share.head, place] * tile.block
    first_new = jnp.maximum(share.first_new, 0)
    begin = jnp.where(is_past, planned, _aligned(first_new) + (number - share.past) * tile.block)
    # A plan may reach into the new tokens, which are read once, as themselves.
    limit = jnp.where(is_past, first_new, jnp.where(number < share.total, share.length, 0))
    low = jnp.maximum(begin, jnp.where(is_past, 0, first_new))
    return _Block(jnp.clip(begin, 0, slots - tile.block), low, jnp.minimum(begin + tile.block, limit))


def _produce(share: _Share, find: Any, source: Any, staged: Any, barriers: Any, tile: _Tile) -> None:
    """Copies the share's blocks into the stages, each as soon as the tile that was there has been used."""
    arrived, used = barriers[:2], barriers[2]

    def starts(index: Any) -> tuple[Any, ...]:
        return tuple(find(share.begin + index * tile.blocks + j).start for j in range(tile.blocks))

    def copy(index: Any, found: tuple[Any, ...]) -> tuple[Any, ...]:
        stage = lax.rem(index, jnp.int32(tile.stages))

        @pl.when(index >= tile.stages)
        def wait() -> None:
            plgpu.barrier_wait(used.at[stage])

        for ref, smem, barrier in zip(source, staged, arrived, strict=True):
            for j, start in enumerate(found):
                rows = pl.ds(pl.multiple_of(start, ALIGNMENT), tile.block)
                plgpu.copy_gmem_to_smem(
                    ref.at[rows], smem.at[stage, pl.ds(j * tile.block, tile.block)], barrier.at[stage]
                )
        # The ids of the next tile are under way while this one's copies wait for room.
        return starts(index + 1)

    def drain(index: Any, _: None) -> None:
        plgpu.barrier_wait(used.at[lax.rem(index, jnp.int32(tile.stages))])

    lax.fori_loop(0, share.tiles, copy, starts(jnp.int32(0)))
    # A thread that waits for a barrier has to see all of its phases, says the interpreter.
    lax.fori_loop(jnp.maximum(share.tiles, tile.stages), share.tiles + tile.stages, drain, None)


def _consume(share: _Share, step: Any, worker: Any, shape: tuple[int, int], tile: _Tile) -> tuple[Any, Any]:
    """Output and log2-sum-exp over those of the share's tiles that are this consumer's."""
    rows, head_dim = shape
    start = (
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, head_dim), jnp.float32),
    )
    turns = lax.div(jnp.maximum(share.tiles - worker + tile.consumers - 1, 0), jnp.int32(tile.consumers))

    def turn(number: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        result: tuple[Any, Any, Any] = step(number * tile.consumers + worker, carry)
        return result

    top, weight, acc = lax.fori_loop(0, turns, turn, start)
    divisor = jnp.where(weight > 0, weight, 1.0)
    lse = jnp.where(weight > 0, top + jnp.log2(divisor), -jnp.inf)
    return acc / lax.broadcast_in_dim(divisor, (rows, head_dim), (0,)), lse


def _step(
    share: _Share,
    find: Any,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    barriers: Any,
    scale: Any,
    group: int,
    tile: _Tile,
    index: Any,
    carry: tuple[Any, Any, Any],
) -> tuple[Any, Any, Any]:
    """Online softmax, in powers of two, over one tile."""
    top, weight, acc = carry
    k_arrived, v_arrived, used = barriers
    stage = lax.rem(index, jnp.int32(tile.stages))
    first = share.begin + index * tile.blocks
    blocks = [find(first + j) for j in range(tile.blocks)]
    whole = functools.reduce(
        jnp.logical_and, [(b.low == b.start) & (b.high == b.start + tile.block) for b in blocks]
    ) & (first + tile.blocks <= share.past)
    plgpu.barrier_wait(k_arrived.at[stage])
    logits = _product(q_smem, k_smem.at[stage], transposed=True) * scale
    logits = lax.cond(whole, lambda x: x, lambda x: _hide(x, share, blocks, group, tile), logits)
    new_top, shift, chance = _weigh(top, logits)
    fade = jnp.exp2(top - shift)
    weight = weight * fade + jnp.sum(chance, axis=1)
    plgpu.barrier_wait(v_arrived.at[stage])

    @pl.when(jnp.logical_not(whole))
    def silence() -> None:
        # Slots that do not count may hold NaN, which a weight of zero would not silence.
        values = v_smem[stage]
        v_smem[stage] = jnp.where(_counts(values.shape, 0, blocks, tile), values, jnp.zeros_like(values))
        plgpu.commit_smem()

    seen = _product(chance.astype(v_smem.dtype), v_smem.at[stage], transposed=False)
    plgpu.barrier_arrive(used.at[stage])
    return new_top, weight, acc * lax.broadcast_in_dim(fade, acc.shape, (0,)) + seen


def _weigh(top: Any, logits: Any) -> tuple[Any, Any, Any]:
    """The new maximum of each row, a finite number to subtract, and the powers of two of what is left."""
    new_top = jnp.maximum(top, jnp.max(logits, axis=1))
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    return new_top, shift, jnp.exp2(logits - lax.broadcast_in_dim(shift, logits.shape, (0,)))


def _slot_of(shape: tuple[int, int], axis: int, values: list[Any], tile: _Tile) -> Any:
    """Spreads one number per block along the axis of a tile's slots."""
    number = lax.broadcasted_iota(jnp.int32, shape, axis)
    spread = jnp.full(shape, values[0], jnp.int32)
    for j, value in enumerate(values[1:], 1):
        spread = jnp.where(number >= j * tile.block, value, spread)
    return spread


def _counts(shape: tuple[int, int], axis: int, blocks: list[_Block], tile: _Tile) -> Any:
    """Whether each slot of a tile counts."""
    place = lax.broadcasted_iota(jnp.int32, shape, axis)
    low = _slot_of(shape, axis, [b.low - b.start + j * tile.block for j, b in enumerate(blocks)], tile)
    high = _slot_of(shape, axis, [b.high - b.start + j * tile.block for j, b in enumerate(blocks)], tile)
    return (place >= low) & (place < high)


def _hide(logits: Any, share: _Share, blocks: list[_Block], group: int, tile: _Tile) -> Any:
    """The logits, -inf where a slot does not count or comes after the query."""
    row = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    place = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    offset = _slot_of(logits.shape, 1, [b.start - j * tile.block for j, b in enumerate(blocks)], tile)
    position = lax.div(row, jnp.full_like(row, group)) + share.first_new
    visible = _counts(logits.shape, 1, blocks, tile) & (place + offset <= position)
    return jnp.where(visible, logits, -jnp.inf)


def _product(a: Any, b_ref: Any, *, transposed: bool) -> Any:
    """Float32 matrix product with a reference in shared memory; the first factor may be one too."""
    if interpreted():
        # The interpreter has the instruction for some kinds of operands only.
        a, b = (a[...] if hasattr(a, "at") and not isinstance(a, jax.Array) else a), b_ref[...]
        return jnp.dot(a, b.T if transposed else b, preferred_element_type=jnp.float32)
    rows = a.shape[0]
    columns = b_ref.shape[0] if transposed else b_ref.shape[1]

    def multiply(acc_ref: Any) -> Any:
        plgpu.wgmma(acc_ref, a, plgpu.transpose_ref(b_ref, (1, 0)) if transposed else b_ref)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32))
