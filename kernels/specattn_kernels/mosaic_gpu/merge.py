"""Joins the partial results of attention in splits, in plain JAX: XLA makes one pass over a few megabytes of it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from specattn_kernels.common import ungroup


def merge_parts(
    part: Float[Array, "B K parts rows H"], lse: Float[Array, "B K parts lse_rows"], tokens: int, group: int
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention over all parts, in float32, and its log2-sum-exp.

    Args:
        part: output of each part for its T * G query rows and perhaps more; zero where a part read nothing.
        lse: log2-sum-exp of each; -inf where a part read nothing.
        tokens: T.
        group: G.
    """
    batch, kv_heads, _, _, head_dim = part.shape
    rows = tokens * group
    part, lse = part[:, :, :, :rows], lse[:, :, :, :rows]
    top = lse.max(axis=2)
    weights = jnp.exp2(lse - jnp.where(top == -jnp.inf, 0.0, top)[:, :, None])
    total = weights.sum(axis=2)
    divisor = jnp.where(total > 0, total, 1.0)
    # Not a matrix product, which a GPU would compute in TF32.
    out = (weights[..., None] * part).sum(axis=2) / divisor[..., None]
    lse = jnp.where(total > 0, top + jnp.log2(divisor), -jnp.inf)
    grouped = batch, kv_heads, tokens, group
    return ungroup(out.reshape(*grouped, head_dim)), ungroup(lse.reshape(grouped))
