"""The published selection (arXiv 2510.27641): one draft layer stands for each target layer, and nuclei are united."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from specattn_kernels import Implementation, SelectionPlan, compact_blocks, lay, top_p_threshold

from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.forward import Attend, Attended, Read
from specattn_jax.models.sharding import replicated
from specattn_jax.selection.alignment import Alignment, NucleusMass, reduce_heads
from specattn_jax.selection.policy import SelectionPolicy
from specattn_jax.selection.protocol import LayerChoice, Opened, Opening, Seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Published:
    """The `layer_map` policies, with all that they need to know of one model pair.

    The state is the union of the steps' nuclei, one row per draft layer that stands for a sparse target layer.

    Attributes:
        alignment: which draft layer stands for which target layer.
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

    @property
    def _sparse_layers(self) -> list[tuple[int, int]]:
        """Target layers that read sparsely, each with the draft layer that stands for it."""
        return list(enumerate(self.alignment.layer_map))[self.policy.dense_layers :]

    @property
    def _watched_layers(self) -> tuple[int, ...]:
        """Draft layers that stand for a sparse target layer."""
        return tuple(sorted({source for _, source in self._sparse_layers}))

    def init(self, opening: Opening) -> Opened:
        """No slot is in a nucleus yet."""
        shape = (opening.batch, len(self._watched_layers), opening.num_slots)
        return opening.opened(lay(opening.split, jnp.zeros(shape, jnp.bool_), "B rows S"))

    def observe(
        self, state: Bool[Array, "B rows S"], read: Callable[[Attend], Read], step: Int32[Array, ""]
    ) -> tuple[Read, Bool[Array, "B rows S"]]:
        """A dense step of the draft; adds the nucleus of each watched layer's mean attention."""
        watched = self._watched_layers

        def attend(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> Attended:
            if layer not in watched:
                return Attended(cache.attend(layer, q).out)
            result = cache.attend(layer, q, return_scores="newest")
            assert result.scores is not None
            return Attended(result.out, reduce_heads(result.scores[:, -1], "layer", self.draft.num_kv_heads))

        seen = read(attend)
        if not watched:
            return seen, state
        rows = jnp.concatenate([seen.notes[layer] for layer in watched], axis=1)
        threshold = top_p_threshold(
            rows,
            self._row_p(seen.cache.lengths),
            lengths=seen.cache.lengths[:, None],
            method=self.policy.threshold,
            steps=self.policy.steps,
            implementation=self.implementation,
            split=seen.cache.split,
        )
        return seen, state | (rows >= threshold[..., None])

    def plan(
        self, state: Bool[Array, "B rows S"], draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[LayerChoice, ...], Bool[Array, "B rows S"]]:
        """The union of the steps' nuclei, the same for all kv heads of a layer."""
        if not self._sparse_layers:
            return (None,) * self.target.num_layers, state
        united = compact_blocks(
            self._forced(state, past),
            block_size=self.policy.block_size,
            implementation=self.implementation,
            # The rows are layers, of which every device has all.
            split=None if draft_cache is None else replicated(draft_cache.split),
        )
        rows = {layer: self._watched_layers.index(source) for layer, source in self._sparse_layers}
        heads = self.target.num_kv_heads

        def layer_plan(row: int) -> SelectionPlan:
            ids, counts = (jnp.repeat(x[:, row : row + 1], heads, axis=1) for x in (united.block_ids, united.counts))
            return SelectionPlan(ids, counts, united.block_size)

        choices = [layer_plan(rows[layer]) if layer in rows else None for layer in range(self.target.num_layers)]
        return tuple(choices), jnp.zeros_like(state)

    def learn(self, state: Bool[Array, "B rows S"], seen: Seen) -> Bool[Array, "B rows S"]:
        """Nothing: what was read does not change what will be."""
        return state

    def _row_p(self, past: Int32[Array, " B"]) -> Float[Array, "B rows"]:
        """Nucleus mass per watched draft layer: the largest that any of the target layers wants for which it stands."""
        masses = self.mass.p(past)
        users = [[target for target, source in self._sparse_layers if source == row] for row in self._watched_layers]
        return jnp.stack([jnp.max(masses[:, jnp.array(sharing)], axis=1) for sharing in users], axis=1)

    def _forced(self, union: Bool[Array, "B rows S"], past: Int32[Array, " B"]) -> Bool[Array, "B rows blocks"]:
        """Blocks of a union of nuclei, with sinks and recent window, without what lies beyond the past."""
        slot, size = jnp.arange(union.shape[-1]), self.policy.block_size
        past = past[:, None, None]
        keep = union | (slot < self.policy.num_sink) | (slot >= past - self.policy.num_recent)
        keep &= slot < past
        padded = jnp.pad(keep, ((0, 0), (0, 0), (0, -keep.shape[-1] % size)))
        return jnp.any(padded.reshape(*keep.shape[:2], -1, size), axis=-1)
