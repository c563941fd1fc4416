"""Top-p selection and compaction to block ids, as kernels of Pallas's Triton lowering.

Rows of at most ROW_SLOTS blocks: one program a row holds the row in registers, halves the bracket of the threshold's
bit pattern there until a single score is left in it, and counts what is chosen. A second launch, several programs a
row, writes the ids. 12 bytes a block with float32 scores.

Longer rows take several programs each for the threshold (see `pallas_triton_long_rows`: 16 bytes a slot). Then XLA
turns the choice into a mask and the mask becomes ids: 11 bytes more.

With blocks of more than one slot XLA adds up the blocks first: 4 bytes a slot more, and all else is by that much less.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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

# Longest row that one program holds: 128 numbers in each of 256 threads.
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


class _Row(NamedTuple):
    """What turns scores of a row into a choice; all but the numbers of the row are static.

    Attributes:
        threshold: of the nucleus.
        length: valid slots.
        blocks: in the row.
        block_size: slots of a block.
        num_sink: slots at the beginning that are always chosen.
        num_recent: slots at the end that are.
    """

    threshold: Any
    length: Any
    blocks: int
    block_size: int
    num_sink: int
    num_recent: int

    def choose(self, scores: jax.Array, place: jax.Array) -> jax.Array:
        """Which blocks of a tile the plan has."""
        start = place * self.block_size
        chosen = (scores >= self.threshold) | (start < self.num_sink)
        if self.num_recent:
            chosen |= start + self.block_size > self.length - self.num_recent
        return chosen & (start < self.length) & (place < self.blocks)

    @property
    def valid(self) -> Any:
        """Blocks with valid slots."""
        return (self.length + self.block_size - 1) // self.block_size


def _select_in_rows(
    scores: Float[Array, "rows P"],
    shares: Float[Array, " rows"],
    lengths: Int32[Array, " rows"],
    forced: dict[str, int] | None,
) -> tuple[Array, ...]:
    """Thresholds [rows], and with `forced` (block size, sinks, recent) also ids [rows, >= P] and counts [rows].

    One program a row finds the threshold.
    """
    rows, blocks = scores.shape
    width = padded(blocks)
    lines = width // LANES
    lanes, lengths = in_lanes(scores), lengths[:, None]
    one = pl.BlockSpec((None, 1), lambda r: (r, 0))
    out_specs, out_shape = [one], [jax.ShapeDtypeStruct((rows, 1), jnp.float32)]
    if forced is not None:
        out_specs.append(pl.BlockSpec((None, lines), lambda r: (r, 0)))
        out_shape.append(jax.ShapeDtypeStruct((rows, lines), jnp.int32))
    threshold, *in_line = pl.pallas_call(
        functools.partial(_select_in_row, blocks=blocks, lines=lines, forced=forced),
        grid=(rows,),
        in_specs=[pl.BlockSpec((None, lines, LANES), lambda r: (r, 0, 0)), one, one],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=max(4, min(8, width // 1024))),
        interpret=interpreted(),
        name="select_in_rows",
    )(lanes, shares[:, None], lengths)
    if forced is None:
        return (threshold[:, 0],)
    ids, counts = _write_chosen(lanes, threshold, lengths, in_line[0], blocks, forced)
    return threshold[:, 0], ids, counts


def _select_in_row(
    scores_ref: Any,
    share_ref: Any,
    length_ref: Any,
    threshold_ref: Any,
    *count_refs: Any,
    blocks: int,
    lines: int,
    forced: dict[str, int] | None,
) -> None:
    """One whole row: the threshold, then how many blocks of each line it chooses."""
    share, length = share_ref[0], length_ref[0]
    plain = {"block_size": 1, "num_sink": 0, "num_recent": 0}
    row = _Row(None, length, blocks, **(plain if forced is None else forced))
    scores = load_clean(scores_ref, places(lines), row.valid, blocks)
    bits = bits_of(scores)
    total = tile_sum(scores)
    low = lower_bound(share, total, blocks)
    high = jnp.maximum(jnp.max(jnp.max(bits, axis=0)), low) + 1
    wanted = share * total
    enough_at = halve(low, high, lambda bound: tile_sum(jnp.where(bits >= bound, scores, 0.0)), wanted, total)
    # The smallest score that is chosen, in place of a bound that may lie between two.
    smallest = jnp.min(jnp.min(jnp.where(bits >= enough_at, scores, jnp.inf), axis=0))
    threshold = jnp.where((share >= 1.0) | (smallest == jnp.inf), 0.0, smallest)
    threshold_ref[0] = threshold
    if forced is not None:
        chosen = row._replace(threshold=threshold).choose(scores, places(lines))
        count_refs[0][...] = jnp.sum(chosen.astype(jnp.int32), axis=1)


def _write_chosen(
    lanes: Float[Array, "rows lines 128"],
    threshold: Float[Array, "rows 1"],
    lengths: Int32[Array, "rows 1"],
    in_line: Int32[Array, "rows lines"],
    blocks: int,
    forced: dict[str, int],
) -> tuple[Int32[Array, "rows width"], Int32[Array, " rows"]]:
    """Ids and counts of what the thresholds choose, several programs a row."""
    rows, lines = in_line.shape
    step_lines = min(lines, TILE_SLOTS // LANES)
    one = pl.BlockSpec((None, 1), lambda r, _: (r, 0))
    ids, counts = pl.pallas_call(
        functools.partial(_write_chosen_tile, blocks=blocks, forced=forced),
        grid=(rows, lines // step_lines),
        in_specs=[
            pl.BlockSpec((None, step_lines, LANES), lambda r, t: (r, t, 0)),
            one,
            one,
            pl.BlockSpec((None, lines), lambda r, _: (r, 0)),
        ],
        out_specs=[pl.BlockSpec((None, lines * LANES), lambda r, _: (r, 0)), one],
        out_shape=[
            jax.ShapeDtypeStruct((rows, lines * LANES), jnp.int32),
            jax.ShapeDtypeStruct((rows, 1), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpreted(),
        name="write_chosen",
    )(lanes, threshold, lengths, in_line)
    return ids, counts[:, 0]


def _write_chosen_tile(
    scores_ref: Any,
    threshold_ref: Any,
    length_ref: Any,
    in_line_ref: Any,
    ids_ref: Any,
    count_ref: Any,
    *,
    blocks: int,
    forced: dict[str, int],
) -> None:
    """One tile of a row; every program of the row writes the same count."""
    lines, tile = scores_ref.shape[0], pl.program_id(1)
    row = _Row(threshold_ref[0], length_ref[0], blocks, **forced)
    in_line = in_line_ref[...]
    line = lax.broadcasted_iota(jnp.int32, in_line.shape, 0)
    count, before = jnp.sum(in_line), jnp.sum(jnp.where(line < tile * lines, in_line, 0))
    place = places(lines, tile * (lines * LANES))
    chosen = row.choose(load_clean(scores_ref, place, row.valid, blocks), place)
    ids_ref[ranked(chosen, place, before, count)] = place
    count_ref[0] = count
