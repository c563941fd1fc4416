"""Notes how much the slots of a plan got of a token, as a kernel of Pallas's Triton lowering.

One program notes one share of the entries that one kv head read, in place: what was not read is not touched.
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

from specattn_kernels.common import interpreted
from specattn_kernels.types import SelectionPlan

# Entries of one step, and the most programs of one kv head: where few entries are read most of them end at once.
BLOCK = 256
MAX_SPLITS = 16


def remember(
    memory: Float[Array, "B K S"],
    logits: Float[Array, "B K G entries"],
    lse: Float[Array, "B T N"],
    plan: SelectionPlan,
    past: Int32[Array, " B"],
) -> Float[Array, "B K S"]:
    """The memory with the weights of the oldest token at the slots of a plan; see `api.sparse_decode_attention`.

    Args:
        memory: what was noted before.
        logits: that token's, in powers of two, for the plan's entries in their order, and room behind them.
        lse: the log2-sum-exps of all tokens.
        plan: what was read.
        past: slots that the plan may read.
    """
    ids, counts, layer = plan.stacked()
    options = {"block_size": plan.block_size, "interpret": interpreted()}
    noted: jax.Array = _remember(memory, logits, lse, ids, counts, layer, past, **options)
    return noted


# Of the many layers of a model only the first is traced.
@functools.partial(jax.jit, static_argnames=("block_size", "interpret"))
def _remember(
    memory: jax.Array,
    logits: jax.Array,
    lse: jax.Array,
    ids: jax.Array,
    counts: jax.Array,
    layer: jax.Array,
    past: jax.Array,
    *,
    block_size: int,
    interpret: bool,
) -> jax.Array:
    """See `remember`."""
    batch, kv_heads, slots = memory.shape
    tokens, group, layers, capacity = lse.shape[1], logits.shape[2], ids.shape[1], ids.shape[3]
    splits = max(1, min(MAX_SPLITS, -(-capacity * block_size // BLOCK)))

    def per_head(*size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *size), lambda b, h, _: (b, h, *[0] * len(size)))

    noted: jax.Array = pl.pallas_call(
        functools.partial(_note, splits=splits, block_size=block_size),
        grid=(batch, kv_heads, splits),
        in_specs=[
            per_head(slots),
            per_head(group, logits.shape[3]),
            pl.BlockSpec((None, tokens, None, group), lambda b, h, _: (b, 0, h, 0)),
            pl.BlockSpec((None, layers, None, capacity), lambda b, h, _: (b, 0, h, 0)),
            pl.BlockSpec((None, layers, None), lambda b, h, _: (b, 0, h)),
            pl.BlockSpec((1,), lambda *_: (0,)),
            pl.BlockSpec((None, 1), lambda b, *_: (b, 0)),
        ],
        out_specs=per_head(slots),
        out_shape=jax.ShapeDtypeStruct(memory.shape, memory.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="remember",
    )(memory, logits, lse.reshape(batch, tokens, kv_heads, group), ids, counts, layer, past[:, None])
    return noted


def _note(
    _: Any,
    logits_ref: Any,
    lse_ref: Any,
    ids_ref: Any,
    counts_ref: Any,
    layer_ref: Any,
    past_ref: Any,
    memory_ref: Any,
    *,
    splits: int,
    block_size: int,
) -> None:
    """One share of one kv head's entries."""
    layer, past = layer_ref[0], past_ref[0]
    total, group = counts_ref[layer] * block_size, logits_ref.shape[0]
    first = pl.program_id(2)

    def step(index: jax.Array, _: None) -> None:
        # Programs take steps in turn, so that of few entries each has some.
        entry = (first + index * splits) * BLOCK + lax.broadcasted_iota(jnp.int32, (BLOCK,), 0)
        listed = entry < total
        entry = jnp.where(listed, entry, 0)
        slot = ids_ref[layer, entry // block_size] * block_size + entry % block_size
        weight = jnp.zeros((BLOCK,), jnp.float32)
        for member in range(group):
            lse = lse_ref[0, member]
            # A token that sees nothing gives nothing.
            weight += jnp.exp2(logits_ref[member, entry].astype(jnp.float32) - jnp.where(lse > -jnp.inf, lse, jnp.inf))
        kept = listed & (slot >= 0) & (slot < past)
        # What is not kept would go beyond the end, where it cannot meet what is.
        place = memory_ref.at[jnp.where(kept, slot, memory_ref.shape[0])]
        plgpu.store(place, (weight / group).astype(memory_ref.dtype), mask=kept)

    steps = pl.cdiv(jnp.maximum(total - first * BLOCK, 0), splits * BLOCK)
    lax.fori_loop(0, steps, step, None)
