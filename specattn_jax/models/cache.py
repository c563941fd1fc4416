"""The KV cache: one array per layer, appended in place under donation, rolled back by lengths alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int32

from specattn_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of everything a model has read.

    Attributes:
        k: keys, one `[B, K, S, H]` array per layer: slicing a layer out of a stacked array would copy it.
        v: values, likewise.
        lengths: valid slots per sequence. Slots beyond hold leftovers of rejected tokens and are never attended.
    """

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]
    lengths: Int32[Array, " B"]

    @property
    def num_slots(self) -> int:
        """S."""
        return self.k[0].shape[2]

    def at_lengths(self, lengths: Int32[Array, " B"]) -> KVCache:
        """The same cache, cut (or extended over slots already written) to `lengths`. Nothing is copied."""
        return dataclasses.replace(self, lengths=lengths)


def init_cache(config: ModelConfig, batch: int, num_slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache of `num_slots` slots per sequence."""
    shape = (batch, config.num_kv_heads, num_slots, config.head_dim)
    layers = range(config.num_layers)
    return KVCache(
        k=tuple(jnp.zeros(shape, dtype) for _ in layers),
        v=tuple(jnp.zeros(shape, dtype) for _ in layers),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def append(
    slots: Float[Array, "B K S H"], new: Float[Array, "B T K H"], starts: Int32[Array, " B"]
) -> Float[Array, "B K S H"]:
    """Writes T new entries at each sequence's own start.

    The caller guarantees `starts + T <= S`: a start beyond that would be moved back and overwrite valid entries.
    """
    rows = jnp.swapaxes(new, 1, 2).astype(slots.dtype)
    write = jax.vmap(lambda slot, row, start: jax.lax.dynamic_update_slice(slot, row, (0, start, 0)))
    return write(slots, rows, starts)
