"""How plans are read and counted: attending as chosen, and the share of the past that was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from specattn_kernels import SelectionPlan, plan_slots

from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import Attend, Attended
from specattn_jax.selection.protocol import (
    LayerChoice,
    LayerRead,
    LayerSeen,
    Opened,
    Opening,
    Remembered,
    Seen,
    Undrafted,
)


def attend_as_chosen(choices: Sequence[LayerChoice] | None) -> Attend:
    """Attends in each layer as its choice says, without choices to everything; notes a `LayerSeen`."""

    def attend(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> Attended:
        choice = None if choices is None else choices[layer]
        if callable(choice):
            read = choice(layer, q, cache)
        else:
            plan, memory = choice if isinstance(choice, Remembered) else (choice, None)
            attended = cache.attend(layer, q, plan, memory=memory)
            read = LayerRead(attended.out, plan, memory=attended.memory)
        return Attended(read.out, LayerSeen(q, read.plan, read.share, read.memory))

    return attend


def plan_share(plan: SelectionPlan | None, past: Int32[Array, " B"], num_kv_heads: int) -> Float[Array, "B K"]:
    """Share of the past that each kv head reads by a plan; without one, all of it."""
    if plan is None:
        return jnp.ones((past.shape[0], num_kv_heads), jnp.float32)
    plan, size = plan.take_layer(), plan.block_size
    entries = plan.counts
    # Selected slots are of the past; of a block a part may be.
    if size > 1:
        listed = jnp.arange(plan.block_ids.shape[-1]) < plan.counts[..., None]
        inside = jnp.clip(past[:, None, None] - plan.block_ids * size, 0, size)
        entries = jnp.sum(jnp.where(listed, inside, 0), axis=-1)
    return entries / jnp.maximum(past[:, None], 1)


def head_shares(seen: Seen) -> Float[Array, "B L K"]:
    """Share of the past that each kv head of each layer read in a window."""
    heads = seen.cache.num_kv_heads
    shares = [plan_share(one.plan, seen.past, heads) if one.share is None else one.share for one in seen.layers]
    return jnp.stack(shares, axis=1)


def layer_shares(seen: Seen) -> Float[Array, "B L"]:
    """Share of the past that each layer read in a window, averaged over kv heads.

    `1 - mean` of this over layers and windows is the number called `kv_reduction`.
    """
    if all(one.plan is None and one.share is None for one in seen.layers):
        return jnp.ones((seen.past.shape[0], len(seen.layers)), jnp.float32)
    return jnp.mean(head_shares(seen), axis=-1)


def past_mask(plan: SelectionPlan | None, past: Int32[Array, " B"], cache: KVCache) -> Bool[Array, "B K S"]:
    """The slots of the past that a plan reads; without one, all of them."""
    inside = jnp.arange(cache.num_slots) < past[:, None, None]
    if plan is None:
        return jnp.broadcast_to(inside, (past.shape[0], cache.num_kv_heads, cache.num_slots))
    return plan_slots(plan, cache.num_slots) & inside


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ReadEverything(Undrafted):
    """The selection that selects nothing: draft and target read all of their caches."""

    def init(self, opening: Opening) -> Opened:
        """Nothing to remember."""
        return opening.opened(())

    def plan(self, state: tuple[()], draft_cache: KVCache | None, past: Int32[Array, " B"]) -> tuple[None, tuple[()]]:
        """Everything."""
        return None, state

    def learn(self, state: tuple[()], seen: Seen) -> tuple[()]:
        """Nothing."""
        return state
