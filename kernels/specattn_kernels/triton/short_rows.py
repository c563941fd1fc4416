"""Thresholds of rows that one program holds in registers, as a kernel of Pallas's Triton lowering.

Scores are read once; then the bracket of the threshold's bit pattern is halved until a single score is left in it. They
are held as float32. Those that came as bfloat16 have 15 bits, so that fewer halvings do; two of them in one register
leave room for more warps, but taking them apart at each halving cost more than that gave (H100: 412 us instead of 365
for 2,048 rows of 32,768).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from specattn_kernels.common import interpreted
from specattn_kernels.triton.tiles import (
    INFINITE_BITS,
    LANES,
    TINY_BITS,
    Choice,
    Span,
    bits_of,
    clean,
    float_of,
    grain_of,
    halve,
    in_lanes,
    is_everything,
    load_lines,
    lower_bound,
    padded,
    places,
    tile_sum,
    wanted_of,
    weigh,
)

# Longest rows that one program holds.
ROW_SLOTS = 1 << 15
# Scores of one thread, for as many warps as there may be. The compiler takes all registers that a thread may have, so
# that fewer and fuller warps would only mean that fewer run.
PER_THREAD = 32
MAX_WARPS = 32


def fits_one_program(slots: int) -> bool:
    """Whether one program can hold a row."""
    return slots <= ROW_SLOTS


def select_in_rows(
    scores: Float[Array, "rows P"],
    wanted: Float[Array, " rows"],
    lengths: Int32[Array, " rows"],
    choice: Choice | None,
    measure: str,
) -> tuple[Float[Array, " rows"], Int32[Array, "rows lines"] | None]:
    """Thresholds, and with a choice how many blocks of every line of 128 it has; see `is_everything` for `wanted`."""
    rows, blocks = scores.shape
    width = padded(blocks)
    lines = width // LANES
    warps = max(4, min(MAX_WARPS, width // (32 * PER_THREAD)))
    one = pl.BlockSpec((None, 1), lambda r: (r, 0))
    out_specs, out_shape = [one], [jax.ShapeDtypeStruct((rows, 1), jnp.float32)]
    if choice is not None:
        out_specs.append(pl.BlockSpec((None, lines), lambda r: (r, 0)))
        out_shape.append(jax.ShapeDtypeStruct((rows, lines), jnp.int32))
    threshold, *in_line = pl.pallas_call(
        functools.partial(
            _select_in_row,
            grain=grain_of(scores.dtype),
            blocks=blocks,
            lines=lines,
            warps=warps,
            choice=choice,
            measure=measure,
        ),
        grid=(rows,),
        in_specs=[pl.BlockSpec((None, lines, LANES), lambda r: (r, 0, 0)), one, one],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpreted(),
        name="select_in_rows",
    )(in_lanes(scores), wanted[:, None], lengths[:, None])
    return threshold[:, 0], in_line[0] if in_line else None


def _select_in_row(
    scores_ref: Any,
    wanted_ref: Any,
    length_ref: Any,
    threshold_ref: Any,
    *count_refs: Any,
    grain: int,
    blocks: int,
    lines: int,
    warps: int,
    choice: Choice | None,
    measure: str,
) -> None:
    """One whole row: the threshold, then how many blocks of each line it chooses."""
    wanted, length = wanted_ref[0], length_ref[0]
    valid = length if choice is None else choice.span(length, 1.0).valid
    held = _Row(scores_ref, lines, valid, blocks, measure, warps)
    total = held.mass(jnp.int32(TINY_BITS))
    low = lower_bound(wanted, total, blocks, measure, grain)
    high = jnp.maximum(held.highest(), low) + (1 << grain)
    enough = wanted_of(wanted, total, measure)
    found = held.smallest(halve(low, high, held.mass, enough, total, measure=measure, grain=grain))
    if measure == "count":
        # Its nucleus never has blocks without mass.
        found = jnp.where(total > 0, found, jnp.inf)
    threshold = jnp.where(is_everything(wanted, measure), 0.0, found)
    threshold_ref[0] = threshold
    if choice is not None:
        held.count(count_refs[0], threshold, choice.span(length, threshold))


class _Row:
    """A row as float32 bits, in tiles of as many lines as have 8 scores a thread.

    What is done tile by tile is done in that order, in the end by the compiler too, which keeps down the registers.
    """

    def __init__(self, scores_ref: Any, lines: int, valid: Any, blocks: int, measure: str, warps: int) -> None:
        self.lines, self.blocks, self.valid, self.measure = lines, blocks, jnp.minimum(valid, blocks), measure
        self.step = min(2 * warps, lines // 2)
        # Places are those within a tile, which all tiles share, so that few of them have to be held.
        self.place = places(self.step)
        self.held = [bits_of(self._load(scores_ref, first)) for first in range(0, lines, self.step)]

    def _load(self, scores_ref: Any, first: int) -> jax.Array:
        """Clean scores of one tile."""
        here, begin = scores_ref.at[pl.ds(first, self.step)], first * LANES
        return clean(load_lines(here, begin, self.valid), self.place, self.valid - begin, self.blocks)

    def mass(self, bound: jax.Array) -> jax.Array:
        """Mass, or number, of the scores at or above bits."""
        inside = (weigh(float_of(bits), bits >= bound, self.measure) for bits in self.held)
        return tile_sum(functools.reduce(jnp.add, inside))

    def highest(self) -> jax.Array:
        """Bits of the largest score."""
        return jnp.max(functools.reduce(jnp.maximum, self.held).reshape(-1))

    def smallest(self, bound: jax.Array) -> jax.Array:
        """The smallest score at or above bits, in place of a bound that may lie between two; 0 if there is none."""
        inside = (jnp.where(bits >= bound, bits, INFINITE_BITS) for bits in self.held)
        smallest = jnp.min(functools.reduce(jnp.minimum, inside).reshape(-1))
        return jnp.where(smallest == INFINITE_BITS, 0.0, float_of(smallest))

    def count(self, count_ref: Any, threshold: jax.Array, span: Span) -> None:
        """Writes how many blocks of each line are chosen."""
        least = bits_of(threshold)
        for bits, first in zip(self.held, range(0, self.lines, self.step), strict=True):
            chosen = span.after(first * LANES).choose(bits >= least, self.place)
            count_ref[pl.ds(first, self.step)] = jnp.sum(chosen.astype(jnp.int32), axis=1)
