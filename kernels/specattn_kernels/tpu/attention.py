"""Sparse and dense decode attention for TPUs, which copies blocks of the cache by hand.

One program attends to everything that one kv head reads, for all T * G query rows that use that head, so K and V are
read once. Its entries are the blocks of the new tokens followed by the plan's blocks (or all blocks of the cache where
there is no plan). They are copied in steps into one of two buffers while the other is computed on; the last step of a
program already copies for the next one, which knows its block ids because they are prefetched as scalars.
On a CPU they run under `pltpu.force_tpu_interpret_mode` alone, for tests: a program for a TPU may be compiled on a CPU
machine, so the machine says nothing about where it will run.

A tile is 128 lanes wide. With a head dim of 64 half of each row is padding, in the buffers and in the cache: XLA, which
would rather lay such a cache out with the slots along the lanes, converts it once per call of the compiled loop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from specattn_kernels.common import group_queries, ungroup
from specattn_kernels.tpu.limits import LANES, padded_rows, sublanes
from specattn_kernels.tpu.products import dot
from specattn_kernels.types import AttentionOutput, Scores, SelectionPlan

# K and V of one step. Reckoned, not measured: bandwidth times latency of a TPU's memory, which is 0.5 to 1.5 MB.
STEP_BYTES = 1 << 19
# Block ids that one call holds in scalar memory, of which a core has 1 MiB.
SCALAR_BYTES = 1 << 19
# Vector memory beyond the scores: what compilers grant unasked on the smallest TPUs.
VECTOR_BYTES = 16 << 20
# A slot that no query sees.
_NOWHERE = jnp.iinfo(jnp.int32).max


class _Tile(NamedTuple):
    """How a program works.

    Attributes:
        tokens: T, new tokens.
        group: G, query heads per kv head.
        rows: T * G query rows, padded to whole tiles.
        block: slots per copy.
        copies: most blocks per step.
        own: blocks that the new tokens may touch; 0 where the whole cache is read, which has them.
        capacity: P, room for block ids per kv head; 0 where the whole cache is read.
        scores: whether softmax weights are written.
        noted: first query rows whose logits are written, in the order of the entries; whole tiles of them.
    """

    tokens: int
    group: int
    rows: int
    block: int
    copies: int
    own: int
    capacity: int
    scores: bool
    noted: int = 0


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
    return _attention(q, k, v, plan.take_layer(), lengths, scale, memory, False, return_lse)


def _choose_tile(
    q: jax.Array, k: jax.Array, plan: SelectionPlan | None, return_scores: Scores, remembers: bool
) -> _Tile:
    """A tile for these shapes."""
    tokens, slots, head_dim = q.shape[1], k.shape[2], k.shape[3]
    group = q.shape[2] // k.shape[1]
    rows = padded_rows(tokens * group)
    lanes = -(-head_dim // LANES) * LANES
    step = max(LANES, STEP_BYTES // (2 * lanes * k.dtype.itemsize) // LANES * LANES)
    if plan is not None:
        own = 1 + -(-(tokens - 1) // plan.block_size)
        capacity = max(1, plan.block_ids.shape[2])
        # No longer steps than there can be entries.
        entries = -(-(own + capacity) * plan.block_size // LANES) * LANES
        copies = min(step, entries) // plan.block_size
        noted = padded_rows(group) if remembers else 0
        return _Tile(tokens, group, rows, plan.block_size, copies, own, capacity, scores=False, noted=noted)
    block = min(step, slots // LANES * LANES)
    return _Tile(tokens, group, rows, block, copies=1, own=0, capacity=0, scores=bool(return_scores))


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
    """Groups the queries by kv head, attends, and puts everything into the public layout."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group = heads // kv_heads
    tile = _choose_tile(q, k, plan, return_scores, memory is not None)
    queries = group_queries(q, kv_heads).reshape(batch * kv_heads, tokens * group, head_dim)
    queries = queries.astype(jnp.promote_types(q.dtype, k.dtype))
    queries = jnp.pad(queries, ((0, 0), (0, tile.rows - tokens * group), (0, 0)))
    results = _attend_to_heads(queries, k, v, plan, lengths, jnp.asarray(scale, jnp.float32), tile)
    first = tokens - 1 if return_scores == "newest" else 0

    def public(x: jax.Array, first: int = 0) -> jax.Array:
        """From [B * K, rows, ...] to [B, T, N, ...], from the token `first` on."""
        part = x[:, first * group : tokens * group]
        return ungroup(part.reshape(batch, kv_heads, tokens - first, group, *x.shape[2:]))

    scores = None
    if tile.scores:
        # The last block was moved back inside the cache, over slots that the one before has.
        steps = -(-slots // tile.block)
        last = (steps - 1) * tile.block
        weights = public(results[2], first)
        scores = jnp.concatenate([weights[..., :last], weights[..., steps * tile.block - (slots - last) :]], axis=-1)
    if memory is not None and plan is not None:
        total = jnp.where(results[1] > -jnp.inf, results[1], jnp.inf)[:, :group]
        first_listed, entries = tile.own * tile.block, plan.block_ids.shape[2] * tile.block
        weights = jnp.exp(results[2][:, :group, first_listed : first_listed + entries] - total).mean(axis=1)
        memory = _note(memory, weights, plan, lengths - tokens)
    return AttentionOutput(
        out=public(results[0]).astype(q.dtype),
        lse=public(results[1])[..., 0] if return_lse else None,
        scores=scores,
        memory=memory,
    )


def _note(
    memory: Float[Array, "B K S"], weights: Float[Array, "heads entries"], plan: SelectionPlan, past: Int32[Array, " B"]
) -> Float[Array, "B K S"]:
    """The memory with the weights of a plan's entries at their slots, as far as these are past."""
    heads, (_, kv_heads, slots), size = len(weights), memory.shape, plan.block_size
    listed = (jnp.arange(plan.block_ids.shape[2]) < plan.counts[..., None]).reshape(heads, -1, 1)
    begin = plan.block_ids.reshape(heads, -1, 1) * size
    # The last block of a cache that is no whole number of blocks was moved back inside it.
    slot = jnp.clip(begin, 0, slots - size) + jnp.arange(size)
    kept = listed & (slot >= begin) & (slot < jnp.repeat(past, kv_heads)[:, None, None])
    # What is not kept goes beyond the end, where nothing is written.
    place = jnp.where(kept, jnp.arange(heads)[:, None, None] * slots + slot, heads * slots)
    flat = memory.reshape(-1).at[place.reshape(-1)].set(weights.reshape(-1).astype(memory.dtype), mode="drop")
    return flat.reshape(memory.shape)


def _attend_to_heads(
    queries: Float[Array, "heads rows H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    plan: SelectionPlan | None,
    lengths: Int32[Array, " B"],
    scale: Float[Array, ""],
    tile: _Tile,
) -> list[jax.Array]:
    """Output, lse [heads, rows, 1] and perhaps scores or logits of all B * K heads.

    In as many calls as scalar memory wants.
    """
    heads = queries.shape[0]
    none = jnp.zeros((1,), jnp.int32)
    listed = none
    if plan is not None:
        # A plan without room for any block becomes one with room for one, because no array may be empty.
        more = tile.capacity - plan.block_ids.shape[2]
        listed = jnp.pad(plan.block_ids, ((0, 0), (0, 0), (0, more))).reshape(heads, tile.capacity)
    at_once = max(1, min(heads, SCALAR_BYTES // (4 * max(tile.capacity, 1))))
    parts = []
    for first in range(0, heads, at_once):
        part = slice(first, min(first + at_once, heads))
        ids = none if plan is None else listed[part].reshape(-1)
        counts = none if plan is None else plan.counts.reshape(-1)[part]
        parts.append(_call(lengths, counts, ids, scale[None], queries[part], k, v, tile=tile, first=first))
    return [jnp.concatenate(arrays) if len(parts) > 1 else arrays[0] for arrays in zip(*parts, strict=True)]


def _call(
    lengths: jax.Array,
    counts: jax.Array,
    ids: jax.Array,
    scale: jax.Array,
    queries: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    tile: _Tile,
    first: int,
) -> Sequence[jax.Array]:
    """Attends with the heads `first` onwards of all B * K."""
    heads, rows, head_dim = queries.shape
    slots, step = k.shape[2], tile.block * tile.copies
    shapes = [(rows, head_dim, queries.dtype), (rows, 1, jnp.float32)]
    vector_bytes = VECTOR_BYTES
    shown = rows if tile.scores else tile.noted
    if shown:
        columns = slots if tile.scores else (tile.own + tile.capacity) * tile.block
        width = -(-columns // step) * step
        shapes.append((shown, width, jnp.float32))
        vector_bytes += 2 * shown * width * 4

    def per_head(*size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *size), lambda head, *_: (head, 0, 0))

    # Not left open: XLA might copy a small cache into vector memory as a whole.
    where_it_lies = pl.BlockSpec(memory_space=pltpu.HBM)
    results: Sequence[jax.Array] = pl.pallas_call(
        functools.partial(_attend, tile=tile, first=first),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(heads,),
            in_specs=[per_head(rows, head_dim), where_it_lies, where_it_lies],
            out_specs=[per_head(*size) for *size, _ in shapes],
            scratch_shapes=[
                pltpu.VMEM((2, step, head_dim), k.dtype),
                pltpu.VMEM((2, step, head_dim), v.dtype),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((heads, *size), dtype) for *size, dtype in shapes],
        # One program copies for the next, so that their order matters.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=vector_bytes),
        name="sparse_decode" if tile.own else "dense_decode",
    )(lengths, counts, ids, scale, queries, k, v)
    return results


class _Scalars(NamedTuple):
    """References to what is known before a program begins: [B], [heads], [heads * P] and [1]."""

    lengths: Any
    counts: Any
    ids: Any
    scale: Any


class _Entry(NamedTuple):
    """One block to read: the slots `start` to `start + block - 1`, of which `low` to `high - 1` are attended."""

    start: jax.Array
    low: jax.Array
    high: jax.Array


class _Head:
    """What one program reads, in numbers: its entries and their copies."""

    def __init__(self, head: Any, scalars: _Scalars, k_ref: Any, tile: _Tile, first: int) -> None:
        kv_heads, self.slots = k_ref.shape[1:3]
        self.index, self.scalars, self.tile = head, scalars, tile
        self.batch, self.kv_head = lax.div(first + head, kv_heads), lax.rem(first + head, kv_heads)
        self.length = scalars.lengths[self.batch]
        self.first_new = self.length - tile.tokens
        self.total = tile.own + scalars.counts[head] if tile.own else _ceil_div(self.length, tile.block)
        # Also a program with nothing to read takes its turn with the buffers.
        self.steps = jnp.maximum(_ceil_div(self.total, tile.copies), 1)

    def entry(self, index: Any) -> _Entry:
        """Where entry `index` lies; beyond the last, it has no slots to attend."""
        tile = self.tile
        if tile.own:
            is_new = index < tile.own
            listed = self.scalars.ids[self.index * tile.capacity + jnp.clip(index - tile.own, 0, tile.capacity - 1)]
            block = jnp.where(is_new, lax.div(jnp.maximum(self.first_new, 0), tile.block) + index, listed)
            # A plan may reach into the new tokens, which are read once, as themselves.
            least, most = jnp.where(is_new, self.first_new, 0), jnp.where(is_new, self.length, self.first_new)
        else:
            block, least, most = index, jnp.int32(0), self.length
        begin = block * tile.block
        low = jnp.maximum(begin, least)
        high = jnp.where(index < self.total, jnp.minimum(begin + tile.block, most), low)
        # The last block of a cache that is no whole number of blocks is moved back inside it.
        return _Entry(jnp.clip(begin, 0, self.slots - tile.block), low, high)

    def present(self, step: Any) -> jax.Array:
        """How many blocks the step reads."""
        return jnp.clip(self.total - step * self.tile.copies, 0, self.tile.copies)

    def copy(self, source: Any, target: Any, semaphore: Any, step: Any, place: Any) -> Any:
        """The copy of the step's block number `place` to its place in a buffer."""
        size = self.tile.block
        start = pl.multiple_of(self.entry(step * self.tile.copies + place).start, sublanes(source.dtype))
        here = target.at[pl.ds(pl.multiple_of(place * size, sublanes(source.dtype)), size)]
        return pltpu.make_async_copy(source.at[self.batch, self.kv_head, pl.ds(start, size)], here, semaphore)

    def wait(self, source: Any, target: Any, semaphore: Any, step: Any) -> None:
        """Waits for all of a step's copies: they end in any order, and one wait says only that one of them has."""

        def one(place: Any, _: None) -> None:
            self.copy(source, target, semaphore, step, place).wait()

        lax.fori_loop(0, self.present(step), one, None)


def _attend(
    lengths_ref: Any,
    counts_ref: Any,
    ids_ref: Any,
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *refs: Any,
    tile: _Tile,
    first: int,
) -> None:
    """One kv head: online softmax over its entries, step by step."""
    k_buffer, v_buffer, turn_ref, semaphores = refs[-4:]
    program, programs = pl.program_id(0), pl.num_programs(0)
    scalars = _Scalars(lengths_ref, counts_ref, ids_ref, scale_ref)
    head = _Head(program, scalars, k_ref, tile, first)
    following = _Head(jnp.minimum(program + 1, programs - 1), scalars, k_ref, tile, first)

    def start(of: _Head, step: Any, turn: Any) -> None:
        def one(place: Any, _: None) -> None:
            of.copy(k_ref, k_buffer.at[turn], semaphores.at[0, turn], step, place).start()
            of.copy(v_ref, v_buffer.at[turn], semaphores.at[1, turn], step, place).start()

        lax.fori_loop(0, of.present(step), one, None)

    @pl.when(program == 0)
    def begin() -> None:
        turn_ref[0] = 0
        start(head, 0, 0)

    first_turn = turn_ref[0]
    row = lax.broadcasted_iota(jnp.int32, (tile.rows, 1), 0)
    position = head.first_new + lax.div(row, tile.group)

    def step(index: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, total, acc = carry
        turn = lax.rem(first_turn + index, 2)
        is_last = index + 1 == head.steps

        @pl.when(jnp.logical_not(is_last))
        def copy_next_step() -> None:
            start(head, index + 1, 1 - turn)

        @pl.when(is_last & (program + 1 < programs))
        def copy_for_next_program() -> None:
            start(following, 0, 1 - turn)

        head.wait(k_ref, k_buffer.at[turn], semaphores.at[0, turn], index)
        logits = dot(q_ref[...], k_buffer[turn], contract=1) * scale_ref[0]
        logits = jnp.where(_slots(head, index) <= position, logits, -jnp.inf)
        if tile.scores:
            refs[0][:, pl.ds(pl.multiple_of(index * tile.block, LANES), tile.block)] = logits
        if tile.noted:
            size = tile.copies * tile.block
            refs[0][:, pl.ds(pl.multiple_of(index * size, LANES), size)] = logits[: tile.noted]
        new_top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        fade, chance = jnp.exp(top - shift), jnp.exp(logits - shift)
        head.wait(v_ref, v_buffer.at[turn], semaphores.at[1, turn], index)
        _clear_values(head, v_buffer.at[turn], index)
        acc = acc * fade + dot(chance.astype(q_ref.dtype), v_buffer[turn], contract=0)
        return new_top, total * fade + jnp.sum(chance, axis=1, keepdims=True), acc

    start_state = jnp.full(row.shape, -jnp.inf), jnp.zeros(row.shape), jnp.zeros(q_ref.shape, jnp.float32)
    top, total, acc = lax.fori_loop(0, head.steps, step, start_state)
    turn_ref[0] = lax.rem(first_turn + head.steps, 2)
    divisor = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (acc / divisor).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(total > 0, top + jnp.log(divisor), -jnp.inf)
    if tile.scores:
        _write_scores(refs[0], head, jnp.where(total > 0, top + jnp.log(divisor), 0.0))


def _slots(head: _Head, step: Any) -> Int32[Array, "1 step"]:
    """The slot of every column of a step; one that no query sees where the column is not to be attended."""
    tile = head.tile
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    columns = []
    for begin in range(0, tile.block * tile.copies, LANES):
        slots = jnp.full((1, LANES), _NOWHERE)
        for place in range(begin // tile.block, -(-(begin + LANES) // tile.block)):
            entry = head.entry(step * tile.copies + place)
            within = begin - place * tile.block + lane
            slot = entry.start + within
            here = (within >= 0) & (within < tile.block) & (slot >= entry.low) & (slot < entry.high)
            slots = jnp.where(here, slot, slots)
        columns.append(slots)
    return jnp.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]


def _clear_values(head: _Head, buffer: Any, step: Any) -> None:
    """Zeroes the values that are not to be attended: they may be NaN, which no weight of 0 silences."""
    tile = head.tile

    def one(place: Any, _: None) -> None:
        entry = head.entry(step * tile.copies + place)

        @pl.when((entry.low > entry.start) | (entry.high < entry.start + tile.block))
        def clear() -> None:
            here = pl.ds(pl.multiple_of(place * tile.block, sublanes(buffer.dtype)), tile.block)
            values = buffer[here].astype(jnp.float32)
            slot = entry.start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
            buffer[here] = jnp.where((slot >= entry.low) & (slot < entry.high), values, 0.0).astype(buffer.dtype)

    lax.fori_loop(0, tile.copies, one, None)


def _write_scores(scores_ref: Any, head: _Head, lse: Float[Array, "rows 1"]) -> None:
    """Turns the logits that the steps left into softmax weights, and what no step came to into zeros."""
    size = head.tile.block

    def one(step: Any, _: None) -> None:
        here = pl.ds(pl.multiple_of(step * size, LANES), size)
        weights = jnp.exp(scores_ref[:, here] - lse)
        scores_ref[:, here] = jnp.where(step < head.steps, weights, 0.0)

    lax.fori_loop(0, scores_ref.shape[1] // size, one, None)


def _ceil_div(a: jax.Array, b: int) -> jax.Array:
    """How many times `b` it takes to reach `a`, which is not negative: without the sign that `//` looks at."""
    return lax.div(a + b - 1, b)
