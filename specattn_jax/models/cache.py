"""The KV cache: the only place that knows how keys and values lie in memory.

A forward pass appends to it and attends through it, layer by layer; nobody else indexes keys or values. So another
layout (quantised, paged, sharded) is another class with the same methods.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int32
from specattn_kernels import (
    AttentionOutput,
    Implementation,
    Scores,
    SelectionPlan,
    Split,
    decode_attention,
    prefill_attention,
    score_cache,
    sparse_decode_attention,
)

from specattn_jax.models.config import ModelConfig

# From so many new tokens on, arithmetic takes the time of attention, and no longer reading the cache.
MANY_TOKENS = 64
# Axes of the keys, or the values, of a layer.
_ENTRIES = "B K S H"


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-value // multiple) * multiple


class Look(NamedTuple):
    """How a layer's tokens looked at the cache: their queries, and the log-sum-exp of their scaled logits."""

    q: Float[Array, "*batch T N H"]
    lse: Float[Array, "*batch T N"]


class Reach(NamedTuple):
    """How far back tokens see that do not see everything: the first entries of the cache, and the last ones.

    Attributes:
        recent: entries before the oldest of the tokens that are read at a time, at least 1.
        sinks: entries at the beginning.
    """

    recent: int
    sinks: int = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of everything a model has read.

    One `[B, K, S, H]` array per layer: slicing a layer out of a stacked array would copy it. The arrays are updated in
    place where the cache is donated, and rolled back by lengths alone.

    Attributes:
        k: keys, layer by layer.
        v: values, likewise.
        lengths: valid slots per sequence. Slots beyond hold leftovers of rejected tokens and are never attended.
        implementation: backend of the attention ops; None lets the library choose.
        split: how sequences and kv heads are split over a mesh; None: one device has all.
        waits: sequences that only wait for the others, so that nobody minds what is read for them; None: none does.
    """

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]
    lengths: Int32[Array, " B"]
    implementation: Implementation | None = dataclasses.field(default=None, metadata={"static": True})
    split: Split | None = dataclasses.field(default=None, metadata={"static": True})
    waits: Bool[Array, " B"] | None = None

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        num_slots: int,
        dtype: DTypeLike,
        implementation: Implementation | None = None,
        split: Split | None = None,
    ) -> KVCache:
        """A cache of `num_slots` slots per sequence in which nothing was written."""
        shape = (batch, config.num_kv_heads, num_slots, config.head_dim)
        split = None if split is None else split.fitting(B=batch, K=config.num_kv_heads)
        lies = None if split is None else split.sharding(_ENTRIES)
        k, v = (tuple(jnp.zeros(shape, dtype, device=lies) for _ in range(config.num_layers)) for _ in range(2))
        lengths = jnp.zeros((batch,), jnp.int32, device=None if split is None else split.sharding("B"))
        return cls(k, v, lengths, implementation, split)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.k[0].shape[2]

    @property
    def num_layers(self) -> int:
        """Layers of the model that reads."""
        return len(self.k)

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.k[0].shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of keys and values."""
        return self.k[0].dtype

    def at(self, lengths: Int32[Array, " B"]) -> KVCache:
        """The same cache, rolled back (or extended over slots already written) to `lengths`. Nothing is copied."""
        return dataclasses.replace(self, lengths=lengths)

    def waiting(self, waits: Bool[Array, " B"] | None) -> KVCache:
        """The same cache, of which hardly anything is read for sequences that wait, and what comes out is anything.

        Beyond their lengths they are written to as before, and up to there they keep what they hold.
        """
        return dataclasses.replace(self, waits=waits)

    def readable(self, past: Int32[Array, " B"]) -> Int32[Array, " B"]:
        """As many slots, but of sequences that wait no more than one, which saves reading the others."""
        return past if self.waits is None else jnp.where(self.waits, jnp.minimum(past, 1), past)

    def with_room(self, num_slots: int) -> KVCache:
        """The same cache with at least so many slots per sequence; a longer one is a copy, twice as long or more."""
        if num_slots <= self.num_slots:
            return self
        more = [(0, 0), (0, 0), (0, max(num_slots, 2 * self.num_slots) - self.num_slots), (0, 0)]
        k, v = (tuple(jnp.pad(layer, more) for layer in layers) for layers in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)

    def append(self, layer: int, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> KVCache:
        """Writes T new entries of one layer behind `lengths`, which stay: `at` moves them once all layers have written.

        The caller guarantees `lengths + T <= S`: a start beyond that would be moved back and overwrite valid entries.
        """
        keys, values = list(self.k), list(self.v)
        keys[layer] = _write(keys[layer], k, self.lengths, self.split)
        values[layer] = _write(values[layer], v, self.lengths, self.split)
        return dataclasses.replace(self, k=tuple(keys), v=tuple(values))

    def attend(
        self,
        layer: int,
        q: Float[Array, "B T N H"],
        plan: SelectionPlan | None = None,
        *,
        valid: Int32[Array, " B"] | None = None,
        memory: Float[Array, "B K S"] | None = None,
        return_scores: Scores = False,
        return_lse: bool = False,
    ) -> AttentionOutput:
        """Attention of the T tokens just appended behind `lengths`, causal among themselves.

        Args:
            layer: which layer.
            q: their queries.
            plan: what they read of the past; None is everything.
            valid: slots of each sequence, for prompts that are padded on the right: for tokens beyond them anything
                comes out. A promise that may save work, nothing more.
            memory: how much each slot got when it was last read, which is noted anew; only where a plan is read.
            return_scores: which softmax weights to return; only where everything is read.
            return_lse: whether to return the log-sum-exp of the scaled logits that were read.
        """
        starts = self.readable(self.lengths)
        lengths = starts + q.shape[1]
        k, v = self.k[layer], self.v[layer]
        lies: dict[str, Any] = {"implementation": self.implementation, "split": self.split}
        if memory is not None and plan is None:
            raise ValueError("memory is given without a plan; only what a plan reads is noted.")
        if plan is None and not return_scores and q.shape[1] >= MANY_TOKENS:
            return prefill_attention(q, k, v, starts, lengths=valid, return_lse=return_lse, **lies)
        if plan is None:
            return decode_attention(q, k, v, lengths, return_scores=return_scores, return_lse=return_lse, **lies)
        if return_scores:
            raise ValueError("return_scores is set, but where a plan is read there are no weights of all slots.")
        return sparse_decode_attention(q, k, v, plan, lengths, memory=memory, return_lse=return_lse, **lies)

    def attend_within(
        self, layer: int, q: Float[Array, "B T N H"], reach: Reach, *, valid: Int32[Array, " B"] | None = None
    ) -> AttentionOutput:
        """Attention of the T tokens just appended, as `attend`, but of the past only what is in reach.

        All T see the same past: the sinks, and `reach.recent` entries before the first of them. What is copied for it
        is as long as that and the T tokens together. Where the cache is no longer than this, everything is read.

        Args:
            layer: which layer.
            q: their queries.
            reach: what is read of the past.
            valid: as in `attend`.
        """
        sinks, near = reach.sinks, reach.recent + q.shape[1]
        if sinks + near >= self.num_slots:
            return self.attend(layer, q, valid=valid)
        # From here on entries are near: right behind the sinks where the past is short, and then nothing is left out.
        first = jnp.maximum(self.lengths - reach.recent, sinks)
        k, v = (_join(layers[layer], first, sinks, near, self.split) for layers in (self.k, self.v))
        skipped = first - sinks
        lengths = None if valid is None else jnp.maximum(valid - skipped, 0)
        return prefill_attention(
            q, k, v, self.lengths - skipped, lengths=lengths, implementation=self.implementation, split=self.split
        )

    def score(self, layer: int, look: Look, past: Int32[Array, " B"]) -> Float[Array, "B K S"]:
        """How strongly the tokens of a look want each of the first `past` slots, in the cache's dtype.

        The largest weight over the tokens, which is the mean over the query heads of a kv head; see `score_cache`.
        """
        k = self.k[layer]
        return score_cache(
            look.q,
            k,
            look.lse,
            self.readable(past),
            dtype=k.dtype,
            implementation=self.implementation,
            split=self.split,
        )

    def keys(self, layer: int) -> Float[Array, "B K S H"]:
        """The keys of a layer, for those who choose by them; what lies beyond the written slots may be anything."""
        return self.k[layer]

    def values(self, layer: int) -> Float[Array, "B K S H"]:
        """The values of a layer, likewise."""
        return self.v[layer]


def _write(
    slots: Float[Array, "B K S H"], new: Float[Array, "B T K H"], starts: Int32[Array, " B"], split: Split | None = None
) -> Float[Array, "B K S H"]:
    """Writes T new entries at each sequence's own start; every device those of its sequences and heads."""
    if split is not None:
        written: Float[Array, "B K S H"] = split.run(_write, (slots, new, starts), (_ENTRIES, "B T K H", "B"), _ENTRIES)
        return written
    rows = jnp.swapaxes(new, 1, 2).astype(slots.dtype)
    if slots.shape[0] == 1:
        # As a batch of one this would be a scatter, which first asks whether it stays within bounds.
        return jax.lax.dynamic_update_slice(slots, rows, (0, 0, starts[0], 0))
    write = jax.vmap(lambda slot, row, start: jax.lax.dynamic_update_slice(slot, row, (0, start, 0)))
    return write(slots, rows, starts)


def _join(
    slots: Float[Array, "B K S H"], first: Int32[Array, " B"], sinks: int, near: int, split: Split | None = None
) -> Float[Array, "B K n H"]:
    """The first `sinks` slots, then `near` slots from each sequence's own `first` on; every device its own."""
    if split is not None:
        local = functools.partial(_join, sinks=sinks, near=near)
        joined: Float[Array, "B K n H"] = split.run(local, (slots, first), (_ENTRIES, "B"), _ENTRIES)
        return joined
    take = jax.vmap(lambda slot, start: jax.lax.dynamic_slice_in_dim(slot, start, near, axis=1))
    return jnp.concatenate([slots[:, :, :sinks], take(slots, first)], axis=2)
