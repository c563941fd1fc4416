"""Matrix products inside TPU kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import DTypeLike


def dot(a: jax.Array, b: jax.Array, *, contract: int) -> jax.Array:
    """Float32 sums over the last axis of `a` and the axis `contract` of `b`; float32 means float32, not bfloat16."""
    dtype: DTypeLike = jnp.promote_types(a.dtype, b.dtype)
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((1,), (contract,)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
