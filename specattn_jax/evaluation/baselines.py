"""Other ways to choose what the target reads, to compare SpecAttn with. None of them asks the draft.

Each is a `Selection`, so the loop, the sparse attention and the accounting of reads are the same for all.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32
from specattn_kernels import SelectionPlan, compact_blocks, select_blocks

from specattn_jax.evaluation.attention import attention_read, remember
from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.selection.alignment import NucleusMass, Steering, reduce_heads
from specattn_jax.selection.protocol import LayerChoice, LayerRead, LayerReader, Opened, Opening, Seen, Undrafted
from specattn_jax.selection.reads import layer_shares


class _Forgetful(Undrafted):
    """The part of a selection that remembers nothing."""

    def init(self, opening: Opening) -> Opened:
        """Nothing."""
        return opening.opened(())

    def learn(self, state: tuple[()], seen: Seen) -> tuple[()]:
        """Nothing."""
        return state


def _sparse_share(saving: Float[Array, ""], layers: int, dense: int) -> Float[Array, ""]:
    """Share that each sparse layer reads, so that with so many dense ones all together save what is wanted."""
    return jnp.clip((layers * (1.0 - saving) - dense) / (layers - dense), 0.0, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streaming(_Forgetful):
    """StreamingLLM (Xiao et al. 2023): attention sinks and a recent window, nothing in between.

    Attributes:
        saving: share of all reads to save.
        target: shape of the target.
        num_sink: first slots that are read.
        dense_layers: leading layers that read everything.
    """

    saving: Float[Array, ""]
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    num_sink: int = dataclasses.field(default=4, metadata={"static": True})
    dense_layers: int = dataclasses.field(default=2, metadata={"static": True})

    def plan(
        self, state: tuple[()], draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[LayerChoice, ...], tuple[()]]:
        """The same slots for every head of all sparse layers."""
        layers = self.target.num_layers
        share = _sparse_share(self.saving, layers, self.dense_layers)

        def read(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> LayerRead:
            kept = jnp.round(share * past).astype(jnp.int32)[:, None]
            slot = jnp.arange(cache.num_slots)
            last = slot >= past[:, None] - jnp.maximum(kept - self.num_sink, 0)
            mask = ((slot < jnp.minimum(self.num_sink, kept)) | last) & (slot < past[:, None])
            shape = (past.shape[0], cache.num_kv_heads, cache.num_slots)
            plan = compact_blocks(jnp.broadcast_to(mask[:, None], shape), block_size=1)
            return LayerRead(cache.attend(layer, q, plan).out, plan)

        return (None,) * self.dense_layers + (read,) * (layers - self.dense_layers), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quest(_Forgetful):
    """Quest (Tang et al. 2024): pages whose channel-wise minima and maxima bound the logits of a query most highly.

    A page's score is the softmax over pages of each query head's bound, averaged over the heads that share a kv head
    (its queries must read the same pages here), and the largest over the window's queries. The minima and maxima, two
    rows a page, are metadata that Quest reads besides; they are not counted as reads.

    Attributes:
        saving: share of all reads to save.
        target: shape of the target.
        page: slots per page.
        dense_layers: leading layers that read everything.
    """

    saving: Float[Array, ""]
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    page: int = dataclasses.field(default=16, metadata={"static": True})
    dense_layers: int = dataclasses.field(default=2, metadata={"static": True})

    def plan(
        self, state: tuple[()], draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[LayerChoice, ...], tuple[()]]:
        """The best pages for every kv head of all sparse layers."""
        layers = self.target.num_layers
        share = _sparse_share(self.saving, layers, self.dense_layers)

        def read(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> LayerRead:
            value = _page_scores(q, cache.keys(layer), past, self.page)
            count = jnp.round(share * -(-past // self.page)).astype(jnp.int32)
            rank = jnp.argsort(jnp.argsort(-value, axis=-1), axis=-1)
            plan = compact_blocks((rank < count[:, None, None]) & (value >= 0), block_size=self.page)
            return LayerRead(cache.attend(layer, q, plan).out, plan)

        return (None,) * self.dense_layers + (read,) * (layers - self.dense_layers), state


def _page_scores(
    q: Float[Array, "B T N H"], keys: Float[Array, "B K S H"], past: Int32[Array, " B"], page: int
) -> Float[Array, "B K pages"]:
    """Quest's scores of the pages of the past; -1 for pages beyond it."""
    batch, heads, slots, width = keys.shape
    pages = -(-slots // page)
    in_past = jnp.arange(pages * page) < past[:, None]
    padded = jnp.pad(keys.astype(jnp.float32), ((0, 0), (0, 0), (0, pages * page - slots), (0, 0)))
    inside = in_past.reshape(batch, 1, pages, page, 1)
    paged = padded.reshape(batch, heads, pages, page, width)
    low, high = (
        jnp.min(jnp.where(inside, paged, jnp.inf), axis=3),
        jnp.max(jnp.where(inside, paged, -jnp.inf), axis=3),
    )
    exists = jnp.any(in_past.reshape(batch, pages, page), axis=-1)[:, None]
    low, high = (jnp.where(exists[..., None], x, 0.0) for x in (low, high))
    grouped = q.astype(jnp.float32).reshape(*q.shape[:2], heads, -1, width)
    # q * (low or high), whichever is larger, summed over channels.
    up, down = jnp.maximum(grouped, 0.0), jnp.minimum(grouped, 0.0)
    bound = jnp.einsum("btkgh,bkph->bktgp", up, high) + jnp.einsum("btkgh,bkph->bktgp", down, low)
    bound = jnp.where(exists[:, :, None, None], bound * width**-0.5, -jnp.inf)
    some = jnp.any(exists, axis=-1)[..., None, None, None]
    chance = jax.nn.softmax(jnp.where(some, bound, 0.0), axis=-1)
    return jnp.where(exists, jnp.max(jnp.mean(chance, axis=3), axis=2), -1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle(Undrafted):
    """The nucleus of the target's own attention at this very window: what no prediction can beat by much.

    As the default policy, but for the scores: the largest over the window's queries of the attention, averaged over the
    heads that share a selection. Remembers what was read, to meet a wanted saving.

    Attributes:
        mass: how much attention mass each layer keeps.
        target: shape of the target.
        per: `kv_head` selects for each kv head, `layer` the same for all.
        num_sink: first slots that are always read.
        num_recent: last slots that are always read.
        dense_layers: leading layers that read everything.
        block_size: slots per block.
    """

    mass: NucleusMass
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    per: Literal["kv_head", "layer"] = dataclasses.field(default="kv_head", metadata={"static": True})
    num_sink: int = dataclasses.field(default=4, metadata={"static": True})
    num_recent: int = dataclasses.field(default=16, metadata={"static": True})
    dense_layers: int = dataclasses.field(default=0, metadata={"static": True})
    block_size: int = dataclasses.field(default=1, metadata={"static": True})

    def init(self, opening: Opening) -> Opened:
        """Nothing was read yet."""
        return opening.opened(Steering.start(opening.batch, self.target.num_layers))

    def plan(
        self, state: Steering, draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[LayerChoice, ...], Steering]:
        """One nucleus for every kv head, or for every layer, of each sparse layer."""
        masses, sparse = self.mass.p(past, state), range(self.dense_layers, self.target.num_layers)
        readers = tuple(self._reader(masses[:, layer], past) for layer in sparse)
        return (None,) * self.dense_layers + readers, state

    def _reader(self, p: Float[Array, " B"], past: Int32[Array, " B"]) -> LayerReader:
        """Reads the nucleus of that mass."""

        def read(layer: int, q: Float[Array, "B T N H"], cache: KVCache) -> LayerRead:
            attention = cache.attend(layer, q, return_scores=True).scores
            assert attention is not None
            sources = jnp.max(reduce_heads(attention, self.per, cache.num_kv_heads), axis=1)
            shape = (past.shape[0], cache.num_kv_heads)
            plan = select_blocks(
                jnp.broadcast_to(sources, (*shape, cache.num_slots)),
                jnp.broadcast_to(p[:, None], shape),
                past,
                block_size=self.block_size,
                num_sink=self.num_sink,
                num_recent=self.num_recent,
            )
            return LayerRead(cache.attend(layer, q, plan).out, plan)

        return read

    def learn(self, state: Steering, seen: Seen) -> Steering:
        """Notes what was read."""
        return state.add(layer_shares(seen), seen.active)


class VegasState(NamedTuple):
    """What `Vegas` remembers.

    Attributes:
        attention: attention as last seen, one array per target layer.
        steering: what was read so far.
        windows: windows verified so far.
    """

    attention: tuple[Float[Array, "B K S"], ...]
    steering: Steering
    windows: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vegas(Undrafted):
    """The nucleus of the target's own attention at the last verification, as self-speculation with sparse caches does.

    What was read then has fresh attention (the largest over the window's queries); what was not keeps what it last had,
    decayed. Until something was verified everything is read.

    Attributes:
        mass: how much attention mass each layer keeps.
        target: shape of the target.
        decay: factor, per window, on the attention of entries that were not read.
        num_sink: first slots that are always read.
        num_recent: last slots that are always read.
    """

    mass: NucleusMass
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    decay: float = dataclasses.field(default=1.0, metadata={"static": True})
    num_sink: int = dataclasses.field(default=4, metadata={"static": True})
    num_recent: int = dataclasses.field(default=16, metadata={"static": True})

    def init(self, opening: Opening) -> Opened:
        """Nothing was seen yet."""
        layers = self.target.num_layers
        empty = jnp.zeros((opening.batch, self.target.num_kv_heads, opening.num_slots), jnp.float32)
        state = VegasState((empty,) * layers, Steering.start(opening.batch, layers), jnp.zeros((), jnp.int32))
        return opening.opened(state)

    def plan(
        self, state: VegasState, draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[SelectionPlan, ...], VegasState]:
        """One nucleus of what is remembered for every kv head of each layer; everything at first."""
        # The first window, read whole, is no reason to read less in the next ones.
        later = Steering(jnp.maximum(state.steering.read - 1.0, 0.0), jnp.maximum(state.steering.windows - 1, 0))
        masses = jnp.where(state.windows > 0, self.mass.p(past, later), 1.0)
        plans = tuple(
            select_blocks(
                attention,
                jnp.broadcast_to(masses[:, layer, None], attention.shape[:2]),
                past,
                num_sink=self.num_sink,
                num_recent=self.num_recent,
            )
            for layer, attention in enumerate(state.attention)
        )
        return plans, state

    def learn(self, state: VegasState, seen: Seen) -> VegasState:
        """Remembers the attention of this window over what it read."""
        attention = tuple(
            remember(before, attention_read(layer, now.q, seen.cache, now.plan), self.decay)
            for layer, (before, now) in enumerate(zip(state.attention, seen.layers, strict=True))
        )
        return VegasState(attention, state.steering.add(layer_shares(seen), seen.active), state.windows + 1)
