"""Our selection: each target kv head is predicted from a calibrated mixture of the draft's attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32
from specattn_kernels import (
    Implementation,
    SelectionCall,
    SelectionPlan,
    Split,
    choose_implementation,
    current_device,
    lay,
    select_blocks,
)

from specattn_jax.errors import UserError
from specattn_jax.models.cache import KVCache, Look
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.forward import Attend, Attended, Read
from specattn_jax.models.sharding import replicated, target_split
from specattn_jax.selection.alignment import Alignment, NucleusMass, Steering, reduce_heads
from specattn_jax.selection.looks import attend_and_look, note_look, score_looks, window_looks
from specattn_jax.selection.policy import LEAST_DRAFT_ENTRIES, SelectionPolicy
from specattn_jax.selection.protocol import LayerChoice, Opened, Opening, Remembered, Seen
from specattn_jax.selection.reads import layer_shares

# Layers for which is selected at a time where there are no kernels.
_LAYERS_AT_ONCE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixtureState:
    """What `Mixture` remembers.

    Attributes:
        watched: what the draft's steps of this window looked at: for sources that are kv heads the looks of all W
            steps, `[W, M, B, N, H]`, from which their attention is worked out once a window; for other sources their
            largest attention so far, `[B, R, S]`, in the draft's dtype, as it only puts entries in order.
        draft_plan: what the draft reads, layer by layer; None is everything.
        steering: what the target read so far.
        memory: layer by layer, how much each slot got from the target: when decoding began, or when it was last read
            where the policy wants that; None where it wants neither.
    """

    watched: Look | Float[Array, "B R S"]
    draft_plan: SelectionPlan | None
    steering: Steering
    memory: tuple[Float[Array, "B K S"], ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """The `mixture` policies, with all that they need to know of one model pair.

    Sources that are kv heads are scored once a window, for the queries of all its steps, so that no step has to write
    out its attention and the draft may read only a part of its cache. Other sources are noted step by step.

    Attributes:
        alignment: how draft attention predicts target attention.
        mass: how much attention mass each target layer keeps.
        policy: the ingredients.
        target: shape of the target.
        draft: shape of the draft.
        implementation: backend of the selection ops; None lets the library choose.
    """

    alignment: Alignment
    mass: NucleusMass
    policy: SelectionPolicy = dataclasses.field(metadata={"static": True})
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    draft: ModelConfig = dataclasses.field(metadata={"static": True})
    implementation: Implementation | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        if self._drafts_sparsely and not self._scores_windows:
            raise UserError(
                f"draft_reads is below 1, but the alignment's sources are of granularity {self.alignment.granularity}; "
                "only kv heads can be scored once a window, so calibrate with granularity kv_head."
            )

    @property
    def _scores_windows(self) -> bool:
        """Whether the draft's cache is scored once a window."""
        return self.alignment.granularity == "kv_head"

    @property
    def _drafts_sparsely(self) -> bool:
        """Whether the draft reads only a part of its cache."""
        return self.policy.draft_reads < 1.0

    def init(self, opening: Opening) -> Opened:
        """Nothing watched yet; a sparse draft reads what its last two tokens look at most, for which they read all."""
        cache, draft_plan = opening.draft_cache, None
        watched: Look | Float[Array, "B R S"]
        if self._scores_windows:
            shape = (opening.window, self.draft.num_layers, opening.batch, self.draft.num_heads)
            watched = Look(
                jnp.zeros((*shape, self.draft.head_dim), opening.dtype), jnp.full(shape, -jnp.inf, jnp.float32)
            )
            watched = lay(opening.split, watched, "W M B N")
        else:
            watched = jnp.zeros((opening.batch, self.alignment.weights.shape[1], opening.num_slots), opening.dtype)
            watched = lay(opening.split, watched, "B R S")
        if self._drafts_sparsely:
            read = opening.read(attend_and_look(None))
            cache = read.cache
            scores = score_looks(read.notes, cache, opening.past)
            draft_plan = self._draft_plan(scores, opening.past, opening.window, cache.split)
        steering = lay(opening.split, Steering.start(opening.batch, self.target.num_layers), "B")
        memory, target_cache = None, opening.target_cache
        if self.policy.opening_weight > 0.0:
            seen = opening.read_target(attend_and_look(None))
            target_cache = seen.cache
            memory = tuple(target_cache.score(layer, look, opening.past) for layer, look in enumerate(seen.notes))
        elif self.policy.memory_weight > 0.0:
            nothing = jnp.zeros((opening.batch, self.target.num_kv_heads, opening.num_slots), target_cache.dtype)
            memory = (lay(target_cache.split, nothing, "B K S"),) * self.target.num_layers
        return Opened(MixtureState(watched, draft_plan, steering, memory), cache, target_cache)

    def observe(
        self, state: MixtureState, read: Callable[[Attend], Read], step: Int32[Array, ""]
    ) -> tuple[Read, MixtureState]:
        """One step of the draft, sparse where the policy says so; notes what its newest token looked at."""
        watched: Look | Float[Array, "B R S"]
        if isinstance(state.watched, Look):
            seen = read(attend_and_look(state.draft_plan))
            watched = note_look(state.watched, seen.notes, step)
        else:
            seen = read(self._observe_sources)
            sources = jnp.concatenate(seen.notes, axis=1).astype(state.watched.dtype)
            watched = jnp.maximum(state.watched, sources)
        return seen, dataclasses.replace(state, watched=watched)

    def _observe_sources(self, layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> Attended:
        """Dense attention of the draft; notes the attention of the layer's sources for the newest token."""
        result = cache.attend(layer, q, return_scores="newest")
        assert result.scores is not None
        granularity = self.alignment.granularity
        return Attended(result.out, reduce_heads(result.scores[:, -1], granularity, self.draft.num_kv_heads))

    def plan(
        self, state: MixtureState, draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[LayerChoice, ...], MixtureState]:
        """One nucleus for every kv head of each sparse target layer; besides, what the draft reads from now on."""
        draft_plan, watched = state.draft_plan, state.watched
        if isinstance(state.watched, Look):
            if draft_cache is None:
                raise ValueError("draft_cache is None; a mixture is made of the draft's attention.")
            scores = score_looks(window_looks(state.watched), draft_cache, past)
            if self._drafts_sparsely:
                draft_plan = self._draft_plan(scores, past, state.watched.lse.shape[0], draft_cache.split)
            # Every head of the target is a mixture of all of the draft's.
            scores = lay(replicated(draft_cache.split), scores, "B M K S")
            sources = scores.reshape(past.shape[0], -1, scores.shape[-1])
        else:
            sources, watched = state.watched, jnp.zeros_like(state.watched)
        split = None if draft_cache is None else target_split(draft_cache.split)
        plans = self._select(sources, state, past, split)
        choices: Sequence[LayerChoice] = plans
        if state.memory is not None and self.policy.memory_weight > 0.0:
            choices = [Remembered(*both) for both in zip(plans, state.memory, strict=True)]
        sparse = tuple(None if layer < self.policy.dense_layers else choice for layer, choice in enumerate(choices))
        return sparse, dataclasses.replace(state, watched=watched, draft_plan=draft_plan)

    def learn(self, state: MixtureState, seen: Seen) -> MixtureState:
        """Notes how much was read, to meet the wanted saving, and what it got."""
        steering, memory = state.steering.add(layer_shares(seen), seen.active), state.memory
        if memory is not None:
            noted = zip(seen.layers, memory, strict=True)
            memory = tuple(before if layer.memory is None else layer.memory for layer, before in noted)
        return dataclasses.replace(state, steering=steering, memory=memory)

    def _draft_plan(
        self, scores: Float[Array, "B M K S"], past: Int32[Array, " B"], window: int, split: Split | None
    ) -> SelectionPlan:
        """What the draft reads in the next window: for each of its kv heads what this window looked at most.

        The slots of all tokens that may be written until the end of that window belong to the recent window, whatever
        is accepted: they are read as soon as there is something in them.

        Args:
            scores: of this window.
            past: slots that were scored.
            window: W.
            split: of the draft's cache.
        """
        policy, slots = self.policy, scores.shape[-1]
        new = 2 * (window + 1)
        share = jnp.maximum(policy.draft_reads, LEAST_DRAFT_ENTRIES / (past + new))
        recent = policy.num_recent + new
        return select_blocks(
            scores,
            share[:, None, None],
            jnp.minimum(past + new, slots),
            block_size=policy.block_size,
            num_sink=policy.num_sink,
            num_recent=recent,
            measure="count",
            capacity=_draft_room(policy, slots, recent),
            implementation=self.implementation,
            split=split,
        )

    def _row_p(self, past: Int32[Array, " B"], steering: Steering) -> Float[Array, "B rows"]:
        """Nucleus mass of every target kv head, layer by layer."""
        masses = self.mass.p(past, steering)
        return jnp.repeat(masses, self.alignment.weights.shape[0] // masses.shape[1], axis=1)

    def _select(
        self,
        sources: Float[Array, "B R S"],
        state: MixtureState,
        past: Int32[Array, " B"],
        split: Split | None,
    ) -> list[SelectionPlan]:
        """Plans of all layers, some layers at a time.

        Without kernels one group is selected after the other, because that takes several arrays of the size of the
        group's scores.
        """
        heads, layers = self.target.num_kv_heads, self.target.num_layers
        most = layers if self._has_kernels(sources.shape) else min(_LAYERS_AT_ONCE, layers)
        size = max(count for count in range(1, most + 1) if layers % count == 0)
        rows, batch = size * heads, sources.shape[0]
        p = self._row_p(past, state.steering)
        age = state.steering.windows.astype(jnp.float32) / self.policy.opening_life
        weight = jnp.maximum(self.policy.opening_weight / (1.0 + age), self.policy.memory_weight)
        known = None if state.memory is None else jnp.stack(state.memory, axis=1).astype(sources.dtype)

        def select(first: Int32[Array, ""] | int) -> SelectionPlan:
            # With an axis of heads, along which devices that hold some of them mix those alone.
            predicted = self._mix(sources, past, first, size)
            if known is not None:
                own = jax.lax.dynamic_slice_in_dim(known, first // heads, size, axis=1)
                predicted += weight.astype(own.dtype)[:, None, None, None] * own
            return select_blocks(
                predicted,
                jax.lax.dynamic_slice_in_dim(p, first, rows, axis=1).reshape(batch, size, heads),
                past,
                block_size=self.policy.block_size,
                num_sink=self.policy.num_sink,
                num_recent=self.policy.num_recent,
                method=self.policy.threshold,
                steps=self.policy.steps,
                implementation=self.implementation,
                split=split,
            )

        if size == layers:
            groups = [select(0)]
        else:
            stacked = jax.lax.map(select, jnp.arange(0, layers * heads, rows))
            groups = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(layers // size)]
        return [groups[layer // size].at_layer(layer % size) for layer in range(layers)]

    def _mix(
        self, sources: Float[Array, "B R S"], past: Int32[Array, " B"], first: Int32[Array, ""] | int, size: int
    ) -> Float[Array, "B size K S"]:
        """The predicted attention of `size` layers from row `first` on, weighted as fits the length of each cache."""
        heads = self.target.num_kv_heads
        if not self.alignment.longer:
            weights = jax.lax.dynamic_slice_in_dim(self.alignment.weights, first, size * heads)
            weights = weights.astype(sources.dtype).reshape(size, heads, -1)
            return jnp.einsum("lkr,brs->blks", weights, sources)
        each = jax.lax.dynamic_slice_in_dim(self.alignment.weights_at(past), first, size * heads, axis=1)
        each = each.astype(sources.dtype).reshape(len(past), size, heads, -1)
        return jnp.einsum("blkr,brs->blks", each, sources)

    def _has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Whether kernels select from all rows at once; they hold no arrays besides scores and ids.

        Args:
            shape: [B, R, S] of the sources.
        """
        rows, policy = shape[0] * self.alignment.weights.shape[0], self.policy
        call = SelectionCall("select_blocks", rows, shape[-1], policy.block_size, policy.threshold)
        chosen = self.implementation or choose_implementation(call, current_device()).name
        return chosen != "xla"


def _draft_room(policy: SelectionPolicy, slots: int, recent: int) -> int:
    """Most blocks that the draft reads of so many slots, of which so many belong to the recent window."""
    size = policy.block_size
    blocks = -(-slots // size)
    share = max(math.ceil(policy.draft_reads * blocks), -(-LEAST_DRAFT_ENTRIES // size)) + 1
    # Blocks that sinks and recent window touch come on top of the share.
    forced = -(-policy.num_sink // size) + -(-recent // size) + 1
    return min(blocks, share + forced)
