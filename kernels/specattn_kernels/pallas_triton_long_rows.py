"""Thresholds of rows that several programs share, as kernels of Pallas's Triton lowering.

Every pass reads all scores: their sum (XLA), NARROWINGS passes that try WAYS - 1 thresholds at once and so leave
1 / WAYS ** NARROWINGS of the bracket, and one that keeps the scores inside what is left, in practice a few in 100.
A last launch, one program a row, halves the rest of the bracket over those. NARROWINGS + 2 launches beside the sums
that XLA makes between them; 4 * (NARROWINGS + 2) bytes a slot, and as many as are kept, where scores are float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from specattn_kernels.common import FLOAT32_TINY, clean_scores, interpreted, row_sum
from specattn_kernels.pallas_triton_tiles import (
    LANES,
    bits_of,
    float_of,
    halve,
    in_lanes,
    load_clean,
    lower_bound,
    padded,
    places,
    ranked,
    tile_sum,
)

# Slots of one program.
CHUNK_SLOTS = 1 << 13
# Thresholds tried per pass, and passes: 15 of them take about as long to add up as a score to arrive.
WAYS = 16
NARROWINGS = 2
# Kept scores of every chunk that the last launch looks at in one step.
KEPT_COLUMNS = 512


def threshold_of_long_rows(
    scores: Float[Array, "rows S"], shares: Float[Array, " rows"], lengths: Int32[Array, " rows"]
) -> Float[Array, " rows"]:
    """Thresholds where several programs share a row."""
    slots = scores.shape[1]
    total = row_sum(clean_scores(scores, lengths))
    # Where there is mass some is wanted, so that the largest score is in the nucleus whatever the share.
    wanted = jnp.maximum(shares * total, FLOAT32_TINY)
    low = lower_bound(shares, total, slots)
    # No score is above their sum.
    high = jnp.maximum(bits_of(total), low) + 1
    above = jnp.zeros_like(total)
    lanes = in_lanes(scores)
    for _ in range(NARROWINGS):
        low, high, above = _narrow(lanes, lengths, slots, low, high, above, wanted)
    threshold = _finish(*_keep(lanes, lengths, slots, low, high), low, high, above, wanted)
    return jnp.where(shares >= 1.0, 0.0, threshold)


def _chunk_call(kernel: Any, lanes: jax.Array, slots: int, name: str, warps: int) -> tuple[Any, dict[str, Any], int]:
    """What the passes over long rows have in common: their kernel, options of the call, and the number of chunks."""
    lines = min(CHUNK_SLOTS // LANES, padded(slots) // LANES)
    chunks = -(-lanes.shape[1] // lines)
    options = {
        "grid": (lanes.shape[0], chunks),
        "compiler_params": plgpu.CompilerParams(num_warps=warps),
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
    kernel, options, chunks = _chunk_call(_mass_of_chunk, lanes, slots, "mass_above", warps=4)
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
    place = places(lines, pl.program_id(1) * (lines * LANES))
    scores = load_clean(scores_ref, place, length_ref[0], slots)
    bits = bits_of(scores)
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
    kernel, options, chunks = _chunk_call(_keep_of_chunk, lanes, slots, "keep_bracket", warps=8)
    rows, lines = lanes.shape[0], kernel.keywords["lines"]
    # As many chunks as a tile of the next launch has; those that do not exist keep nothing.
    room = 1 << (chunks - 1).bit_length()
    kept, counts = pl.pallas_call(
        kernel,
        in_specs=_chunk_specs(lines, 2),
        out_specs=[
            pl.BlockSpec((None, None, lines * LANES), lambda r, c: (r, c, 0)),
            pl.BlockSpec((None, None, 1), lambda r, c: (r, c, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, room, lines * LANES), jnp.float32),
            jax.ShapeDtypeStruct((rows, chunks, 1), jnp.int32),
        ],
        **options,
    )(lanes, lengths[:, None], jnp.stack([low, high], axis=1))
    return kept, jnp.pad(counts[..., 0], ((0, 0), (0, room - chunks)))


def _keep_of_chunk(
    scores_ref: Any, length_ref: Any, bracket_ref: Any, kept_ref: Any, count_ref: Any, *, slots: int, lines: int
) -> None:
    """One chunk's scores within the bracket, in their order; zeros never matter."""
    place = places(lines, pl.program_id(1) * (lines * LANES))
    scores = load_clean(scores_ref, place, length_ref[0], slots)
    bits = bits_of(scores)
    keep = (bits >= jnp.maximum(bracket_ref[0], 1)) & (bits < bracket_ref[1])
    count = tile_sum(keep.astype(jnp.int32))
    plgpu.store(kept_ref.at[ranked(keep, places(lines), jnp.int32(0), count)], scores, mask=keep)
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
            return so_far + jnp.sum(jnp.where(bits_of(scores) >= bound, scores, 0.0), axis=0)

        return above + jnp.sum(lax.fori_loop(0, steps, add, jnp.zeros((columns,), jnp.float32)))

    enough_at = halve(bracket_ref[0], bracket_ref[1], lambda bound: mass(bound) >= wanted)

    def least(step: jax.Array, so_far: jax.Array) -> jax.Array:
        scores = load(step)
        inside = bits_of(scores) >= jnp.maximum(enough_at, 1)
        return jnp.minimum(so_far, jnp.min(jnp.where(inside, scores, jnp.inf), axis=0))

    # The smallest score that is chosen, in place of a bound that may lie between two.
    smallest = jnp.min(lax.fori_loop(0, steps, least, jnp.full((columns,), jnp.inf, jnp.float32)))
    out_ref[0] = jnp.where(smallest == jnp.inf, float_of(enough_at), smallest)
