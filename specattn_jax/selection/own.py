"""A model that reads what its own attention wanted most: no second model and no calibration are needed.

A pass that read everything, or a window of sparse steps, leaves a look per layer. All keys are scored once for these,
and each kv head reads the entries with the largest scores until the next look.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32
from specattn_kernels import SelectionPlan, lay, select_blocks

from specattn_jax.errors import UserError
from specattn_jax.models.cache import KVCache, Look
from specattn_jax.models.forward import Attend, Attended, Read
from specattn_jax.selection.looks import attend_and_look, newest_look, note_look, score_looks, window_looks
from specattn_jax.selection.policy import LEAST_DRAFT_ENTRIES
from specattn_jax.selection.protocol import Opened, Opening, Seen


@dataclasses.dataclass(frozen=True)
class OwnReads:
    """How much a model reads of its own cache; static under jit.

    Attributes:
        share: of the cache, for each kv head; at least `LEAST_DRAFT_ENTRIES` entries are read.
        num_sink: first slots that are always read.
        num_recent: last slots that are always read.
        least: fewest entries.
    """

    share: float = 0.1
    num_sink: int = 4
    num_recent: int = 16
    least: int = LEAST_DRAFT_ENTRIES

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise UserError(f"draft_reads is {self.share}; expected a share in (0, 1].")

    def share_of(self, context: int) -> float:
        """The share that is read of so many entries, which is all of few."""
        return min(1.0, max(self.share, self.least / context))

    def plan(self, looks: Sequence[Look], cache: KVCache, past: Int32[Array, " B"], new: int) -> SelectionPlan:
        """What each kv head reads from now on: what the looks want most of the first `past` slots.

        Args:
            looks: layer by layer.
            cache: the model's.
            past: slots that are scored.
            new: most tokens that may be written behind `past` until the next plan. Their slots belong to the recent
                window: they are read as soon as there is something in them.
        """
        slots = cache.num_slots
        scores = score_looks(looks, cache, past)
        recent = self.num_recent + new
        share = jnp.maximum(self.share, self.least / (past + new))
        # Entries that the share may take, and besides those that are always read.
        room = max(math.ceil(self.share * slots), self.least) + 2 + self.num_sink + recent
        return select_blocks(
            scores,
            jnp.broadcast_to(share[:, None, None], scores.shape[:3]),
            jnp.minimum(past + new, slots),
            num_sink=self.num_sink,
            num_recent=recent,
            measure="count",
            capacity=min(slots, room),
            implementation=cache.implementation,
            split=cache.split,
        )


def attend_by(plan: SelectionPlan) -> Attend:
    """Attends in all layers as a plan says, and notes nothing."""
    return lambda layer, q, cache: Attended(cache.attend(layer, q, plan.at_layer(layer)).out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftState:
    """What `SparseDraft` remembers: the looks of a window's steps, `[W, M, B, N, H]`, and what the draft reads."""

    watched: Look
    plan: SelectionPlan


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SparseDraft:
    """The draft reads what the window before looked at most; the target reads everything.

    Attributes:
        reads: how much the draft reads.
    """

    reads: OwnReads = dataclasses.field(default_factory=OwnReads)

    def init(self, opening: Opening) -> Opened:
        """The draft's last two tokens read everything, and say what to read first."""
        read = opening.read(attend_and_look(None))
        plan = self.reads.plan(read.notes, read.cache, opening.past, 2 * (opening.window + 1))
        watched = jax.tree.map(lambda x: jnp.zeros((opening.window, *x.shape), x.dtype), newest_look(read.notes))
        watched = lay(opening.split, watched, "W M B N")
        return Opened(DraftState(watched, plan), read.cache, opening.target_cache)

    def observe(
        self, state: DraftState, read: Callable[[Attend], Read], step: Int32[Array, ""]
    ) -> tuple[Read, DraftState]:
        """A sparse step; notes what its newest token looked at."""
        seen = read(attend_and_look(state.plan))
        return seen, dataclasses.replace(state, watched=note_look(state.watched, seen.notes, step))

    def plan(self, state: DraftState, draft_cache: KVCache | None, past: Int32[Array, " B"]) -> tuple[None, DraftState]:
        """Everything for the target; what the draft reads in the next window is chosen anew."""
        if draft_cache is None:
            raise ValueError("draft_cache is None; a sparse draft needs one.")
        new = 2 * (state.watched.lse.shape[0] + 1)
        plan = self.reads.plan(window_looks(state.watched), draft_cache, past, new)
        return None, dataclasses.replace(state, plan=plan)

    def learn(self, state: DraftState, seen: Seen) -> Any:
        """Nothing: the target read everything."""
        return state
