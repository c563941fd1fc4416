"""Top-p selection on a TPU: the bisection as a kernel that holds whole rows in vector memory, the rest in plain JAX."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from specattn_kernels.common import (
    FLOAT32_TINY,
    clean_scores,
    fit_mask,
    leading,
    mask_blocks,
    wanted_blocks,
)
from specattn_kernels.tpu.limits import LANES
from specattn_kernels.types import SelectionPlan

# Rows of one program: the sublanes of a float32 tile.
ROWS = 8
# Slots of one step. Its sum is a tree; those of a row are added up, 32 for 131,072 slots.
CHUNK = 4096
# Vector memory beyond the rows, which are there three times: as two buffers and cleaned.
VECTOR_BYTES = 8 << 20


def top_p_threshold(
    scores: Float[Array, "*rows S"],
    p: Float[Array, "*rows"],
    *,
    lengths: Int32[Array, "*rows"] | None = None,
    method: str = "exact",
    steps: int = 10,
) -> Float[Array, "*rows"]:
    """The nucleus threshold of every row; see `api.top_p_threshold`."""
    return _thresholds(scores, p, lengths, method, steps)


def _thresholds(
    scores: Float[Array, "*rows S"],
    wanted: Float[Array, "*rows"],
    lengths: Int32[Array, "*rows"] | None,
    method: str,
    steps: int,
) -> Float[Array, "*rows"]:
    """Thresholds by a method of the public op, with `wanted` its p, or by "count", with `wanted` a number of scores."""
    *rows, slots = scores.shape
    if scores.dtype != jnp.bfloat16:
        # TPUs have no float16.
        scores = scores.astype(jnp.float32)
    count = wanted.size
    more_rows = -count % ROWS
    width = -(-slots // LANES) * LANES
    more_slots = (width if width <= CHUNK else -(-slots // CHUNK) * CHUNK) - slots
    valid = jnp.full(rows, slots, jnp.int32) if lengths is None else jnp.minimum(lengths, slots).astype(jnp.int32)
    thresholds = _call(
        jnp.pad(scores.reshape(count, slots), ((0, more_rows), (0, more_slots))),
        jnp.pad(wanted.reshape(count, 1), ((0, more_rows), (0, 0))),
        jnp.pad(valid.reshape(count, 1), ((0, more_rows), (0, 0))),
        slots=slots,
        method=method,
        steps=steps,
    )
    everything = wanted >= (jnp.inf if method == "count" else 1.0)
    return jnp.where(everything, 0.0, thresholds[:count, 0].reshape(rows))


def _call(
    scores: Float[Array, "rows width"],
    wanted: Float[Array, "rows 1"],
    lengths: Int32[Array, "rows 1"],
    *,
    slots: int,
    method: str,
    steps: int,
) -> Float[Array, "rows 1"]:
    """The kernel on whole tiles, of rows that had `slots` scores before they were padded."""
    rows, width = scores.shape
    vector_bytes = VECTOR_BYTES + 3 * ROWS * width * 4
    per_row = pl.BlockSpec((ROWS, 1), lambda index: (index, 0))
    result: jax.Array = pl.pallas_call(
        functools.partial(_bisect, slots=slots, method=method, steps=steps),
        grid=(rows // ROWS,),
        in_specs=[pl.BlockSpec((ROWS, width), lambda index: (index, 0)), per_row, per_row],
        out_specs=per_row,
        out_shape=jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        scratch_shapes=[pltpu.VMEM((ROWS, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vector_bytes),
        name="top_p_threshold",
    )(scores, wanted, lengths)
    return result


def _bisect(
    scores_ref: Any,
    wanted_ref: Any,
    lengths_ref: Any,
    threshold_ref: Any,
    clean_ref: Any,
    *,
    slots: int,
    method: str,
    steps: int,
) -> None:
    """Thresholds of 8 rows: 31 halvings of the bit pattern, or the published ones of [0, max]; see `xla`.

    By count, every score is worth 1 in place of itself.
    """
    size = min(CHUNK, scores_ref.shape[1])
    chunks = scores_ref.shape[1] // size

    def here(chunk: Any) -> Any:
        return pl.ds(pl.multiple_of(chunk * size, LANES), size)

    def clean(chunk: Any, highest: jax.Array) -> jax.Array:
        slot = chunk * size + lax.broadcasted_iota(jnp.int32, (ROWS, size), 1)
        x = clean_scores(scores_ref[:, here(chunk)], slot < lengths_ref[...], slots)
        clean_ref[:, here(chunk)] = x
        return jnp.maximum(highest, jnp.max(x, axis=1, keepdims=True))

    def mass(threshold: jax.Array) -> jax.Array:
        def add(chunk: Any, total: jax.Array) -> jax.Array:
            x = clean_ref[:, here(chunk)]
            return total + _fold(jnp.where(x >= threshold, 1.0 if method == "count" else x, 0.0))

        lanes = lax.fori_loop(0, chunks, add, jnp.zeros((ROWS, LANES), jnp.float32))
        return jnp.sum(lanes, axis=1, keepdims=True)

    highest = lax.fori_loop(0, chunks, clean, jnp.zeros((ROWS, 1), jnp.float32))
    least = jnp.full_like(highest, FLOAT32_TINY if method == "count" else 0.0)
    total = mass(least)
    wanted = jnp.minimum(wanted_ref[...], total) if method == "count" else wanted_ref[...] * total

    def halve_bits(_: Any, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        enough_at, too_high = bracket
        middle = enough_at + ((too_high - enough_at) >> 1)
        enough = mass(lax.bitcast_convert_type(middle, jnp.float32)) >= wanted
        return jnp.where(enough, middle, enough_at), jnp.where(enough, too_high, middle)

    def halve(_: Any, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        enough = mass(middle) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    if method in ("exact", "count"):
        low, bits = (lax.bitcast_convert_type(x, jnp.int32) for x in (least, highest))
        enough_at, _ = lax.fori_loop(0, 31, halve_bits, (low, jnp.maximum(bits, low) + 1))
        threshold = lax.bitcast_convert_type(enough_at, jnp.float32)
        # A nucleus by count has no blocks without mass.
        threshold_ref[...] = jnp.where(total > 0, threshold, jnp.inf) if method == "count" else threshold
    else:
        threshold_ref[...] = lax.fori_loop(0, steps, halve, (jnp.zeros_like(highest), highest))[0]


def _fold(x: jax.Array) -> jax.Array:
    """Adds up the lane tiles of a row as a tree, down to one."""
    while x.shape[1] > LANES:
        half = -(-x.shape[1] // (2 * LANES)) * LANES
        rest = x.shape[1] - half
        paired = x[:, :rest] + x[:, half:]
        x = paired if rest == half else jnp.concatenate([paired, x[:, rest:half]], axis=1)
    return x


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
    slots, ones = scores.shape[-1], (1,) * (scores.ndim - 1)
    clean = clean_scores(scores, jnp.arange(slots) < leading(lengths, scores), slots)
    # A block's slots as an axis of their own would be padded to 128 lanes.
    window, padding = (*ones, block_size), (*[(0, 0)] * len(ones), (0, -slots % block_size))
    block_scores = lax.reduce_window(clean, 0.0, lax.add, window, window, padding)
    if measure == "mass":
        threshold = top_p_threshold(block_scores, p, method=method, steps=steps)
    else:
        wanted = wanted_blocks(p, -(-leading(lengths, p) // block_size))
        threshold = _thresholds(block_scores, wanted, None, "count", steps)
    capacity = block_scores.shape[-1] if capacity is None else capacity
    forced = {"block_size": block_size, "num_recent": num_recent}
    mask = mask_blocks(block_scores, threshold, lengths, num_sink=num_sink, **forced)
    plan = compact_blocks(fit_mask(mask, lengths, capacity, **forced), block_size=block_size)
    return SelectionPlan(plan.block_ids[..., :capacity], plan.counts, block_size)


def compact_blocks(mask: Bool[Array, "*rows P"], *, block_size: int) -> SelectionPlan:
    """The plan of a mask; see `api.compact_blocks`. By a sort, because a TPU scatters one number after the other."""
    blocks = mask.shape[-1]
    block = jnp.arange(blocks, dtype=jnp.int32)
    selected_first = jnp.sort(jnp.where(mask, block, block + blocks), axis=-1)
    ids = jnp.where(selected_first < blocks, selected_first, selected_first - blocks)
    return SelectionPlan(ids, jnp.sum(mask, axis=-1, dtype=jnp.int32), block_size)
