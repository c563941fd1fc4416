"""Two levels above a draft: it proposes, the target over few entries keeps some, the target over everything verifies.

Source: the hierarchy of TriForce (arXiv 2404.11912).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Key

from specattn_jax.decoding.drafting import draft_window
from specattn_jax.decoding.levels import TwoLevels
from specattn_jax.decoding.middle import InnerDraft, InnerDrafter, Proposed, Standing
from specattn_jax.decoding.protocol import Models, drafting, newest
from specattn_jax.decoding.sampling import Verdict, choose
from specattn_jax.decoding.state import DecodeState
from specattn_jax.decoding.work import Scenario, Work
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.selection.reads import ReadEverything


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hierarchical(TwoLevels):
    """The draft proposes, the target over selected entries keeps some, the target over everything verifies those.

    `TwoLevels` says how the two work together, and what the attributes are.
    """

    needs_draft: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """As all of its kind; the draft reads its last two tokens with the first window."""
        _, cache = drafting(models, state)
        state = super().start(models, state)
        return dataclasses.replace(state, draft_cache=cache.at(state.target_cache.lengths - 1))

    def lowest(self, models: Models, state: DecodeState) -> tuple[InnerDrafter, KVCache]:
        """The draft, which carries its cache."""
        draft, cache = drafting(models, state)
        sampling, vocab = self.settings.sampling, models.target.config.vocab_size

        def draft_inner(cache: KVCache, standing: Standing, keys: Key[Array, " B"]) -> InnerDraft:
            drafted = draft_window(
                draft,
                cache.at(standing.have - 1),
                standing.last,
                keys,
                ReadEverything(),
                (),
                window=self.inner,
                choose=lambda _, key, logits: choose(key, logits, sampling),
                vocab_size=vocab,
                sampling=sampling,
            )
            return InnerDraft(drafted.tokens, drafted.probs, drafted.cache)

        return draft_inner, cache.at(state.target_cache.lengths - 1)

    def catch_up(
        self, models: Models, state: DecodeState, middle: Proposed, wanted: Int32[Array, " B"], verdict: Verdict
    ) -> DecodeState:
        """If all are kept, the draft has to have read all of them but the last; inner windows may have left out two."""
        draft, _ = drafting(models, state)
        tokens = jnp.concatenate([newest(state), middle.tokens], axis=1)
        newer = jnp.take_along_axis(tokens, wanted[:, None] + jnp.arange(-1, 1), axis=1)
        cache = middle.carried.at(state.target_cache.lengths + wanted - 1)
        return dataclasses.replace(state, draft_cache=forward(draft, newer, cache).cache)

    def cost(self, scenario: Scenario) -> Work:
        """Inner windows of the draft and of the target over few entries, and one dense pass."""
        work = self.work(scenario, scenario.draft_rate)
        return work._replace(steps=work.own_steps * self.inner)
