"""Prefill attention for NVIDIA Hopper, as a kernel of Pallas's Mosaic GPU lowering.

One program attends with two neighbouring blocks of one head's queries, one for each of two warpgroups; a third has the
copy engine bring tiles of keys and values into shared memory ahead of them. The two take turns: while one multiplies,
the other is at its softmax (FlashAttention-3, arXiv 2407.08608). Tiles that all queries see whole need no mask.
Programs with the longest way start first.

On an H100 in bfloat16 it does 590 to 630 TFLOP/s of causal arithmetic at 32k and 128k tokens with H 128, as many as
cuDNN, and 460 with H 64 (scripts/results/prefill-nvidia-h100).
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

from specattn_kernels.common import LOG2_E, interpreted
from specattn_kernels.mosaic_gpu.compat import mosaic_gpu_interpreter
from specattn_kernels.mosaic_gpu.limits import ALIGNMENT, PREFILL_TILE_SLOTS
from specattn_kernels.types import AttentionOutput

CONSUMERS = 2
# Registers per thread: the producer gives to the consumers what it does not need.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


class _Tile(NamedTuple):
    """How a program works.

    Attributes:
        tokens: queries of one consumer.
        slots: of a step.
        stages: steps that have room in shared memory.
    """

    tokens: int
    slots: int
    stages: int


# Measured on an H100: half the slots, or twice the tokens, take 20 to 40 % longer.
TILES = {head_dim: _Tile(64, slots, 2) for head_dim, slots in PREFILL_TILE_SLOTS.items()}


class _Way(NamedTuple):
    """Where one program is, and how far its queries see.

    Attributes:
        batch: sequence.
        head: query head.
        begin: first token.
        first: slot of the first token.
        limit: slots in use.
        steps: of the program.
        whole: steps whose slots all queries see.
    """

    batch: Any
    head: Any
    begin: Any
    first: Any
    limit: Any
    steps: Any
    whole: Any


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
    tile, tokens = TILES[q.shape[3]], q.shape[1]
    q = jnp.pad(q, ((0, 0), (0, -tokens % (tile.tokens * CONSUMERS)), (0, 0), (0, 0)))
    factor = jnp.asarray(scale, jnp.float32) * LOG2_E
    out, lse = _attend_in_blocks(q, k, v, starts, limits, factor, tile=tile, interpret=interpreted())
    return AttentionOutput(out[:, :tokens], lse[:, :tokens] if return_lse else None)


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
    """Output and lse; `scale` is that of logits in powers of two, and T is a multiple of a program's queries."""
    batch, tokens, heads, head_dim = q.shape
    blocks = tokens // (tile.tokens * CONSUMERS)
    staged = (tile.stages, tile.slots, head_dim)
    kernel = plgpu.kernel(
        functools.partial(_attend, tile=tile, group=heads // k.shape[1], blocks=blocks),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((CONSUMERS, tile.tokens, head_dim), q.dtype),
            plgpu.SMEM(staged, k.dtype),
            plgpu.SMEM(staged, k.dtype),
            plgpu.SMEM((CONSUMERS, tile.tokens), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=1, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=1),
        ),
        # The last axis is the fastest: the heads that share keys run at the same time.
        grid=(batch, blocks, heads),
        grid_names=("batch", "block", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="mosaic_prefill",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=mosaic_gpu_interpreter() if interpret else False,
    )
    out, lse = kernel(q, k, v, starts, limits, scale[None])
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
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    lse_smem: Any,
    q_arrived: Any,
    k_arrived: Any,
    v_arrived: Any,
    k_used: Any,
    v_used: Any,
    turn: Any,
    *,
    tile: _Tile,
    group: int,
    blocks: int,
) -> None:
    """One program: the last warpgroup copies, the others attend."""
    worker = lax.axis_index("warpgroup")
    way = _find_way(start_ref, limit_ref, blocks, tile)

    @pl.when(worker == CONSUMERS)
    def produce() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        kv_head = lax.div(way.head, jnp.int32(group))
        source = [ref.at[way.batch, kv_head] for ref in (k_ref, v_ref)]
        _produce(way, source, (k_smem, v_smem), (k_arrived, v_arrived), (k_used, v_used), tile)

    @pl.when(worker < CONSUMERS)
    def consume() -> None:
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        rows = pl.ds(way.begin + worker * tile.tokens, tile.tokens)
        plgpu.copy_gmem_to_smem(q_ref.at[way.batch, rows, way.head], q_smem.at[worker], q_arrived.at[worker])
        plgpu.barrier_wait(q_arrived.at[worker])
        step = functools.partial(
            _step, way, worker, q_smem.at[worker], (k_smem, v_smem), (k_arrived, v_arrived), (k_used, v_used), turn
        )
        out, lse = _consume(way, functools.partial(step, scale_ref[0], k_ref.shape[2], tile), turn, worker, tile, q_ref)
        q_smem[worker] = out.astype(q_smem.dtype)
        lse_smem[worker] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[worker], out_ref.at[way.batch, rows, way.head])
        plgpu.copy_smem_to_gmem(lse_smem.at[worker], lse_ref.at[way.batch, way.head, rows])
        plgpu.wait_smem_to_gmem(0)


def _find_way(start_ref: Any, limit_ref: Any, blocks: int, tile: _Tile) -> _Way:
    """The way of this program."""
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    size = tile.tokens * CONSUMERS
    begin = (blocks - 1 - lax.axis_index("block")) * size
    first, limit = start_ref[batch] + begin, limit_ref[batch]
    # A block of nothing but padding has no way to go.
    end = jnp.where(first < limit, jnp.minimum(first + size, limit), 0)
    steps = lax.div(end + (tile.slots - 1), jnp.int32(tile.slots))
    whole = lax.div(jnp.maximum(jnp.minimum(first + 1, end), 0), jnp.int32(tile.slots))
    return _Way(batch, head, begin, first, limit, steps, whole)


def _tile_start(index: Any, slots: int, tile: _Tile) -> Any:
    """Where a step's tile begins: the last one of a cache is moved back inside it."""
    return jnp.minimum(index * tile.slots, slots - tile.slots)


def _produce(way: _Way, source: Any, staged: Any, arrived: Any, used: Any, tile: _Tile) -> None:
    """Copies the tiles into the stages, each as soon as what was there has been used."""

    def copy(index: Any, _: None) -> None:
        stage = lax.rem(index, jnp.int32(tile.stages))
        for ref, smem, is_there, is_free in zip(source, staged, arrived, used, strict=True):

            @pl.when(index >= tile.stages)
            def wait(is_free: Any = is_free) -> None:
                plgpu.barrier_wait(is_free.at[stage])

            start = pl.multiple_of(_tile_start(index, ref.shape[0], tile), ALIGNMENT)
            plgpu.copy_gmem_to_smem(ref.at[pl.ds(start, tile.slots)], smem.at[stage], is_there.at[stage])

    def drain(index: Any, _: None) -> None:
        for is_free in used:
            plgpu.barrier_wait(is_free.at[lax.rem(index, jnp.int32(tile.stages))])

    lax.fori_loop(0, way.steps, copy, None)
    # A thread that waits for a barrier has to see all of its phases, says the interpreter.
    lax.fori_loop(jnp.maximum(way.steps, tile.stages), way.steps + tile.stages, drain, None)


def _take_turns(turn: Any) -> None:
    """Gives the tensor cores to the other consumer, and waits until it gives them back."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _consume(way: _Way, step: Any, turn: Any, worker: Any, tile: _Tile, q_ref: Any) -> tuple[Any, Any]:
    """Output and log2-sum-exp of one consumer's queries."""
    size, head_dim = tile.tokens, q_ref.shape[3]
    carry = (
        jnp.full((size,), -jnp.inf, jnp.float32),
        jnp.zeros((size,), jnp.float32),
        jnp.zeros((size, head_dim), jnp.float32),
    )
    # The second consumer is half a step behind.
    pl.when(worker == 1)(functools.partial(_take_turns, turn))
    carry = lax.fori_loop(0, way.whole, functools.partial(step, False), carry)
    top, total, acc = lax.fori_loop(way.whole, way.steps, functools.partial(step, True), carry)
    pl.when(worker == 0)(functools.partial(_take_turns, turn))
    divisor = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log2(divisor), -jnp.inf)
    return acc / lax.broadcast_in_dim(divisor, acc.shape, (0,)), lse


def _step(
    way: _Way,
    worker: Any,
    queries: Any,
    staged: Any,
    arrived: Any,
    used: Any,
    turn: Any,
    scale: Any,
    slots: int,
    tile: _Tile,
    masked: bool,
    index: Any,
    carry: tuple[Any, Any, Any],
) -> tuple[Any, Any, Any]:
    """Online softmax, in powers of two, over one tile."""
    (top, total, acc), (k_smem, v_smem) = carry, staged
    stage = lax.rem(index, jnp.int32(tile.stages))
    plgpu.barrier_wait(arrived[0].at[stage])
    logits = _product(queries, k_smem.at[stage], turn)
    plgpu.barrier_arrive(used[0].at[stage])
    if masked:
        logits = _hide(logits, way, worker, index, slots, tile)
    new_top = jnp.maximum(top, jnp.max(logits, axis=1) * scale)
    # A row sees slot 0 in the first step already, unless it sees nothing at all.
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
    fade = jnp.exp2(top - shift)
    chance = jnp.exp2(logits * scale - lax.broadcast_in_dim(shift, logits.shape, (0,)))
    total = total * fade + jnp.sum(chance, axis=1)
    acc = acc * lax.broadcast_in_dim(fade, acc.shape, (0,))
    weights = chance.astype(v_smem.dtype)
    acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(arrived[1].at[stage])
    if masked:
        _silence(v_smem.at[stage], _tile_start(index, slots, tile), way.limit, tile)
    plgpu.barrier_wait(turn)
    acc = _accumulate(acc, weights, v_smem.at[stage])
    plgpu.barrier_arrive(used[1].at[stage])
    return new_top, total, acc


def _hide(logits: Any, way: _Way, worker: Any, index: Any, slots: int, tile: _Tile) -> Any:
    """The logits, -inf where a slot is not in use, comes after the query or was in the tile before."""
    slot = _tile_start(index, slots, tile) + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    position = way.first + worker * tile.tokens + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    visible = (slot <= position) & (slot < way.limit) & (slot >= index * tile.slots)
    return jnp.where(visible, logits, -jnp.inf)


def _silence(values: Any, start: Any, limit: Any, tile: _Tile) -> None:
    """Zeroes values that are not in use: they may be NaN, which a weight of zero would not silence.

    Both consumers do so, and write the same.
    """

    @pl.when(start + tile.slots > limit)
    def clear() -> None:
        for at in range(0, tile.slots, 64):
            rows = pl.ds(at, 64)
            part = values[rows]
            slot = start + at + lax.broadcasted_iota(jnp.int32, part.shape, 0)
            values[rows] = jnp.where(slot < limit, part, jnp.zeros_like(part))
        plgpu.commit_smem()


def _product(queries: Any, keys: Any, turn: Any) -> Any:
    """Float32 logits; the other consumer has its turn while they come."""
    if interpreted():
        # The interpreter has the instruction for some kinds of operands only.
        logits = jnp.dot(queries[...], keys[...].T, preferred_element_type=jnp.float32)
        _take_turns(turn)
        return logits

    def multiply(acc_ref: Any) -> Any:
        plgpu.wgmma(acc_ref, queries, plgpu.transpose_ref(keys, (1, 0)))
        _take_turns(turn)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((queries.shape[0], keys.shape[0]), jnp.float32))


def _accumulate(acc: Any, weights: Any, values: Any) -> Any:
    """Adds the weighted values in float32."""
    if interpreted():
        return acc + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)

    def multiply(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, weights, values)

    return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(acc))
