"""Thresholds of rows that several programs share, as kernels of Pallas's Triton lowering.

Two passes read all scores: their sums, and one that keeps the scores inside a bracket around the threshold, in
practice a few in 100, and adds up those above it. The bracket comes from a sample: what lies *below* a threshold are
many small scores, so that a sample tells how much they have together; the few large ones that a sample misses only
matter for the sum. A last launch, one program a row, halves the bracket over what was kept. A sample can mislead; then
the mass above or in the bracket shows it, and the row's last program reads the whole row instead.
8 bytes a slot, and as many as are kept or sampled, where scores are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from specattn_kernels.common import FLOAT32_TINY, interpreted, power_of_two
from specattn_kernels.triton.tiles import (
    INFINITE_BITS,
    LANES,
    bits_of,
    clean,
    float_of,
    grain_of,
    halve,
    in_lanes,
    is_everything,
    load_lines,
    lower_bound,
    places,
    ranked,
    scatter,
    tile_sum,
    wanted_of,
    weigh,
)

# Slots of one program, and its warps.
TILE_SLOTS = 1 << 12
TILE_WARPS = 4
# The sample: so many scores of a row, a few in a place.
SAMPLED = 1 << 12
SAMPLED_TOGETHER = 4
# Standard errors of the sample that the bracket is wide to either side, and bits to which it is worth finding its ends.
DOUBT = 4.0
BRACKET_BITS = 1 << 13
# Kept scores that the last launch looks at in one step.
KEPT_TOGETHER = 1 << 13


class _Rows(NamedTuple):
    """Rows of scores.

    Attributes:
        scores: in lines of lanes.
        lengths: valid slots.
        wanted: share of the mass, or how many scores.
        slots: of a row, static.
        measure: what is wanted, static.
    """

    scores: Float[Array, "rows lines lanes"]
    lengths: Int32[Array, "rows 1"]
    wanted: Float[Array, "rows 1"]
    slots: int
    measure: str

    @property
    def room(self) -> int:
        """A power of two for the tiles, as some launches have a number of each in one tile."""
        return power_of_two(-(-self.slots // TILE_SLOTS))

    @property
    def settings(self) -> dict[str, Any]:
        """What kernels know of them."""
        return {"slots": self.slots, "measure": self.measure, "grain": grain_of(self.scores.dtype)}


class _Bracket(NamedTuple):
    """Where thresholds lie, in bits: likely, and for certain; what they have to reach, and the mass of all scores."""

    likely: Int32[Array, "rows 2"]
    ends: Int32[Array, "rows 2"]
    masses: Float[Array, "rows 2"]


class _Kept(NamedTuple):
    """What lies in the brackets, tile by tile; tiles beyond the row keep nothing.

    Attributes:
        scores: those in the bracket at the beginning of each tile's room.
        counts: how many.
        above: mass of the tile's scores above the bracket.
    """

    scores: Float[Array, "rows room slots"]
    counts: Int32[Array, "rows room"]
    above: Float[Array, "rows room"]


def threshold_of_long_rows(
    scores: Float[Array, "rows S"], wanted: Float[Array, " rows"], lengths: Int32[Array, " rows"], measure: str
) -> Float[Array, " rows"]:
    """Thresholds where several programs share a row; see `is_everything` for `wanted`."""
    row = _Rows(in_lanes(scores), lengths[:, None], wanted[:, None], scores.shape[1], measure)
    bracket = _sample(row, _sum(row))
    threshold = _finish(row, _keep(row, bracket), bracket)
    if measure == "count":
        # Its nucleus never has blocks without mass.
        threshold = jnp.where(bracket.masses[:, 1] > 0, threshold, jnp.inf)
    return jnp.where(is_everything(wanted, measure), 0.0, threshold)


def _sum(row: _Rows) -> Float[Array, "rows room"]:
    """Mass of every tile of the rows; tiles beyond the row have none."""
    rows = row.scores.shape[0]
    sums: jax.Array = pl.pallas_call(
        functools.partial(_sum_of_tile, **row.settings),
        grid=(rows, row.room),
        in_specs=[_tile_of_row(), pl.BlockSpec((None, 1), lambda r, _: (r, 0))],
        out_specs=pl.BlockSpec((None, 1), lambda r, t: (r, t)),
        out_shape=jax.ShapeDtypeStruct((rows, row.room), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=TILE_WARPS),
        interpret=interpreted(),
        name="sum_tiles",
    )(row.scores, row.lengths)
    return sums


def _tile_of_row() -> pl.BlockSpec:
    """The scores of one tile of a program's row."""
    return pl.BlockSpec((None, TILE_SLOTS // LANES, LANES), lambda r, t: (r, t, 0))


def _load_tile(scores_ref: Any, length_ref: Any, slots: int) -> jax.Array:
    """The clean scores of a program's tile."""
    first, valid = pl.program_id(1) * TILE_SLOTS, jnp.minimum(length_ref[0], slots)
    return clean(load_lines(scores_ref, first, valid), places(scores_ref.shape[0], first), valid, slots)


def _sum_of_tile(scores_ref: Any, length_ref: Any, sum_ref: Any, *, slots: int, measure: str, grain: int) -> None:
    """The mass of one tile."""
    scores = _load_tile(scores_ref, length_ref, slots)
    sum_ref[0] = tile_sum(weigh(scores, scores > 0, measure))


def _sample(row: _Rows, sums: Float[Array, "rows room"]) -> _Bracket:
    """Bits between which the thresholds are likely to lie, by samples, and those between which they do."""
    rows = row.scores.shape[0]
    one, pair = pl.BlockSpec((None, 1), lambda r: (r, 0)), pl.BlockSpec((None, 2), lambda r: (r, 0))
    bracket = pl.pallas_call(
        functools.partial(_sample_row, **row.settings),
        grid=(rows,),
        in_specs=[_whole_row(row), one, one, pl.BlockSpec((None, sums.shape[1]), lambda r: (r, 0))],
        out_specs=[pair, pair, pair],
        out_shape=[jax.ShapeDtypeStruct((rows, 2), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpreted(),
        name="sample_bracket",
    )(row.scores, row.lengths, row.wanted, sums)
    return _Bracket(*bracket)


def _whole_row(row: _Rows) -> pl.BlockSpec:
    """All scores of a program's row."""
    return pl.BlockSpec((None, *row.scores.shape[1:]), lambda r: (r, 0, 0))


def _sample_row(
    scores_ref: Any,
    length_ref: Any,
    wanted_ref: Any,
    sums_ref: Any,
    likely_ref: Any,
    ends_ref: Any,
    masses_ref: Any,
    *,
    slots: int,
    measure: str,
    grain: int,
) -> None:
    """One row's bracket, by halving the bit patterns for either end of it."""
    total = jnp.sum(sums_ref[...])
    # Where there is mass some is wanted, so that the largest score is in the nucleus whatever the share.
    wanted = jnp.maximum(wanted_of(wanted_ref[0], total, measure), FLOAT32_TINY)
    least = lower_bound(wanted_ref[0], total, slots, measure, grain)
    # No score is above the sum of all.
    beyond = _up(bits_of(total) + 1, grain) if measure == "mass" else jnp.int32(INFINITE_BITS)
    masses_ref[0], masses_ref[1] = wanted, total
    ends_ref[0], ends_ref[1] = least, beyond

    stride = -(-slots // (SAMPLED // SAMPLED_TOGETHER))
    number = lax.broadcasted_iota(jnp.int32, (SAMPLED,), 0)
    place = number // SAMPLED_TOGETHER * stride + number % SAMPLED_TOGETHER
    inside = jnp.minimum(place, slots - 1)
    scores = clean(scores_ref[inside // LANES, inside % LANES], place, length_ref[0], slots)
    bits = bits_of(scores)
    # What a score stands for, as a share of all.
    share = stride / SAMPLED_TOGETHER / jnp.maximum(total, FLOAT32_TINY)
    below = (total - wanted) / jnp.maximum(total, FLOAT32_TINY)

    def estimate(bound: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Share of the mass below a bound by the sample, and its error: all have that size at most, seen or not."""
        mass = jnp.sum(weigh(scores, (bits < bound) & (bits > 0), measure)) * share
        most = float_of(bound) * share if measure == "mass" else share
        return mass, DOUBT * jnp.sqrt(most * (mass + most))

    def wide(ends: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.maximum(ends[1] - ends[0], ends[3] - ends[2]) > max(BRACKET_BITS, 1 << grain)

    def step(ends: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        from_low, to_low, from_high, to_high = ends
        low, high = from_low + (to_low - from_low) // 2, from_high + (to_high - from_high) // 2
        mass, error = estimate(low)
        is_low = mass + error <= below
        mass, error = estimate(high)
        is_high = mass - error >= below
        return (
            jnp.where(is_low, low, from_low),
            jnp.where(is_low, to_low, low),
            jnp.where(is_high, from_high, high),
            jnp.where(is_high, high, to_high),
        )

    start: tuple[jax.Array, ...] = (least, beyond, least, beyond)
    low, _, _, high = lax.while_loop(wide, step, start)
    low = low >> grain << grain
    likely_ref[0], likely_ref[1] = low, jnp.maximum(_up(high, grain), low + (1 << grain))


def _up(bits: jax.Array, grain: int) -> jax.Array:
    """The next multiple of the grain."""
    return (bits + ((1 << grain) - 1)) >> grain << grain


def _keep(row: _Rows, bracket: _Bracket) -> _Kept:
    """Scores within the likely brackets, several programs a row."""
    rows, room = row.scores.shape[0], row.room
    per_tile = pl.BlockSpec((None, 1), lambda r, t: (r, t))
    kept = pl.pallas_call(
        functools.partial(_keep_of_tile, **row.settings),
        grid=(rows, room),
        in_specs=[
            _tile_of_row(),
            pl.BlockSpec((None, 1), lambda r, _: (r, 0)),
            pl.BlockSpec((None, 2), lambda r, _: (r, 0)),
        ],
        out_specs=[pl.BlockSpec((None, None, TILE_SLOTS), lambda r, t: (r, t, 0)), per_tile, per_tile],
        out_shape=[
            jax.ShapeDtypeStruct((rows, room, TILE_SLOTS), jnp.float32),
            *(jax.ShapeDtypeStruct((rows, room), dtype) for dtype in (jnp.int32, jnp.float32)),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=TILE_WARPS),
        interpret=interpreted(),
        name="keep_bracket",
    )(row.scores, row.lengths, bracket.likely)
    return _Kept(*kept)


def _keep_of_tile(
    scores_ref: Any,
    length_ref: Any,
    bracket_ref: Any,
    kept_ref: Any,
    count_ref: Any,
    above_ref: Any,
    *,
    slots: int,
    measure: str,
    grain: int,
) -> None:
    """A tile's scores within the bracket, in their order; zeros never matter."""
    scores = _load_tile(scores_ref, length_ref, slots)
    bits = bits_of(scores)
    above = bits >= bracket_ref[1]
    keep = (bits >= jnp.maximum(bracket_ref[0], 1)) & ~above
    scatter(kept_ref, scores, ranked(keep, jnp.int32(0)), keep)
    # Sums over lines are there already, for the ranks.
    count_ref[0] = jnp.sum(jnp.sum(keep.astype(jnp.int32), axis=1), axis=0)
    above_ref[0] = tile_sum(weigh(scores, above, measure))


def _finish(row: _Rows, kept: _Kept, bracket: _Bracket) -> Float[Array, " rows"]:
    """Halves the brackets over the scores inside them, one program a row."""
    rows, room = kept.counts.shape
    per_tile, pair = pl.BlockSpec((None, room), lambda r: (r, 0)), pl.BlockSpec((None, 2), lambda r: (r, 0))
    threshold = pl.pallas_call(
        functools.partial(_finish_row, **row.settings),
        grid=(rows,),
        in_specs=[
            _whole_row(row),
            pl.BlockSpec((None, 1), lambda r: (r, 0)),
            pl.BlockSpec((None, room, TILE_SLOTS), lambda r: (r, 0, 0)),
            *(per_tile, per_tile, pair, pair, pair),
        ],
        out_specs=pl.BlockSpec((None, 1), lambda r: (r, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=interpreted(),
        name="finish_threshold",
    )(row.scores, row.lengths, *kept, *bracket)
    return threshold[:, 0]


def _finish_row(
    scores_ref: Any,
    length_ref: Any,
    kept_ref: Any,
    counts_ref: Any,
    above_ref: Any,
    bracket_ref: Any,
    ends_ref: Any,
    mass_ref: Any,
    out_ref: Any,
    *,
    slots: int,
    measure: str,
    grain: int,
) -> None:
    """One row's threshold, from what was kept of it if the bracket holds, otherwise from all of it."""
    counts, above = counts_ref[...], jnp.sum(above_ref[...])
    room = counts.shape[0]
    columns = max(1, min(KEPT_TOGETHER // room, TILE_SLOTS))
    wanted, total = mass_ref[0], mass_ref[1]
    halve_over = functools.partial(_halve_over, wanted=wanted, total=total, measure=measure, grain=grain)

    def load_kept(step: Any) -> jax.Array:
        column = step * columns + lax.broadcasted_iota(jnp.int32, (room, columns), 1)
        here = kept_ref.at[:, pl.ds(step * columns, columns)]
        return plgpu.load(here, mask=column < counts[:, None], other=0.0)

    def load_any(step: Any) -> jax.Array:
        place = places(TILE_SLOTS // LANES, step * TILE_SLOTS)
        inside = jnp.minimum(place, slots - 1)
        return clean(scores_ref[inside // LANES, inside % LANES], place, length_ref[0], slots)

    def inside(step: Any, so_far: jax.Array) -> jax.Array:
        scores = load_kept(step)
        return so_far + jnp.sum(weigh(scores, scores > 0, measure), axis=0)

    steps = pl.cdiv(jnp.max(counts), columns)
    reached = above + jnp.sum(lax.fori_loop(0, steps, inside, jnp.zeros((columns,))))

    def from_kept() -> jax.Array:
        return halve_over(load_kept, steps, bracket_ref[0], bracket_ref[1], above)

    def from_all() -> jax.Array:
        return halve_over(load_any, pl.cdiv(slots, TILE_SLOTS), ends_ref[0], ends_ref[1], jnp.float32(0))

    out_ref[0] = lax.cond((above < wanted) & (reached >= wanted), from_kept, from_all)


def _halve_over(
    load: Callable[[Any], jax.Array],
    steps: Any,
    low: jax.Array,
    high: jax.Array,
    above: jax.Array,
    *,
    wanted: jax.Array,
    total: jax.Array,
    measure: str,
    grain: int,
) -> jax.Array:
    """The smallest score of the nucleus within a bracket; `load` gives tiles, step by step.

    In practice there is one, which stays where it is.
    """
    first = load(0)

    def mass(bound: jax.Array) -> jax.Array:
        def part(scores: jax.Array) -> jax.Array:
            return jnp.sum(weigh(scores, bits_of(scores) >= jnp.maximum(bound, 1), measure), axis=0)

        return above + jnp.sum(lax.fori_loop(1, steps, lambda step, so_far: so_far + part(load(step)), part(first)))

    enough_at = halve(low, high, mass, wanted, total, above, measure=measure, grain=grain)

    def least(scores: jax.Array) -> jax.Array:
        inside = bits_of(scores) >= jnp.maximum(enough_at, 1)
        return jnp.min(jnp.where(inside, scores, jnp.inf), axis=0)

    # The smallest score that is chosen, in place of a bound that may lie between two.
    smallest = jnp.min(
        lax.fori_loop(1, steps, lambda step, so_far: jnp.minimum(so_far, least(load(step))), least(first))
    )
    return jnp.where(smallest == jnp.inf, float_of(enough_at), smallest)
