"""Inputs of the kernel tests: a small set of shapes, so that compiled functions are reused, with random contents."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from specattn_kernels import SelectionPlan

# Content is drawn from a seed; hypothesis need not shrink it, and the same examples run every time.
examples = functools.partial(settings, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31 - 1)
PS = st.sampled_from([1e-6, 0.5, 0.95, 1.0])


# Pallas kernels run in its interpreters here.
IMPLEMENTATIONS = ["xla", "pallas_triton", "pallas_tpu"]
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 3e-2, jnp.float16: 4e-3}


class Shape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    slots: int
    block_size: int
    capacity: int  # blocks a plan has room for
    head_dim: int = 16


# GQA ratios 1, 2, 3, 4, 8; T 1..16; slots that are no multiple of the block; capacities on both sides of the choice
# between gathering (capacity * block_size < slots / 2) and masking.
SHAPES = [
    Shape(2, 1, 3, 3, 33, 1, 33),
    Shape(1, 1, 9, 3, 64, 1, 12),
    Shape(3, 5, 4, 2, 50, 4, 13),
    Shape(2, 4, 8, 1, 70, 8, 4, head_dim=48),
    Shape(2, 16, 8, 2, 40, 16, 3),
    Shape(1, 3, 2, 2, 130, 16, 3, head_dim=96),
]

# What the TPU and Mosaic kernels take instead: blocks of at least 16 slots, few shapes because each takes seconds to
# interpret.
_BLOCK_SHAPES = [
    Shape(1, 1, 2, 2, 144, 16, 4, head_dim=64),
    Shape(2, 5, 2, 1, 208, 32, 7, head_dim=64),
    Shape(1, 3, 8, 1, 176, 64, 3, head_dim=128),
]
_BLOCK_SHAPE = dict(zip(SHAPES, [_BLOCK_SHAPES[i] for i in (0, 0, 1, 1, 2, 2)], strict=True))


def shape_for(implementation, shape):
    """One of SHAPES, or what a backend takes in place of it."""
    return _BLOCK_SHAPE[shape] if implementation in ("pallas_tpu", "pallas_mosaic_gpu") else shape


def dtype_for(implementation):
    """Float32, or the widest that a backend takes."""
    return jnp.float16 if implementation == "pallas_mosaic_gpu" else jnp.float32


def takes_example(implementation, seed):
    """Whether a backend runs one of many examples; one takes half a minute in Mosaic's interpreter."""
    return implementation != "pallas_mosaic_gpu" or seed % 8 == 0


def draw_lengths(rng, shape, least):
    lengths = rng.integers(least, shape.slots + 1, shape.batch)
    lengths[rng.integers(shape.batch)] = rng.choice([least, shape.slots])
    return lengths.astype(np.int32)


def draw_attention(seed, shape, *, dtype=jnp.float32, least=0, dead=np.nan):
    """q, k, v, lengths; slots at or beyond lengths hold `dead`."""
    rng = np.random.default_rng(seed)
    lengths = draw_lengths(rng, shape, least)
    q = rng.normal(size=(shape.batch, shape.tokens, shape.heads, shape.head_dim)) * rng.choice([0.3, 3.0])
    k, v = rng.normal(size=(2, shape.batch, shape.kv_heads, shape.slots, shape.head_dim))
    for b in range(shape.batch):
        k[b, :, lengths[b] :] = dead
        v[b, :, lengths[b] :] = -dead
    return jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype), jnp.asarray(lengths)


def draw_plan(seed, shape, lengths, kind):
    """An unsorted plan within the capacity: "random", "empty", "single" or "full" (as far as it has room).

    What lies beyond its counts are no ids, as nothing may be read by them.
    Ids may be of blocks that reach into or lie in the new tokens or the dead slots, as a stale plan's would.
    """
    rng = np.random.default_rng(seed + 1)
    blocks = -(-shape.slots // shape.block_size)
    ids = np.stack([rng.permutation(blocks)[: shape.capacity] for _ in range(shape.batch * shape.kv_heads)])
    most = {"empty": 0, "single": 1, "full": shape.capacity}
    size = shape.batch * shape.kv_heads
    counts = np.full(size, most[kind]) if kind in most else rng.integers(0, shape.capacity + 1, size)
    rows = (shape.batch, shape.kv_heads)
    garbage = rng.choice([-7, 2**31 - 1, 0], ids.shape)
    ids = np.where(np.arange(shape.capacity) < counts[:, None], ids, garbage)
    return SelectionPlan(
        jnp.asarray(ids.reshape(*rows, -1), jnp.int32), jnp.asarray(counts.reshape(rows), jnp.int32), shape.block_size
    )


def draw_row(rng, kind, size, padded):
    """Scores of one row, zero-mass kinds excluded; NaN beyond `size`."""
    row = np.full(padded, np.nan, np.float32)
    if kind == "peaked":
        values = np.exp(rng.normal(size=size) * 4)
    elif kind == "sink":
        values = np.exp(rng.normal(size=size))
        values[rng.integers(size)] = values.sum()
    elif kind == "flat":
        values = 1 + 0.01 * rng.random(size)
    elif kind == "tied":
        values = rng.integers(0, 5, size) + (np.arange(size) == 0)
    elif kind == "one-hot":
        values = (np.arange(size) == rng.integers(size)).astype(float)
    else:
        values = np.full(size, rng.random() + 1e-3)
    row[:size] = values / values.sum() * rng.choice([1e-12, 1.0, 1e9])
    return row


def rounded(row):
    """The row with 18 significant bits below its largest score: sums of a few dozen are exact in any order."""
    unit = np.exp2(np.floor(np.log2(np.nanmax(row))) - 17)
    return (np.round(row / unit) * unit).astype(np.float32)


ROW_KINDS = ["peaked", "sink", "flat", "tied", "one-hot", "equal"]


@functools.cache
def jitted(function, **static):
    """One jitted function per op and static arguments, shared by all examples."""
    return jax.jit(functools.partial(function, **static))


def assert_close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
    )


def selected(plan):
    """The plan's ids per sequence and kv head, as sets."""
    ids, counts = np.asarray(plan.block_ids), np.asarray(plan.counts)
    return [ids[b, h, : counts[b, h]].tolist() for b, h in np.ndindex(*counts.shape)]
