"""Top-p selection and compaction to block ids, as kernels of Pallas's Triton lowering.

First the thresholds and how many blocks every part of a row has: one program a row does both while it holds the row
(`triton.short_rows`); where rows are too long for that, several programs do either (`triton.long_rows` for the
thresholds). Then several programs a row write the ids, each knowing from the counts where its own begin. Scores are
read twice, or four times if the row is long; of the ids only those are written that are chosen.

With blocks of more than one slot XLA adds up the blocks first, in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Int32

from specattn_kernels.common import block_sums, interpreted, wanted_blocks
from specattn_kernels.triton.long_rows import threshold_of_long_rows
from specattn_kernels.triton.short_rows import fits_one_program, select_in_rows
from specattn_kernels.triton.tiles import (
    LANES,
    Choice,
    Span,
    in_lanes,
    load_lines,
    padded,
    places,
    ranked,
    scatter,
)
from specattn_kernels.types import SelectionPlan

# Slots whose ids are written in one step, and the warps that do it.
TILE_SLOTS = 1 << 12
WRITE_WARPS = 4


def top_p_threshold(
    scores: Float[Array, "*rows S"],
    p: Float[Array, "*rows"],
    *,
    lengths: Int[Array, "*rows"] | None = None,
    method: str = "exact",
    steps: int = 10,
) -> Float[Array, "*rows"]:
    """The nucleus threshold of every row; see `api.top_p_threshold`."""
    rows, slots = scores.shape[:-1], scores.shape[-1]
    flat, shares = scores.reshape(-1, slots), p.reshape(-1)
    counts = jnp.full(shares.shape, slots, jnp.int32) if lengths is None else lengths.reshape(-1).astype(jnp.int32)
    if fits_one_program(slots):
        return select_in_rows(flat, shares, counts, None, "mass")[0].reshape(rows)
    return threshold_of_long_rows(flat, shares, counts, "mass").reshape(rows)


def select_blocks(
    scores: Float[Array, "B *layers K S"],
    p: Float[Array, "B *layers K"],
    lengths: Int32[Array, " B"],
    *,
    block_size: int = 1,
    num_sink: int = 0,
    num_recent: int = 0,
    method: str = "exact",
    steps: int = 10,
    measure: str = "mass",
    capacity: int | None = None,
) -> SelectionPlan:
    """The blocks of the nucleus, the sinks and the recent window; see `api.select_blocks`."""
    block_scores = scores if block_size == 1 else block_sums(scores, lengths, block_size)
    *rows, blocks = block_scores.shape
    capacity = blocks if capacity is None else capacity
    choice = Choice(blocks, block_size, num_sink, num_recent, capacity)
    per_row, flat = jnp.repeat(lengths, math.prod(rows[1:])), block_scores.reshape(-1, blocks)
    valid = -(-per_row // block_size)
    wanted = p.reshape(-1) if measure == "mass" else wanted_blocks(p.reshape(-1), valid)
    if fits_one_program(blocks):
        threshold, in_part = select_in_rows(flat, wanted, per_row, choice, measure)
    else:
        threshold, in_part = threshold_of_long_rows(flat, wanted, valid, measure), None
    ids, counts = _write_chosen(flat, threshold, per_row, in_part, choice)
    return SelectionPlan(ids.reshape(*rows, capacity), counts.reshape(rows), block_size)


def compact_blocks(mask: Bool[Array, "*rows P"], *, block_size: int) -> SelectionPlan:
    """The plan of a mask; see `api.compact_blocks`.

    XLA counts the chosen blocks of every tile, so that each tile's program knows where its ids begin. 3 bytes a block
    are read, and 4 written for each that is chosen.
    """
    *rows, blocks = mask.shape
    tile = min(TILE_SLOTS, padded(blocks))
    tiles = -(-blocks // tile)
    flags = jnp.pad(mask.reshape(-1, blocks), ((0, 0), (0, tiles * tile - blocks))).astype(jnp.int8)
    flags = flags.reshape(-1, tiles, tile // LANES, LANES)
    in_tile = flags.sum(axis=(2, 3), dtype=jnp.int32)
    before = jnp.cumsum(in_tile, axis=1) - in_tile
    ids = pl.pallas_call(
        _write_tile_of_mask,
        grid=flags.shape[:2],
        in_specs=[
            pl.BlockSpec((None, None, tile // LANES, LANES), lambda r, t: (r, t, 0, 0)),
            pl.BlockSpec((None, None, 1), lambda r, t: (r, t, 0)),
        ],
        out_specs=pl.BlockSpec((None, blocks), lambda r, _: (r, 0)),
        out_shape=jax.ShapeDtypeStruct((flags.shape[0], blocks), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=WRITE_WARPS),
        interpret=interpreted(),
        name="compact_blocks",
    )(flags, before[..., None])
    counts = in_tile.sum(axis=1).reshape(rows)
    return SelectionPlan(ids.reshape(mask.shape), counts, block_size)


def _write_tile_of_mask(flags_ref: Any, before_ref: Any, ids_ref: Any) -> None:
    """One tile of a mask to ids."""
    lines = flags_ref.shape[0]
    chosen = flags_ref[...].astype(jnp.int32) > 0
    scatter(ids_ref, places(lines, pl.program_id(1) * (lines * LANES)), ranked(chosen, before_ref[0]), chosen)


def _write_chosen(
    scores: Float[Array, "rows P"],
    threshold: Float[Array, " rows"],
    lengths: Int32[Array, " rows"],
    in_part: Int32[Array, "rows parts"] | None,
    choice: Choice,
) -> tuple[Int32[Array, "rows capacity"], Int32[Array, " rows"]]:
    """Ids and counts of what the thresholds choose, several programs a row.

    `in_part` says how many blocks of each line of a row are chosen; what is None is counted first, tile by tile.
    """
    rows, width = scores.shape[0], padded(choice.blocks)
    lines = min(width, TILE_SLOTS) // LANES
    tiles = width // LANES // lines
    lanes, threshold, lengths = in_lanes(scores), threshold[:, None], lengths[:, None]
    tile, one = pl.BlockSpec((None, lines, LANES), lambda r, t: (r, t, 0)), pl.BlockSpec((None, 1), lambda r, _: (r, 0))
    settings: dict[str, Any] = {
        "compiler_params": plgpu.CompilerParams(num_warps=WRITE_WARPS),
        "interpret": interpreted(),
    }
    if in_part is None:
        in_part = pl.pallas_call(
            functools.partial(_count_chosen_of_tile, choice=choice),
            grid=(rows, tiles),
            in_specs=[tile, one, one],
            out_specs=pl.BlockSpec((None, 1), lambda r, t: (r, t)),
            out_shape=jax.ShapeDtypeStruct((rows, tiles), jnp.int32),
            name="count_chosen",
            **settings,
        )(lanes, threshold, lengths)
    parts = in_part.shape[1]
    ids, counts = pl.pallas_call(
        functools.partial(_write_chosen_of_tile, choice=choice, tiles=tiles),
        grid=(rows, tiles),
        in_specs=[tile, one, one, pl.BlockSpec((None, parts), lambda r, _: (r, 0))],
        out_specs=[pl.BlockSpec((None, choice.capacity), lambda r, _: (r, 0)), one],
        out_shape=[
            jax.ShapeDtypeStruct((rows, choice.capacity), jnp.int32),
            jax.ShapeDtypeStruct((rows, 1), jnp.int32),
        ],
        name="write_chosen",
        **settings,
    )(lanes, threshold, lengths, in_part)
    return ids, counts[:, 0]


def _choose(scores_ref: Any, tile: Any, threshold: Any, span: Span) -> tuple[jax.Array, jax.Array]:
    """Which blocks of a tile of a row are chosen, and their places in the row.

    Scores need no cleaning: what would become 0 reaches no threshold, but for that of 0, for which the span is all.
    """
    lines = scores_ref.shape[0]
    place = places(lines, tile * (lines * LANES))
    scores = load_lines(scores_ref, tile * (lines * LANES), span.valid).astype(jnp.float32)
    return span.choose(scores >= threshold, place), place


def _count_chosen_of_tile(
    scores_ref: Any, threshold_ref: Any, length_ref: Any, count_ref: Any, *, choice: Choice
) -> None:
    """How many blocks of a tile are chosen."""
    threshold = threshold_ref[0]
    chosen, _ = _choose(scores_ref, pl.program_id(1), threshold, choice.span(length_ref[0], threshold))
    count_ref[0] = jnp.sum(jnp.sum(chosen.astype(jnp.int32), axis=0))


def _write_chosen_of_tile(
    scores_ref: Any,
    threshold_ref: Any,
    length_ref: Any,
    in_part_ref: Any,
    ids_ref: Any,
    count_ref: Any,
    *,
    choice: Choice,
    tiles: int,
) -> None:
    """Ids of one tile of a row; every program of the row writes the same count."""
    tile, threshold, in_part = pl.program_id(1), threshold_ref[0], in_part_ref[...]
    tile_of_part = lax.broadcasted_iota(jnp.int32, in_part.shape, 0) // (in_part.shape[0] // tiles)
    count, before = jnp.sum(in_part), jnp.sum(jnp.where(tile_of_part < tile, in_part, 0))
    count_ref[0] = jnp.minimum(count, choice.capacity)

    @pl.when(jnp.sum(jnp.where(tile_of_part == tile, in_part, 0)) > 0)
    def write() -> None:
        span = choice.span(length_ref[0], threshold)
        chosen, place = _choose(scores_ref, tile, threshold, span)
        target, fits = choice.slot_in_plan(ranked(chosen, before), count, span.valid - span.recent)
        scatter(ids_ref, place, target, chosen & fits)
