"""Top-p selection and compaction to block ids, as kernels of Pallas's Triton lowering.

Rows of at most ROW_SLOTS blocks: one launch, one program a row. It holds the row in registers, halves the bracket of
the threshold's bit pattern at most 31 times there, then goes over the row again, which is in the L2 cache by now, and
writes the ids. Device memory sees each score once and each id once: 8 bytes a block with float32 scores.

Longer rows take several programs each and five launches beside the sums that XLA makes between them. Every pass reads
all scores: their sum (XLA), NARROWINGS passes that try WAYS - 1 thresholds at once and so leave 1 / WAYS ** NARROWINGS
of the bracket, and one that keeps the scores inside what is left, in practice a few in a hundred. A last launch, one
program a row, halves the rest of the bracket over those. Then the choice becomes a mask (XLA) and the mask ids. In
all 16 bytes a slot for the threshold, where scores are float32, and 11 more for the ids.

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

from specattn_kernels.common import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    block_sums,
    chosen_blocks,
    clean_scores,
    interpreted,
    row_sum,
)
from specattn_kernels.types import SelectionPlan

# Width of the two-axis tiles in which programs hold their part of a row: sums go along the other axis first, so that
# threads add up what they hold and rounding errors stay those of a short sum.
LANES = 128
# Longest row that one program holds: 64 numbers in each of 512 threads.
ROW_SLOTS = 1 << 15
# Slots of one program where a longer row is split.
CHUNK_SLOTS = 1 << 13
# Slots whose ids are written in one step.
TILE_SLOTS = 1 << 12
# Thresholds tried per pass over a long row, and passes: 15 of them take about as long to add up as a score to arrive.
WAYS = 16
NARROWINGS = 2
# Kept scores of every chunk that the last launch looks at in one step.
KEPT_COLUMNS = 512
# Nuclei above this share leave too little for a lower bound of their threshold to be safe from rounding.
BOUNDED_SHARE = 1 - 1e-4


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
        return _threshold_of_long_rows(flat, shares, counts).reshape(rows)
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
        threshold = _threshold_of_long_rows(flat, shares, valid).reshape(batch, kv_heads)
        clean = clean_scores(block_scores, valid.reshape(batch, kv_heads))
        return compact_blocks(chosen_blocks(clean, threshold, lengths, **forced), block_size=block_size)
    _, ids, counts = _select_in_rows(flat, shares, per_row, forced)
    return SelectionPlan(ids[:, :blocks].reshape(batch, kv_heads, blocks), counts.reshape(batch, kv_heads), block_size)


def compact_blocks(mask: Bool[Array, "B K P"], *, block_size: int) -> SelectionPlan:
    """The plan of a mask; see `api.compact_blocks`.

    XLA counts the chosen blocks of every tile, so that each tile's program knows where its ids begin. 3 bytes a block
    are read and 4 written.
    """
    batch, kv_heads, blocks = mask.shape
    tile = min(TILE_SLOTS, _padded(blocks))
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


def _padded(slots: int) -> int:
    """The next power of two, at least a few lines of lanes: what a tile can hold."""
    return max(8 * LANES, 1 << (slots - 1).bit_length())


def _in_lanes(scores: Float[Array, "rows S"]) -> Float[Array, "rows lines 128"]:
    """Rows as lines of lanes; copied only if their length is no multiple of a line."""
    rows, slots = scores.shape
    padding = -slots % LANES
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, padding)))
    return scores.reshape(rows, (slots + padding) // LANES, LANES)


def _places(lines: int, first: Any = 0) -> jax.Array:
    """Number of each slot of a tile within its row."""
    line = lax.broadcasted_iota(jnp.int32, (lines, LANES), 0)
    return first + line * LANES + lax.broadcasted_iota(jnp.int32, (lines, LANES), 1)


def _load_clean(ref: Any, place: jax.Array, valid: Any, slots: int) -> jax.Array:
    """As `clean_scores`, of a tile; what lies beyond the row is not read."""
    scores = plgpu.load(ref, mask=place < slots, other=0.0).astype(jnp.float32)
    keep = (scores >= FLOAT32_TINY) & (place < jnp.minimum(valid, slots))
    return jnp.where(keep, jnp.minimum(scores, FLOAT32_MAX / 2 / slots), 0.0)


def _sum(tile: jax.Array) -> jax.Array:
    """Sum of a tile: of its columns, then of those."""
    return jnp.sum(jnp.sum(tile, axis=0))


def _bits(x: Any) -> jax.Array:
    """The bit pattern, by which non-negative floats are ordered."""
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Any) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _lower_bound(share: jax.Array, total: jax.Array, slots: int) -> jax.Array:
    """Bits of a threshold whose set reaches the share for certain: all below it hold at most half of the remainder."""
    rest = jnp.where(share < BOUNDED_SHARE, jnp.clip(1.0 - share, 0.0, 1.0), 0.0)
    return _bits(rest * total * (0.5 / slots))


def _halve(low: jax.Array, high: jax.Array, reaches: Any) -> jax.Array:
    """The largest bit pattern in [low, high) that `reaches` holds for, if it does for `low` and not for `high`."""

    def step(_: jax.Array, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        enough_at, too_high = bracket
        middle = enough_at + (too_high - enough_at) // 2
        enough = reaches(middle)
        return jnp.where(enough, middle, enough_at), jnp.where(enough, too_high, middle)

    # The exponent of the width: it takes as many halvings as the width has digits, and none is left over beyond that.
    digits = (_bits((high - low).astype(jnp.float32)) >> 23) - 126
    return lax.fori_loop(0, jnp.clip(digits, 0, 31), step, (low, high))[0]


def _ranked(chosen: jax.Array, place: jax.Array, before: jax.Array, count: jax.Array) -> jax.Array:
    """Where each slot of a tile goes if the chosen ones of a row come first, all in order.

    `before` are chosen in earlier tiles and `count` in all. It is a permutation of the row's places, padding included:
    nothing is written twice and nothing left out.
    """
    flags = chosen.astype(jnp.int32)
    per_line = jnp.sum(flags, axis=1)
    rank = before + jnp.cumsum(flags, axis=1) + (jnp.cumsum(per_line, axis=0) - per_line)[:, None]
    return jnp.where(chosen, rank - 1, count + place - rank)


def _write_tile(flags_ref: Any, before_ref: Any, count_ref: Any, ids_ref: Any) -> None:
    """One tile of a mask to ids."""
    lines = flags_ref.shape[0]
    place = _places(lines, pl.program_id(1) * (lines * LANES))
    chosen = flags_ref[...].astype(jnp.int32) > 0
    ids_ref[_ranked(chosen, place, before_ref[0], count_ref[0])] = place


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
    width = _padded(blocks)
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
        compiler_params=plgpu.CompilerParams(num_warps=max(4, min(16, width // 2048))),
        interpret=interpreted(),
        name="select_in_rows",
    )(_in_lanes(scores), shares[:, None], lengths[:, None])
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
    scores = _load_clean(scores_ref, _places(lines), valid, blocks)
    bits = _bits(scores)
    total = _sum(scores)
    low = _lower_bound(share, total, blocks)
    high = jnp.maximum(jnp.max(jnp.max(bits, axis=0)), low) + 1
    wanted = share * total
    enough_at = _halve(low, high, lambda bound: _sum(jnp.where(bits >= bound, scores, 0.0)) >= wanted)
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
    count = _sum(choose(scores, _places(lines)).astype(jnp.int32))
    count_ref[0] = count
    step_lines = min(lines, TILE_SLOTS // LANES)

    def write(step: jax.Array, before: jax.Array) -> jax.Array:
        place = _places(step_lines, step * (step_lines * LANES))
        part = _load_clean(scores_ref.at[pl.ds(step * step_lines, step_lines)], place, valid, blocks)
        chosen = choose(part, place)
        ids_ref[_ranked(chosen, place, before, count)] = place
        return before + _sum(chosen.astype(jnp.int32))

    lax.fori_loop(0, lines // step_lines, write, jnp.int32(0))


def _threshold_of_long_rows(
    scores: Float[Array, "rows S"], shares: Float[Array, " rows"], lengths: Int32[Array, " rows"]
) -> Float[Array, " rows"]:
    """Thresholds where several programs share a row."""
    slots = scores.shape[1]
    total = row_sum(clean_scores(scores, lengths))
    # Where there is mass some is wanted, so that the largest score is in the nucleus whatever the share.
    wanted = jnp.maximum(shares * total, FLOAT32_TINY)
    low = _lower_bound(shares, total, slots)
    # No score is above their sum.
    high = jnp.maximum(_bits(total), low) + 1
    above = jnp.zeros_like(total)
    lanes = _in_lanes(scores)
    for _ in range(NARROWINGS):
        low, high, above = _narrow(lanes, lengths, slots, low, high, above, wanted)
    threshold = _finish(*_keep(lanes, lengths, slots, low, high), low, high, above, wanted)
    return jnp.where(shares >= 1.0, 0.0, threshold)


def _chunk_call(kernel: Any, lanes: jax.Array, slots: int, name: str) -> tuple[Any, dict[str, Any], int]:
    """What the passes over long rows have in common: their kernel, options of the call, and the number of chunks."""
    lines = min(CHUNK_SLOTS // LANES, _padded(slots) // LANES)
    chunks = -(-lanes.shape[1] // lines)
    options = {
        "grid": (lanes.shape[0], chunks),
        "compiler_params": plgpu.CompilerParams(num_warps=4),
        "interpret": interpreted(),
        "name": name,
    }
    return functools.partial(kernel, slots=slots, lines=lines), options, chunks


def _chunk_specs(lines: int, per_row: int) -> list[pl.BlockSpec]:
    """A chunk of scores, the row's length and some numbers of the row."""
    return [
        pl.BlockSpec((None, lines, LANES), lambda r, c: (r, c, 0)),
        pl.BlockSpec((None, 1), lambda r, _: (r, 0)),
        pl.BlockSpec((None, per_row), lambda r, _: (r, 0)),
    ]


def _narrow(
    lanes: Float[Array, "rows lines 128"],
    lengths: Int32[Array, " rows"],
    slots: int,
    low: Int32[Array, " rows"],
    high: Int32[Array, " rows"],
    above: Float[Array, " rows"],
    wanted: Float[Array, " rows"],
) -> tuple[Int32[Array, " rows"], Int32[Array, " rows"], Float[Array, " rows"]]:
    """The part of each bracket, one of WAYS, where the mass falls below what is wanted, and the mass above that."""
    kernel, options, chunks = _chunk_call(_mass_of_chunk, lanes, slots, "mass_above")
    step = (high - low + WAYS - 1) // WAYS
    bounds = jnp.minimum(low[:, None] + step[:, None] * jnp.arange(1, WAYS), high[:, None])
    partial = pl.pallas_call(
        kernel,
        in_specs=_chunk_specs(kernel.keywords["lines"], WAYS - 1),
        out_specs=pl.BlockSpec((None, None, WAYS - 1, LANES), lambda r, c: (r, c, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((lanes.shape[0], chunks, WAYS - 1, LANES), jnp.float32),
        **options,
    )(lanes, lengths[:, None], bounds)
    mass = partial.sum(axis=1).sum(axis=-1)
    # Masses fall from bound to bound, so the bounds that reach what is wanted are the first so many.
    reached = jnp.sum((mass >= wanted[:, None]) & (bounds < high[:, None]), axis=1, keepdims=True)
    mass = jnp.where(bounds < high[:, None], mass, above[:, None])
    edges = jnp.concatenate([low[:, None], bounds, high[:, None]], axis=1)
    mass_at_upper_edge = jnp.concatenate([mass, above[:, None]], axis=1)

    def pick(per_row: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take_along_axis(per_row, at, axis=1)[:, 0]

    return pick(edges, reached), pick(edges, reached + 1), pick(mass_at_upper_edge, reached)


def _mass_of_chunk(scores_ref: Any, length_ref: Any, bounds_ref: Any, mass_ref: Any, *, slots: int, lines: int) -> None:
    """Column sums of one chunk's scores at or above each of the bounds."""
    place = _places(lines, pl.program_id(1) * (lines * LANES))
    scores = _load_clean(scores_ref, place, length_ref[0], slots)
    bits = _bits(scores)
    for way in range(WAYS - 1):
        mass_ref[way, :] = jnp.sum(jnp.where(bits >= bounds_ref[way], scores, 0.0), axis=0)


def _keep(
    lanes: Float[Array, "rows lines 128"],
    lengths: Int32[Array, " rows"],
    slots: int,
    low: Int32[Array, " rows"],
    high: Int32[Array, " rows"],
) -> tuple[Float[Array, "rows chunks chunk"], Int32[Array, "rows chunks"]]:
    """Scores within the bracket, at the beginning of each chunk, and how many there are."""
    kernel, options, chunks = _chunk_call(_keep_of_chunk, lanes, slots, "keep_bracket")
    rows, lines = lanes.shape[0], kernel.keywords["lines"]
    # As many chunks as a tile of the next launch has; those that do not exist keep nothing.
    padded = 1 << (chunks - 1).bit_length()
    kept, counts = pl.pallas_call(
        kernel,
        in_specs=_chunk_specs(lines, 2),
        out_specs=[
            pl.BlockSpec((None, None, lines * LANES), lambda r, c: (r, c, 0)),
            pl.BlockSpec((None, None, 1), lambda r, c: (r, c, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, padded, lines * LANES), jnp.float32),
            jax.ShapeDtypeStruct((rows, chunks, 1), jnp.int32),
        ],
        **options,
    )(lanes, lengths[:, None], jnp.stack([low, high], axis=1))
    return kept, jnp.pad(counts[..., 0], ((0, 0), (0, padded - chunks)))


def _keep_of_chunk(
    scores_ref: Any, length_ref: Any, bracket_ref: Any, kept_ref: Any, count_ref: Any, *, slots: int, lines: int
) -> None:
    """One chunk's scores within the bracket, in their order; zeros never matter."""
    place = _places(lines, pl.program_id(1) * (lines * LANES))
    scores = _load_clean(scores_ref, place, length_ref[0], slots)
    bits = _bits(scores)
    keep = (bits >= jnp.maximum(bracket_ref[0], 1)) & (bits < bracket_ref[1])
    count = _sum(keep.astype(jnp.int32))
    plgpu.store(kept_ref.at[_ranked(keep, _places(lines), jnp.int32(0), count)], scores, mask=keep)
    count_ref[0] = count


def _finish(
    kept: Float[Array, "rows chunks chunk"],
    counts: Int32[Array, "rows chunks"],
    low: Int32[Array, " rows"],
    high: Int32[Array, " rows"],
    above: Float[Array, " rows"],
    wanted: Float[Array, " rows"],
) -> Float[Array, " rows"]:
    """Halves what is left of the brackets over the scores inside them, one program a row."""
    rows, chunks, chunk = kept.shape
    columns = min(KEPT_COLUMNS, chunk)
    pair = pl.BlockSpec((None, 2), lambda r: (r, 0))
    threshold = pl.pallas_call(
        functools.partial(_finish_row, columns=columns),
        grid=(rows,),
        in_specs=[
            pl.BlockSpec((None, chunks, chunk), lambda r: (r, 0, 0)),
            pl.BlockSpec((None, chunks), lambda r: (r, 0)),
            pair,
            pair,
        ],
        out_specs=pl.BlockSpec((None, 1), lambda r: (r, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=interpreted(),
        name="finish_threshold",
    )(kept, counts, jnp.stack([low, high], axis=1), jnp.stack([above, wanted], axis=1))
    return threshold[:, 0]


def _finish_row(kept_ref: Any, counts_ref: Any, bracket_ref: Any, mass_ref: Any, out_ref: Any, *, columns: int) -> None:
    """One row's kept scores, some columns of all chunks at a time."""
    counts = counts_ref[...]
    chunks = counts.shape[0]
    steps = pl.cdiv(jnp.max(counts), columns)
    above, wanted = mass_ref[0], mass_ref[1]

    def load(step: jax.Array) -> jax.Array:
        column = step * columns + lax.broadcasted_iota(jnp.int32, (chunks, columns), 1)
        here = column < counts[:, None]
        return plgpu.load(kept_ref.at[:, pl.ds(step * columns, columns)], mask=here, other=0.0)

    def mass(bound: jax.Array) -> jax.Array:
        def add(step: jax.Array, so_far: jax.Array) -> jax.Array:
            scores = load(step)
            return so_far + jnp.sum(jnp.where(_bits(scores) >= bound, scores, 0.0), axis=0)

        return above + jnp.sum(lax.fori_loop(0, steps, add, jnp.zeros((columns,), jnp.float32)))

    enough_at = _halve(bracket_ref[0], bracket_ref[1], lambda bound: mass(bound) >= wanted)

    def least(step: jax.Array, so_far: jax.Array) -> jax.Array:
        scores = load(step)
        inside = _bits(scores) >= jnp.maximum(enough_at, 1)
        return jnp.minimum(so_far, jnp.min(jnp.where(inside, scores, jnp.inf), axis=0))

    # The smallest score that is chosen, in place of a bound that may lie between two.
    smallest = jnp.min(lax.fori_loop(0, steps, least, jnp.full((columns,), jnp.inf, jnp.float32)))
    out_ref[0] = jnp.where(smallest == jnp.inf, _float(enough_at), smallest)
