"""Joins the partial results of attention in splits, and puts them into the public layout.

One kernel of Pallas's Triton lowering, one program for each query row of each kv head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from specattn_kernels.common import interpreted


def merge_splits(
    part: Float[Array, "B K room rows H"],
    lse: Float[Array, "B K room lse_rows"],
    q: Float[Array, "B T K G H"],
    splits: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention over all splits, in the dtype of the queries, and its log2-sum-exp.

    Args:
        part: output of each split for its T * G query rows and perhaps more; zero where a split read nothing.
        lse: log2-sum-exp of each; -inf where a split read nothing.
        q: the queries, for their shape and dtype.
        splits: how many there are. The arrays have room for a power of two; what is beyond the splits is not read.
    """
    return _merge(part, lse, q, splits=splits, interpret=interpreted())


# Of the many layers of a model only the first is traced.
@functools.partial(jax.jit, static_argnames=("splits", "interpret"))
def _merge(
    part: jax.Array, lse: jax.Array, q: jax.Array, *, splits: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See `merge_splits`."""
    batch, tokens, kv_heads, group, head_dim = q.shape
    room = part.shape[2]
    out, total = pl.pallas_call(
        functools.partial(_merge_row, splits=splits, group=group, parts=parts_of(head_dim)),
        grid=(batch, kv_heads, tokens * group),
        in_specs=[
            pl.BlockSpec((None, None, *part.shape[2:]), lambda b, h, _: (b, h, 0, 0, 0)),
            pl.BlockSpec((None, None, *lse.shape[2:]), lambda b, h, _: (b, h, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, tokens, None, group, head_dim), lambda b, h, _: (b, 0, h, 0, 0)),
            pl.BlockSpec((None, tokens, None, group), lambda b, h, _: (b, 0, h, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4 if room * head_dim >= 1 << 12 else 1),
        interpret=interpret,
        name="merge_splits",
    )(part, lse)
    heads = kv_heads * group
    return out.reshape(batch, tokens, heads, head_dim), total.reshape(batch, tokens, heads)


def _merge_row(
    part_ref: Any,
    lse_ref: Any,
    out_ref: Any,
    total_ref: Any,
    *,
    splits: int,
    group: int,
    parts: tuple[tuple[int, int], ...],
) -> None:
    """One query row of one kv head."""
    row = pl.program_id(2)
    token, member = place_of(row, group)
    split = lax.broadcasted_iota(jnp.int32, (part_ref.shape[0],), 0)
    lse = plgpu.load(lse_ref.at[:, row], mask=split < splits, other=-jnp.inf)
    top = jnp.max(lse)
    weights = jnp.exp2(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights)
    divisor = jnp.where(total > 0, total, 1.0)
    for at, width in parts:
        # What an empty split wrote is zero; beyond the splits nothing was written.
        here = part_ref.at[:, row, pl.ds(at, width)]
        part = plgpu.load(here, mask=(split < splits)[:, None], other=0.0)
        out = jnp.sum(weights[:, None] * part, axis=0) / divisor
        out_ref[token, member, pl.ds(at, width)] = out.astype(out_ref.dtype)
    total_ref[token, member] = jnp.where(total > 0, top + jnp.log2(divisor), -jnp.inf)


def place_of(row: Any, group: int) -> tuple[Any, Any]:
    """New token and member of the group of a query row."""
    return row // group, row % group


def parts_of(head_dim: int) -> tuple[tuple[int, int], ...]:
    """Beginning and width, a power of two, of the pieces of a head dim: tiles have no other widths."""
    parts, begin = [], 0
    for power in (256, 128, 64, 32, 16):
        while begin + power <= head_dim:
            parts.append((begin, power))
            begin += power
    return tuple(parts)
