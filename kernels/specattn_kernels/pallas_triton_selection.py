"""Top-p selection and compaction to block ids, as kernels of Pallas's Triton lowering.

Rows of at most ROW_SLOTS blocks: one launch, one program a row. It holds the row in registers, halves the bracket of
the threshold's bit pattern at most 31 times there, then goes over the row again, which is in the L2 cache by now, and
writes the ids. Device memory sees each score once and each id once: 8 bytes a block with float32 scores.

Longer rows take several programs each for the threshold (see `pallas_triton_long_rows`: 16 bytes a slot). Then XLA
turns the choice into a mask and the mask becomes ids: 11 bytes more.

With blocks of more than one slot XLA adds up the blocks first: 4 bytes a slot more, and all else is by that much less.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Int32

from specattn_kernels.common import block_sums, clean_scores, interpreted, mask_blocks
from specattn_kernels.pallas_triton_long_rows import threshold_of_long_rows
from specattn_kernels.pallas_triton_tiles import (
    LANES,
    bits_of,
    halve,
    in_lanes,
    load_clean,
    lower_bound,
    padded,
    places,
    ranked,
    tile_sum,
)
from specattn_kernels.types import SelectionPlan

# Longest row that one program holds: 64 numbers in each of 512 threads.
ROW_SLOTS = 1 << 15
# Slots whose ids are written in one step.
TILE_SLOTS = 1 << 12


def top_p_threshold(
    scores: Float[Array, "*rows S"],
    p: Float[Array, "*rows"],
    *,
    lengths: Int[Array, "*rows"] | None = None,
    method: str = "exact",
    steps: int = 10,
) -> Float[Array, "*rows"]:
    """The nucleus threshold of every row; see `api.top_p_threshold`.

    Raises:
        NotImplementedError: the method is linear, or the scores are beyond 32-bit addresses.
    """
    _check(scores, method, "top_p_threshold")
    rows, slots = scores.shape[:-1], scores.shape[-1]
    flat, shares = scores.reshape(-1, slots), p.reshape(-1)
    counts = jnp.full(shares.shape, slots, jnp.int32) if lengths is None else lengths.reshape(-1).astype(jnp.int32)
    if slots > ROW_SLOTS:
        return threshold_of_long_rows(flat, shares, counts).reshape(rows)
    (threshold,) = _select_in_rows(flat, shares, counts, None)
    return threshold.reshape(rows)


def select_blocks(
    scores: Float[Array, "B K S"],
    p: Float[Array, "B K"],
    lengths: Int32[Array, " B"],
    *,
    block_size: int = 1,
    num_sink: int = 0,
    num_recent: int = 0,
    method: str = "exact",
    steps: int = 10,
) -> SelectionPlan:
    """The blocks of the nucleus, the sinks and the recent window; see `api.select_blocks`.

    Raises:
        NotImplementedError: the method is linear, or the scores are beyond 32-bit addresses.
    """
    _check(scores, method, "select_blocks")
    block_scores = scores if block_size == 1 else block_sums(scores, lengths, block_size)
    batch, kv_heads, blocks = block_scores.shape
    per_row = jnp.repeat(lengths, kv_heads)
    forced = {"block_size": block_size, "num_sink": num_sink, "num_recent": num_recent}
    flat, shares = block_scores.reshape(-1, blocks), p.reshape(-1)
    if blocks > ROW_SLOTS:
        valid = -(-per_row // block_size)
        threshold = threshold_of_long_rows(flat, shares, valid).reshape(batch, kv_heads)
        clean = clean_scores(block_scores, valid.reshape(batch, kv_heads))
        return compact_blocks(mask_blocks(clean, threshold, lengths, **forced), block_size=block_size)
    _, ids, counts = _select_in_rows(flat, shares, per_row, forced)
    return SelectionPlan(ids[:, :blocks].reshape(batch, kv_heads, blocks), counts.reshape(batch, kv_heads), block_size)


def compact_blocks(mask: Bool[Array, "B K P"], *, block_size: int) -> SelectionPlan:
    """The plan of a mask; see `api.compact_blocks`.

    XLA counts the chosen blocks of every tile, so that each tile's program knows where its ids begin. 3 bytes a block
    are read and 4 written.
    """
    batch, kv_heads, blocks = mask.shape
    tile = min(TILE_SLOTS, padded(blocks))
    tiles = -(-blocks // tile)
    flags = jnp.pad(mask.reshape(-1, blocks), ((0, 0), (0, tiles * tile - blocks))).astype(jnp.int8)
    flags = flags.reshape(-1, tiles, tile // LANES, LANES)
    in_tile = flags.sum(axis=(2, 3), dtype=jnp.int32)
    before = jnp.cumsum(in_tile, axis=1) - in_tile
    counts = in_tile.sum(axis=1, keepdims=True)
    tile_of_row = pl.BlockSpec((None, None, tile // LANES, LANES), lambda r, t: (r, t, 0, 0))
    ids = pl.pallas_call(
        _write_tile,
        grid=flags.shape[:2],
        in_specs=[
            tile_of_row,
            pl.BlockSpec((None, None, 1), lambda r, t: (r, t, 0)),
            pl.BlockSpec((None, 1), lambda r, _: (r, 0)),
        ],
        out_specs=pl.BlockSpec((None, tiles * tile), lambda r, _: (r, 0)),
        out_shape=jax.ShapeDtypeStruct((flags.shape[0], tiles * tile), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpreted(),
        name="compact_blocks",
    )(flags, before[..., None], counts)
    return SelectionPlan(ids[:, :blocks].reshape(batch, kv_heads, blocks), counts.reshape(batch, kv_heads), block_size)


def _check(scores: jax.Array, method: str, op: str) -> None:
    """Refuses what the kernels cannot do."""
    if method != "exact":
        raise NotImplementedError(
            f"pallas_triton: {op} with method {method!r}; expected 'exact'; use implementation='xla' for the other."
        )
    if scores.size >= 1 << 31:
        raise NotImplementedError(
            f"pallas_triton: {op} of {scores.size} scores; expected fewer than 2 ** 31; select for fewer rows at a "
            "time, or use implementation='xla'."
        )


def _write_tile(flags_ref: Any, before_ref: Any, count_ref: Any, ids_ref: Any) -> None:
    """One tile of a mask to ids."""
    lines = flags_ref.shape[0]
    place = places(lines, pl.program_id(1) * (lines * LANES))
    chosen = flags_ref[...].astype(jnp.int32) > 0
    ids_ref[ranked(chosen, place, before_ref[0], count_ref[0])] = place


def _select_in_rows(
    scores: Float[Array, "rows P"],
    shares: Float[Array, " rows"],
    lengths: Int32[Array, " rows"],
    forced: dict[str, int] | None,
) -> tuple[Array, ...]:
    """Thresholds [rows], and with `forced` (block size, sinks, recent) also ids [rows, >= P] and counts [rows].

    One program a row.
    """
    rows, blocks = scores.shape
    width = padded(blocks)
    lines = width // LANES
    one = pl.BlockSpec((None, 1), lambda r: (r, 0))
    out_specs, out_shape = [one], [jax.ShapeDtypeStruct((rows, 1), jnp.float32)]
    if forced is not None:
        out_specs += [pl.BlockSpec((None, width), lambda r: (r, 0)), one]
        out_shape += [jax.ShapeDtypeStruct((rows, width), jnp.int32), jax.ShapeDtypeStruct((rows, 1), jnp.int32)]
    threshold, *plan = pl.pallas_call(
        functools.partial(_select_in_row, blocks=blocks, lines=lines, forced=forced),
        grid=(rows,),
        in_specs=[pl.BlockSpec((None, lines, LANES), lambda r: (r, 0, 0)), one, one],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=max(4, min(16, width // 1024))),
        interpret=interpreted(),
        name="select_in_rows",
    )(in_lanes(scores), shares[:, None], lengths[:, None])
    if forced is None:
        return (threshold[:, 0],)
    ids, counts = plan
    return threshold[:, 0], ids, counts[:, 0]


def _select_in_row(
    scores_ref: Any,
    share_ref: Any,
    length_ref: Any,
    threshold_ref: Any,
    *plan_refs: Any,
    blocks: int,
    lines: int,
    forced: dict[str, int] | None,
) -> None:
    """One whole row: the threshold, then what it chooses."""
    share, length = share_ref[0], length_ref[0]
    block_size = 1 if forced is None else forced["block_size"]
    valid = (length + block_size - 1) // block_size
    scores = load_clean(scores_ref, places(lines), valid, blocks)
    bits = bits_of(scores)
    total = tile_sum(scores)
    low = lower_bound(share, total, blocks)
    high = jnp.maximum(jnp.max(jnp.max(bits, axis=0)), low) + 1
    wanted = share * total
    enough_at = halve(low, high, lambda bound: tile_sum(jnp.where(bits >= bound, scores, 0.0)) >= wanted)
    # The smallest score that is chosen, in place of a bound that may lie between two.
    smallest = jnp.min(jnp.min(jnp.where(bits >= enough_at, scores, jnp.inf), axis=0))
    threshold = jnp.where((share >= 1.0) | (smallest == jnp.inf), 0.0, smallest)
    threshold_ref[0] = threshold
    if forced is None:
        return

    def choose(part: jax.Array, place: jax.Array) -> jax.Array:
        start = place * block_size
        chosen = (part >= threshold) | (start < forced["num_sink"])
        if forced["num_recent"]:
            chosen |= start + block_size > length - forced["num_recent"]
        return chosen & (start < length) & (place < blocks)

    ids_ref, count_ref = plan_refs
    count = tile_sum(choose(scores, places(lines)).astype(jnp.int32))
    count_ref[0] = count
    step_lines = min(lines, TILE_SLOTS // LANES)

    def write(step: jax.Array, before: jax.Array) -> jax.Array:
        place = places(step_lines, step * (step_lines * LANES))
        part = load_clean(scores_ref.at[pl.ds(step * step_lines, step_lines)], place, valid, blocks)
        chosen = choose(part, place)
        ids_ref[ranked(chosen, place, before, count)] = place
        return before + tile_sum(chosen.astype(jnp.int32))

    lax.fori_loop(0, lines // step_lines, write, jnp.int32(0))
