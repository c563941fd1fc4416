"""What a selection is: four functions over a state of its own, which nobody else looks into.

In each window a strategy lets the selection watch the W steps of the draft (`observe`), asks what every target layer is
to read (`plan`), and tells it what verification saw (`learn`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Bool, DTypeLike, Float, Int32
from specattn_kernels import SelectionPlan, Split

from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.forward import Attend, Read, attend_to_all


class Remembered(NamedTuple):
    """A plan, and what is remembered of the slots of the layer that reads it.

    Attributes:
        plan: the slots of the past that are read.
        memory: how much each slot got when it was last read; noted anew for those that are.
    """

    plan: SelectionPlan
    memory: Float[Array, "B K S"]


class LayerRead(NamedTuple):
    """What a layer that attended by itself gives.

    Attributes:
        out: the attention output.
        plan: the slots of the past that it read; None is all of them.
        share: the share of the past that each kv head read, where the plan does not say all of it.
        memory: what is remembered of the slots now, where that was asked for.
    """

    out: Float[Array, "B T N H"]
    plan: SelectionPlan | None
    share: Float[Array, "B K"] | None = None
    memory: Float[Array, "B K S"] | None = None


# Attends in the place of the cache: takes the layer, the queries of the T new tokens, and the cache that holds them.
LayerReader: TypeAlias = Callable[[int, Float[Array, "B T N H"], KVCache], LayerRead]
# What one target layer reads of the past: a plan, everything (None), or what it finds out once its queries are there.
LayerChoice: TypeAlias = SelectionPlan | Remembered | LayerReader | None


class LayerSeen(NamedTuple):
    """What one target layer saw in a window.

    Attributes:
        q: the queries of the T tokens.
        plan: the slots of the past that were read; None is all of them.
        share: the share of the past that each kv head read, where the plan does not say all of it.
        memory: what is remembered of the slots now, where that was asked for.
    """

    q: Float[Array, "B T N H"]
    plan: SelectionPlan | None
    share: Float[Array, "B K"] | None
    memory: Float[Array, "B K S"] | None = None


class Seen(NamedTuple):
    """What verification saw in a window.

    Attributes:
        past: entries in the target's cache before the window.
        active: sequences that still decode; the others count for nothing.
        layers: layer by layer.
        cache: the target's cache, with the window's tokens behind `past`.
    """

    past: Int32[Array, " B"]
    active: Bool[Array, " B"]
    layers: tuple[LayerSeen, ...]
    cache: KVCache


class Opening(NamedTuple):
    """Where a selection begins.

    Attributes:
        target: shape of the target.
        past: entries in the target's cache, the prompt without its newest token.
        num_slots: S of both caches.
        window: W.
        dtype: of the draft.
        draft_cache: the draft's cache; None without a draft.
        read: lets the draft read its last two tokens, attending as it is told.
        target_cache: the target's cache.
        read_target: lets the target read the same two tokens, of which its cache holds the first.
    """

    target: ModelConfig
    past: Int32[Array, " B"]
    num_slots: int
    window: int
    dtype: DTypeLike
    draft_cache: KVCache | None
    read: Callable[[Attend], Read]
    target_cache: KVCache
    read_target: Callable[[Attend], Read]

    @property
    def batch(self) -> int:
        """B."""
        return self.past.shape[0]

    @property
    def split(self) -> Split | None:
        """How the draft is split over a mesh."""
        return None if self.draft_cache is None else self.draft_cache.split

    def opened(self, state: Any) -> Opened:
        """What a selection gives that has read nothing."""
        return Opened(state, self.draft_cache, self.target_cache)


class Opened(NamedTuple):
    """How a selection has begun.

    Attributes:
        state: its state before the first window.
        draft_cache: the draft's cache, in which `Opening.read` may have written.
        target_cache: the target's, in which `Opening.read_target` may have written.
    """

    state: Any
    draft_cache: KVCache | None
    target_cache: KVCache


@runtime_checkable
class Selection(Protocol):
    """Decides what is read, by the draft and by the target; a pytree. Its state keeps its structure from `init` on."""

    def init(self, opening: Opening) -> Opened:
        """The state before the first window, and both caches."""
        ...

    def observe(self, state: Any, read: Callable[[Attend], Read], step: Int32[Array, ""]) -> tuple[Read, Any]:
        """Lets the draft take a step by `read`, decides how it attends, and notes what it looked at.

        Args:
            state: of the selection.
            read: one forward pass of the draft, which attends as it is told.
            step: number of the step in its window.
        """
        ...

    def plan(
        self, state: Any, draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[LayerChoice, ...] | None, Any]:
        """What each target layer reads of the first `past` slots, once all steps were observed; None is everything."""
        ...

    def learn(self, state: Any, seen: Seen) -> Any:
        """The state after a window was verified."""
        ...


class Undrafted:
    """The part of a selection that does not listen to the draft, which reads everything."""

    def observe(self, state: Any, read: Callable[[Attend], Read], step: Int32[Array, ""]) -> tuple[Read, Any]:
        """A dense step of the draft."""
        return read(attend_to_all), state
