"""Selections that learn from verification, and what they can see of it.

What such a selection remembers is part of it: a selection is a pytree, and `learn` returns the next one. Forced reading
carries it from window to window beside the decode state. The decode loop of generation knows nothing of this.
"""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32
from specattn_kernels import SelectionPlan, decode_attention, sparse_decode_attention

from specattn_jax.decoding.speculative import WindowRead
from specattn_jax.selection.protocol import Selection
from specattn_jax.selection.TODO import past_mask


@runtime_checkable
class Learner(Selection, Protocol):
    """A selection that changes with what was read."""

    def prepare(self, batch: int, num_slots: int) -> Self:
        """The same selection with an empty memory for `batch` sequences of `num_slots` cache slots."""
        ...

    def attend(
        self,
        q: Float[Array, "B T N H"],
        keys: Float[Array, "B K S H"],
        values: Float[Array, "B K S H"],
        plan: SelectionPlan | None,
        lengths: Int32[Array, " B"],
    ) -> tuple[Float[Array, "B T N H"], Any]:
        """Attention of one target layer, and what to keep of it for `learn`; a `model.LayerReader`."""
        ...

    def learn(self, window: WindowRead, past: Int32[Array, " B"]) -> tuple[Self, Float[Array, "B L"]]:
        """The selection for the next window, and the share of the past that each layer read.

        Args:
            window: what was drafted and read, with what `attend` kept, layer by layer.
            past: entries in the cache before it.
        """
        ...


def attend_plan(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    plan: SelectionPlan | None,
    lengths: Int32[Array, " B"],
) -> Float[Array, "B T N H"]:
    """What the model itself does: sparse attention where there is a plan, dense attention where there is none."""
    if plan is None:
        return decode_attention(q, keys, values, lengths).out
    return sparse_decode_attention(q, keys, values, plan, lengths).out


def mass_read(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    plan: SelectionPlan | None,
    lengths: Int32[Array, " B"],
) -> Float[Array, " B"]:
    """Share of the full attention mass that lies on what the plan reads, averaged over tokens and heads."""
    if plan is None:
        return jnp.ones(lengths.shape, jnp.float32)
    sparse = sparse_decode_attention(q, keys, keys, plan, lengths, return_lse=True).lse
    whole = decode_attention(q, keys, keys, lengths, return_lse=True).lse
    assert sparse is not None
    assert whole is not None
    return jnp.mean(jnp.exp(sparse - whole), axis=(1, 2))


def attention_read(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    plan: SelectionPlan | None,
    lengths: Int32[Array, " B"],
) -> Float[Array, "B K S"]:
    """The attention that verification has seen: softmax over what was read alone, 0 elsewhere.

    Averaged over the heads that share a kv head, then the largest over the T tokens. Computed densely and masked
    afterwards, as evaluation may.
    """
    scores = decode_attention(q, keys, keys, lengths, return_scores=True).scores
    assert scores is not None
    batch, heads, slots, _ = keys.shape
    grouped = scores.reshape(batch, q.shape[1], heads, -1, slots)
    if plan is not None:
        past = lengths - q.shape[1]
        fresh = jnp.arange(slots) >= past[:, None, None]
        grouped = grouped * (past_mask(plan, past, slots) | fresh)[:, None, :, None]
        grouped = grouped / jnp.sum(grouped, axis=-1, keepdims=True)
    return jnp.max(jnp.mean(grouped, axis=3), axis=1)


def remember(
    before: Float[Array, "B K S"], seen: Float[Array, "B K S"], decay: float | Float[Array, ""]
) -> Float[Array, "B K S"]:
    """Attention as last seen: what has some now replaces it, the rest decays."""
    return jnp.where(seen > 0, seen, decay * before)
