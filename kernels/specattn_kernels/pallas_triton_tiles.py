"""Pieces that the Triton selection kernels share: rows as tiles of lines of lanes, bit patterns, bisection, ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from specattn_kernels.common import FLOAT32_MAX, FLOAT32_TINY

# Width of the two-axis tiles in which programs hold their part of a row: sums go along the other axis first, so that
# threads add up what they hold and rounding errors stay those of a short sum.
LANES = 128
# Nuclei above this share leave too little for a lower bound of their threshold to be safe from rounding.
BOUNDED_SHARE = 1 - 1e-4
# Error of a sum of a row's scores, relative to the sum of all.
ROUNDING = 1e-6


def padded(slots: int) -> int:
    """The next power of two, at least a few lines of lanes: what a tile can hold."""
    return max(8 * LANES, 1 << (slots - 1).bit_length())


def in_lanes(scores: Float[Array, "rows S"], lanes: int = LANES) -> Float[Array, "rows lines lanes"]:
    """Rows as lines of lanes; copied only if their length is no multiple of a line."""
    rows, slots = scores.shape
    padding = -slots % lanes
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, padding)))
    return scores.reshape(rows, (slots + padding) // lanes, lanes)


def places(lines: int, first: Any = 0) -> jax.Array:
    """Number of each slot of a tile within its row."""
    line = lax.broadcasted_iota(jnp.int32, (lines, LANES), 0)
    return first + line * LANES + lax.broadcasted_iota(jnp.int32, (lines, LANES), 1)


def load_clean(ref: Any, place: jax.Array, valid: Any, slots: int) -> jax.Array:
    """As `clean_scores`, of a tile; what lies beyond the row is not read."""
    return clean(plgpu.load(ref, mask=place < slots, other=0.0), place, valid, slots)


def clean(scores: jax.Array, place: jax.Array, valid: Any, slots: int) -> jax.Array:
    """As `clean_scores`, of a tile with the places of its scores."""
    scores = scores.astype(jnp.float32)
    keep = (scores >= FLOAT32_TINY) & (place < jnp.minimum(valid, slots))
    return jnp.where(keep, jnp.minimum(scores, FLOAT32_MAX / 2 / slots), 0.0)


def tile_sum(tile: jax.Array) -> jax.Array:
    """Sum of a tile: of its columns, then of those."""
    return jnp.sum(jnp.sum(tile, axis=0))


def bits_of(x: Any) -> jax.Array:
    """The bit pattern, by which non-negative floats are ordered."""
    return lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits: Any) -> jax.Array:
    """The float of a bit pattern."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def lower_bound(share: jax.Array, total: jax.Array, slots: int) -> jax.Array:
    """Bits of a threshold whose set reaches the share for certain: all below it hold at most half of the remainder."""
    rest = jnp.where(share < BOUNDED_SHARE, jnp.clip(1.0 - share, 0.0, 1.0), 0.0)
    return bits_of(rest * total * (0.5 / slots))


def halve(
    low: jax.Array,
    high: jax.Array,
    mass: Callable[[jax.Array], jax.Array],
    wanted: jax.Array,
    total: jax.Array,
    above: Any = 0.0,
) -> jax.Array:
    """A bit pattern in [low, high) at or above which lies the smallest set of scores whose mass reaches what is wanted.

    Halving ends as soon as the mass left in the bracket is less than two of its scores can have, up to the rounding of
    sums: then it holds one, and the set is minimal.

    Args:
        low: bits of a bound that reaches it.
        high: bits of a bound that does not.
        mass: of the scores at or above bits.
        wanted: mass.
        total: mass of all scores.
        above: mass at or above `high`.
    """

    def crowded(bracket: tuple[jax.Array, ...]) -> jax.Array:
        enough_at, too_high, reached, missed = bracket
        inside = reached - missed + ROUNDING * total
        return (too_high - enough_at > 1) & (inside >= 2 * float_of(enough_at))

    def step(bracket: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        enough_at, too_high, reached, missed = bracket
        middle = enough_at + (too_high - enough_at) // 2
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


def ranked(chosen: jax.Array, place: jax.Array, before: jax.Array, count: jax.Array) -> jax.Array:
    """Where each slot of a tile goes if the chosen ones of a row come first, all in order.

    `before` are chosen in earlier tiles and `count` in all. It is a permutation of the row's places, padding included:
    nothing is written twice and nothing left out.
    """
    flags = chosen.astype(jnp.int32)
    per_line = jnp.sum(flags, axis=1)
    rank = before + jnp.cumsum(flags, axis=1) + (jnp.cumsum(per_line, axis=0) - per_line)[:, None]
    return jnp.where(chosen, rank - 1, count + place - rank)
