"""Pieces that the Triton selection kernels share: rows as tiles of lines of lanes, bit patterns, bisection, ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, DTypeLike, Float

from specattn_kernels.common import clean_scores, power_of_two, recent_blocks

# Width of the two-axis tiles in which programs hold their part of a row: sums go along the other axis first, so that
# threads add up what they hold and rounding errors stay those of a short sum.
LANES = 128
# Nuclei above this share leave too little for a lower bound of their threshold to be safe from rounding.
BOUNDED_SHARE = 1 - 1e-4
# Error of a sum of a row's scores, relative to the sum of all.
ROUNDING = 1e-6
# Bits of the smallest and of no normal float.
TINY_BITS, INFINITE_BITS = 0x00800000, 0x7F800000


class Choice(NamedTuple):
    """What a plan has besides the nucleus, and room for; all static.

    Attributes:
        blocks: in a row.
        block_size: slots of a block.
        num_sink: slots at the beginning that are always chosen.
        num_recent: slots at the end that are.
        capacity: blocks that the plan has room for.
    """

    blocks: int
    block_size: int
    num_sink: int
    num_recent: int
    capacity: int

    def span(self, length: Any, threshold: Any) -> Span:
        """Which blocks of a row with `length` valid slots are chosen whatever their score."""
        size = self.block_size
        valid = jnp.minimum((length + size - 1) // size, self.blocks)
        # Zero chooses all that is valid, also what is no number.
        sinks = jnp.where(threshold == 0, valid, jnp.minimum(-(-self.num_sink // size), valid))
        return Span(sinks, valid - recent_blocks(length, size, self.num_recent), valid)

    def slot_in_plan(self, rank: jax.Array, count: jax.Array, recent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the chosen block with a rank goes, and whether there is room for it; see `common.fit_mask`.

        Args:
            rank: of a chosen block among the `count` chosen ones of its row.
            count: of them.
            recent: how many of those, the last, are of the recent window.
        """
        if self.capacity >= self.blocks:
            return rank, rank >= 0
        is_recent = rank >= count - recent
        place = jnp.where(is_recent, rank - jnp.maximum(count - self.capacity, 0), rank)
        return place, (place >= 0) & (is_recent | (rank < self.capacity - recent))


class Span(NamedTuple):
    """Blocks that are chosen in any case: those before `sinks`, and from `recent` on as far as they are `valid`."""

    sinks: Any
    recent: Any
    valid: Any

    def after(self, place: Any) -> Span:
        """The same blocks by their places after a place."""
        return Span(*(end - place for end in self))

    def choose(self, in_nucleus: jax.Array, place: jax.Array) -> jax.Array:
        """Which blocks of a tile are chosen; `in_nucleus` may hold anything for those that are not valid."""
        return (in_nucleus | (place < self.sinks) | (place >= self.recent)) & (place < self.valid)


def padded(slots: int) -> int:
    """The next power of two, at least a few lines of lanes: what a tile can hold."""
    return max(8 * LANES, power_of_two(slots))


def in_lanes(scores: Float[Array, "rows S"]) -> Float[Array, "rows lines lanes"]:
    """Rows as lines of lanes; copied only if their length is no multiple of a line."""
    rows, slots = scores.shape
    padding = -slots % LANES
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, padding)))
    return scores.reshape(rows, (slots + padding) // LANES, LANES)


def places(lines: int, first: Any = 0) -> jax.Array:
    """Number of each slot of a tile within its row."""
    line = lax.broadcasted_iota(jnp.int32, (lines, LANES), 0)
    return first + line * LANES + lax.broadcasted_iota(jnp.int32, (lines, LANES), 1)


def load_lines(ref: Any, first: Any, valid: Any) -> jax.Array:
    """The lines of a tile with valid slots; others hold zeros. `first` is the place of the tile's first slot.

    A mask that is the same for a whole line lets threads load 16 bytes at a time.
    """
    line = lax.broadcasted_iota(jnp.int32, (ref.shape[0],), 0)
    mask = jnp.broadcast_to((first + line * LANES < valid)[:, None], ref.shape)
    return plgpu.load(ref, mask=mask, other=0.0)


def clean(scores: jax.Array, place: jax.Array, valid: Any, slots: int) -> jax.Array:
    """Clean scores of a tile of a row of `slots`, with the places of its scores."""
    return clean_scores(scores, place < jnp.minimum(valid, slots), slots)


def tile_sum(tile: jax.Array) -> jax.Array:
    """Sum of a tile: each thread adds up what it holds, then threads and warps in pairs. One axis takes one turn."""
    return jnp.sum(tile.reshape(-1))


def bits_of(x: Any) -> jax.Array:
    """The bit pattern, by which non-negative floats are ordered."""
    return lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits: Any) -> jax.Array:
    """The float of a bit pattern."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def grain_of(dtype: DTypeLike) -> int:
    """How many low bits of a score are zero once it is float32, so that no bound between them has to be looked at."""
    return 16 if dtype == jnp.bfloat16 else 0


def weigh(scores: jax.Array, inside: jax.Array, measure: str) -> jax.Array:
    """What each clean score adds: itself, or 1 where scores are counted; those that are not inside add nothing."""
    return jnp.where(inside, scores if measure == "mass" else 1.0, 0.0)


def wanted_of(wanted: jax.Array, total: jax.Array, measure: str) -> jax.Array:
    """What the nucleus has to reach, of a row's total; see `is_everything` for `wanted`."""
    return wanted * total if measure == "mass" else jnp.minimum(wanted, total)


def is_everything(wanted: jax.Array, measure: str) -> jax.Array:
    """Whether all that is valid is wanted: a share of the mass of 1 or more, or infinitely many scores."""
    return wanted >= (1.0 if measure == "mass" else jnp.inf)


def lower_bound(wanted: jax.Array, total: jax.Array, slots: int, measure: str, grain: int) -> jax.Array:
    """Bits of a threshold whose set reaches what is wanted for certain.

    By mass, all scores below it hold at most half of the remainder; by count, all positive ones are above it.
    """
    if measure == "count":
        return jnp.full_like(total, TINY_BITS, jnp.int32)
    rest = jnp.where(wanted < BOUNDED_SHARE, jnp.clip(1.0 - wanted, 0.0, 1.0), 0.0)
    return bits_of(rest * total * (0.5 / slots)) >> grain << grain


def halve(
    low: jax.Array,
    high: jax.Array,
    mass: Callable[[jax.Array], jax.Array],
    wanted: jax.Array,
    total: jax.Array,
    above: Any = 0.0,
    *,
    measure: str = "mass",
    grain: int = 0,
) -> jax.Array:
    """A bit pattern in [low, high) at or above which lies the smallest set of scores whose mass reaches what is wanted.

    Halving ends as soon as the mass left in the bracket is less than two of its scores can have, up to the rounding of
    sums: then it holds one, and the set is minimal. A count says that without rounding. With a grain the bracket is
    halved to the end, where its lower end is a score.

    Args:
        low: bits of a bound that reaches it, a multiple of the grain.
        high: bits of a bound that does not, a multiple of the grain.
        mass: of the scores at or above bits.
        wanted: mass.
        total: mass of all scores.
        above: mass at or above `high`.
        measure: whether mass is of scores or a number of them.
        grain: low bits of the scores that are zero.
    """

    def crowded(bracket: tuple[jax.Array, ...]) -> jax.Array:
        enough_at, too_high, reached, missed = bracket
        wide = too_high - enough_at > 1 << grain
        if grain:
            return wide
        if measure == "count":
            return wide & (reached > wanted)
        inside = reached - missed + ROUNDING * total
        return wide & (inside >= 2 * float_of(enough_at))

    def step(bracket: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        enough_at, too_high, reached, missed = bracket
        middle = enough_at + ((too_high - enough_at) >> (grain + 1) << grain)
        here = mass(middle)
        enough = here >= wanted
        return (
            jnp.where(enough, middle, enough_at),
            jnp.where(enough, too_high, middle),
            jnp.where(enough, here, reached),
            jnp.where(enough, missed, here),
        )

    start: tuple[jax.Array, ...] = low, high, total, jnp.asarray(above, jnp.float32)
    return lax.while_loop(crowded, step, start)[0]


def ranked(chosen: jax.Array, before: jax.Array) -> jax.Array:
    """The rank of each chosen slot of a tile among those of its row, of which `before` are in earlier tiles."""
    flags = chosen.astype(jnp.int32)
    per_line = jnp.sum(flags, axis=1)
    in_earlier_lines = jnp.cumsum(per_line, axis=0) - per_line
    return jnp.cumsum(flags, axis=1) + (before + in_earlier_lines - 1)[:, None]


def scatter(ref: Any, values: jax.Array, target: jax.Array, written: jax.Array) -> None:
    """Writes those values that are to be `written`; the interpreter wants the others to aim beyond the end."""
    plgpu.store(ref.at[jnp.where(written, target, ref.shape[0])], values, mask=written)
