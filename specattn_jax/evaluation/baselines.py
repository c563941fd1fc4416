"""Other ways to choose what the target reads, to compare SpecAttn with. None of them asks the draft.

Each is a `selection.Selection`, so the loop, the sparse attention and the accounting of reads are the same for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int32
from specattn_kernels import SelectionPlan, compact_blocks, decode_attention, select_blocks

from specattn_jax.decoding.speculative import WindowRead
from specattn_jax.evaluation.learning import attend_plan, attention_read, remember
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import LayerChoice
from specattn_jax.selection.alignment import NucleusMass, reduce_heads
from specattn_jax.selection.TODO import DenseDraft, DraftScores


class _WithoutDraft(DenseDraft):
    """The part of a selection that would listen to the draft."""

    @property
    def observed_layers(self) -> tuple[int, ...]:
        """None."""
        return ()

    def observe(self, scores: Float[Array, "B 1 N S"]) -> Float[Array, "B r S"]:
        """Is never asked."""
        raise NotImplementedError

    def start(self, batch: int, num_slots: int, dtype: DTypeLike = jnp.float32) -> DraftScores:
        """Nothing."""
        return DraftScores(None, None)

    def update(
        self, scores: DraftScores, observed: Sequence[Float[Array, "B r S"]], lengths: Int32[Array, " B"]
    ) -> DraftScores:
        """Nothing."""
        return scores


class _FixedShare(_WithoutDraft):
    """Dense layers first; every other layer reads the same share, so that all together save what is wanted."""

    saving: Float[Array, ""]
    target: ModelConfig
    dense_layers: int

    def plan(
        self,
        scores: DraftScores,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> tuple[LayerChoice, ...]:
        """The same choice for all sparse layers."""
        sparse_layers = self.target.num_layers - self.dense_layers
        wanted = self.target.num_layers * (1.0 - self.saving) - self.dense_layers
        choose = functools.partial(self.choose, jnp.clip(wanted / sparse_layers, 0.0, 1.0))
        return (None,) * self.dense_layers + (choose,) * sparse_layers

    def choose(
        self,
        share: Float[Array, ""],
        q: Float[Array, "B T N H"],
        keys: Float[Array, "B K S H"],
        past: Int32[Array, " B"],
    ) -> SelectionPlan:
        """What one layer reads, `share` of the past."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streaming(_FixedShare):
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

    def choose(
        self,
        share: Float[Array, ""],
        q: Float[Array, "B T N H"],
        keys: Float[Array, "B K S H"],
        past: Int32[Array, " B"],
    ) -> SelectionPlan:
        """The same slots for every head."""
        kept = jnp.round(share * past).astype(jnp.int32)[:, None]
        slot = jnp.arange(keys.shape[2])
        last = slot >= past[:, None] - jnp.maximum(kept - self.num_sink, 0)
        mask = ((slot < jnp.minimum(self.num_sink, kept)) | last) & (slot < past[:, None])
        return compact_blocks(jnp.broadcast_to(mask[:, None], keys.shape[:3]), block_size=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quest(_FixedShare):
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

    def choose(
        self,
        share: Float[Array, ""],
        q: Float[Array, "B T N H"],
        keys: Float[Array, "B K S H"],
        past: Int32[Array, " B"],
    ) -> SelectionPlan:
        """The best pages for every kv head."""
        value = _page_scores(q, keys, past, self.page)
        pages = -(-past // self.page)
        count = jnp.round(share * pages).astype(jnp.int32)
        rank = jnp.argsort(jnp.argsort(-value, axis=-1), axis=-1)
        mask = (rank < count[:, None, None]) & (value >= 0)
        return compact_blocks(mask, block_size=self.page)


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
class Oracle(_WithoutDraft):
    """The nucleus of the target's own attention at this very window: what no prediction can beat by much.

    As the default policy, but for the scores: the largest over the window's queries of the attention, averaged over the
    heads that share a selection.

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

    def plan(
        self,
        scores: DraftScores,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> tuple[LayerChoice, ...]:
        """One nucleus for every kv head, or for every layer, of each sparse layer."""
        layers = self.mass.p(past, None if read is None else jnp.mean(read, axis=1), windows)

        def for_layer(layer: int) -> LayerChoice:
            if layer < self.dense_layers:
                return None

            def choose(
                q: Float[Array, "B T N H"], keys: Float[Array, "B K S H"], past: Int32[Array, " B"]
            ) -> SelectionPlan:
                attention = decode_attention(q, keys, keys, past + q.shape[1], return_scores=True).scores
                assert attention is not None
                sources = jnp.max(reduce_heads(attention, self.per, keys.shape[1]), axis=1)
                return select_blocks(
                    jnp.broadcast_to(sources, keys.shape[:3]),
                    jnp.broadcast_to(layers[:, layer, None], keys.shape[:2]),
                    past,
                    block_size=self.block_size,
                    num_sink=self.num_sink,
                    num_recent=self.num_recent,
                )

            return choose

        return tuple(for_layer(layer) for layer in range(self.target.num_layers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vegas(_WithoutDraft):
    """The nucleus of the target's own attention at the last verification, as self-speculation with sparse caches does.

    What was read then has fresh attention (the largest over the window's queries); what was not keeps what it last had,
    decayed. Until something was verified everything is read.

    Attributes:
        mass: how much attention mass each layer keeps.
        target: shape of the target.
        decay: factor, per window, on the attention of entries that were not read.
        num_sink: first slots that are always read.
        num_recent: last slots that are always read.
        attention: what is remembered, one array per target layer; None before `prepare`.
        windows: windows verified so far.
    """

    mass: NucleusMass
    target: ModelConfig = dataclasses.field(metadata={"static": True})
    decay: float = dataclasses.field(default=1.0, metadata={"static": True})
    num_sink: int = dataclasses.field(default=4, metadata={"static": True})
    num_recent: int = dataclasses.field(default=16, metadata={"static": True})
    attention: tuple[Float[Array, "B K S"], ...] | None = None
    windows: Int32[Array, ""] | None = None

    def prepare(self, batch: int, num_slots: int) -> Self:
        """Nothing seen yet."""
        empty = jnp.zeros((batch, self.target.num_kv_heads, num_slots), jnp.float32)
        return dataclasses.replace(self, attention=(empty,) * self.target.num_layers, windows=jnp.zeros((), jnp.int32))

    def plan(
        self,
        scores: DraftScores,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> tuple[LayerChoice, ...]:
        """One nucleus of what is remembered for every kv head of each layer; everything at first."""
        if self.attention is None or self.windows is None:
            raise ValueError("Vegas.plan: nothing is remembered; call `prepare` first.")
        # The first window, read whole, is no reason to read less in the next ones.
        steered = None if read is None else jnp.maximum(jnp.mean(read, axis=1) - 1.0, 0.0)
        later = None if windows is None else jnp.maximum(windows - 1, 0)
        layers = jnp.where(self.windows > 0, self.mass.p(past, steered, later), 1.0)
        return tuple(
            select_blocks(
                attention,
                jnp.broadcast_to(layers[:, layer, None], attention.shape[:2]),
                past,
                num_sink=self.num_sink,
                num_recent=self.num_recent,
            )
            for layer, attention in enumerate(self.attention)
        )

    def attend(
        self,
        q: Float[Array, "B T N H"],
        keys: Float[Array, "B K S H"],
        values: Float[Array, "B K S H"],
        plan: SelectionPlan | None,
        lengths: Int32[Array, " B"],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S"]]:
        """The model's own attention; keeps the attention over what was read."""
        return attend_plan(q, keys, values, plan, lengths), attention_read(q, keys, plan, lengths)

    def learn(self, window: WindowRead, past: Int32[Array, " B"]) -> tuple[Self, Float[Array, "B L"]]:
        """Remembers the attention of this window."""
        if self.attention is None or self.windows is None:
            raise ValueError("Vegas.learn: nothing is remembered; call `prepare` first.")
        known = zip(self.attention, window.kept, strict=True)
        attention = tuple(remember(before, seen, self.decay) for before, seen in known)
        return dataclasses.replace(self, attention=attention, windows=self.windows + 1), window.read
