"""Other ways to choose what the target reads, to compare SpecAttn with. None of them asks the draft.

Each is a `selection.Selection`, so the loop, the sparse attention and the accounting of reads are the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32
from specattn_kernels import SelectionPlan, compact_blocks, select_blocks

from specattn_jax.alignment import NucleusMass
from specattn_jax.config import ModelConfig
from specattn_jax.model import LayerChoice
from specattn_jax.selection import DraftScores


class _WithoutDraft:
    """The part of a selection that would listen to the draft."""

    @property
    def observed_layers(self) -> tuple[int, ...]:
        """None."""
        return ()

    def observe(self, scores: Float[Array, "B T N S"]) -> Float[Array, "B r S"]:
        """Is never asked."""
        raise NotImplementedError

    def start(self, batch: int, num_slots: int) -> DraftScores:
        """Nothing."""
        return DraftScores(None, None)

    def update(
        self, scores: DraftScores, observed: Sequence[Float[Array, "B r S"]], lengths: Int32[Array, " B"]
    ) -> DraftScores:
        """Nothing."""
        return scores


def _sparse_share(saving: Float[Array, ""], num_layers: int, dense_layers: int) -> Float[Array, ""]:
    """Share that the sparse layers may read so that all layers together save `saving`."""
    return jnp.clip((num_layers * (1.0 - saving) - dense_layers) / (num_layers - dense_layers), 0.0, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streaming(_WithoutDraft):
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
        self,
        scores: DraftScores,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> tuple[LayerChoice, ...]:
        """The same slots for every head of every sparse layer."""
        share = _sparse_share(self.saving, self.target.num_layers, self.dense_layers)

        def choose(
            q: Float[Array, "B T N H"], keys: Float[Array, "B K S H"], past: Int32[Array, " B"]
        ) -> SelectionPlan:
            kept = jnp.round(share * past).astype(jnp.int32)[:, None]
            slot = jnp.arange(keys.shape[2])
            last = slot >= past[:, None] - jnp.maximum(kept - self.num_sink, 0)
            mask = ((slot < jnp.minimum(self.num_sink, kept)) | last) & (slot < past[:, None])
            return compact_blocks(jnp.broadcast_to(mask[:, None], keys.shape[:3]), block_size=1)

        return _dense_then(self.dense_layers, self.target.num_layers, choose)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quest(_WithoutDraft):
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
        self,
        scores: DraftScores,
        past: Int32[Array, " B"],
        read: Float[Array, "B L"] | None = None,
        windows: Int32[Array, " B"] | None = None,
    ) -> tuple[LayerChoice, ...]:
        """The best pages for every kv head, as many as the saving leaves."""
        share = _sparse_share(self.saving, self.target.num_layers, self.dense_layers)

        def choose(
            q: Float[Array, "B T N H"], keys: Float[Array, "B K S H"], past: Int32[Array, " B"]
        ) -> SelectionPlan:
            value = _page_scores(q, keys, past, self.page)
            pages = -(-past // self.page)
            count = jnp.round(share * pages).astype(jnp.int32)
            rank = jnp.argsort(jnp.argsort(-value, axis=-1), axis=-1)
            mask = (rank < count[:, None, None]) & (value >= 0)
            return compact_blocks(mask, block_size=self.page)

        return _dense_then(self.dense_layers, self.target.num_layers, choose)


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
                seen = _past_attention(q, keys, past)
                if self.per == "layer":
                    seen = jnp.broadcast_to(jnp.mean(seen, axis=1, keepdims=True), seen.shape)
                return select_blocks(
                    jnp.max(seen, axis=2),
                    jnp.broadcast_to(layers[:, layer, None], seen.shape[:2]),
                    past,
                    block_size=self.block_size,
                    num_sink=self.num_sink,
                    num_recent=self.num_recent,
                )

            return choose

        return tuple(for_layer(layer) for layer in range(self.target.num_layers))


def _past_attention(
    q: Float[Array, "B T N H"], keys: Float[Array, "B K S H"], past: Int32[Array, " B"]
) -> Float[Array, "B K T S"]:
    """Attention of every new token, averaged over each kv head's group; over everything that the token sees."""
    grouped = q.astype(jnp.float32).reshape(*q.shape[:2], keys.shape[1], -1, q.shape[3])
    logits = jnp.einsum("btkgh,bksh->bktgs", grouped, keys.astype(jnp.float32)) * q.shape[3] ** -0.5
    position = past[:, None] + jnp.arange(q.shape[1])
    visible: Bool[Array, "B T S"] = jnp.arange(keys.shape[2]) <= position[..., None]
    return jnp.mean(jax.nn.softmax(jnp.where(visible[:, None, :, None], logits, -jnp.inf), axis=-1), axis=3)


def _dense_then(dense_layers: int, num_layers: int, choose: LayerChoice) -> tuple[LayerChoice, ...]:
    """Dense layers first, then the same choice for all others."""
    return (None,) * dense_layers + (choose,) * (num_layers - dense_layers)
