"""The dense pass of strategies whose target drafts over its own cache: it verifies, and says what to read next."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int32
from specattn_kernels import SelectionPlan

from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.state import DecodeState
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.selection.looks import attend_and_look
from specattn_jax.selection.own import OwnReads
from specattn_jax.selection.protocol import LayerSeen, Seen


class Refreshed(NamedTuple):
    """What a dense pass gave.

    Attributes:
        seen: what the target saw, with its cache rolled back to the past.
        hidden: the target's hidden states.
        plan: what each kv head reads until the next dense pass.
    """

    seen: Seen
    hidden: Float[Array, "B T D"]
    plan: SelectionPlan


def read_and_refresh(
    models: Models,
    state: DecodeState,
    tokens: Int32[Array, "B T"],
    cache: KVCache,
    reads: OwnReads,
    room: int,
    *,
    due: Bool[Array, ""] | None = None,
    before: SelectionPlan | None = None,
) -> Refreshed:
    """Reads tokens over everything, and chooses what is read next by what they looked at.

    Args:
        models: with the target.
        state: where decoding stands.
        tokens: behind the past.
        cache: the target's, in which drafting may have written behind the past.
        reads: how much is read next.
        room: most places that are written behind the past until what is read is chosen again.
        due: whether to choose now; None is yes.
        before: what was read so far, and still is where it is not due.
    """
    past = state.target_cache.lengths
    read = forward(models.target, tokens, cache.at(past), attend_and_look(None))
    # Looks hold the queries.
    layers = tuple(LayerSeen(look.q, None, None) for look in read.notes)

    def choose() -> SelectionPlan:
        return reads.plan(read.notes, read.cache, read.cache.readable(past), room)

    plan = choose() if due is None else jax.lax.cond(due, choose, lambda: before)
    return Refreshed(Seen(past, ~state.done, layers, read.cache.at(past)), read.hidden, plan)
