"""Two levels above the text: no draft is needed to have several tokens in each pass over few entries."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Int32, Key

from specattn_jax.decoding.levels import TwoLevels
from specattn_jax.decoding.looking import LONGEST, certain, look_up, text_so_far, write_on
from specattn_jax.decoding.middle import InnerDraft, InnerDrafter, Proposed, Standing
from specattn_jax.decoding.protocol import Models
from specattn_jax.decoding.sampling import Verdict
from specattn_jax.decoding.state import DecodeState
from specattn_jax.decoding.work import Scenario, Work


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HierarchicalLookup(TwoLevels):
    """The text proposes, the target over selected entries keeps some, the target over everything verifies those.

    What is looked up costs nothing, and where it is wrong, a pass over few entries still gives the target's own token:
    the middle level then goes token by token, as the target does that drafts for itself. `TwoLevels` says how the two
    levels work together, and what the attributes are.
    """

    needs_draft: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """As all of its kind; the output so far is written behind the prompt."""
        text = text_so_far(state)
        state = super().start(models, state)
        return dataclasses.replace(state, draft_cache=None, own=dataclasses.replace(state.own, text=text))

    def lowest(self, models: Models, state: DecodeState) -> tuple[InnerDrafter, tuple[()]]:
        """The text, which carries nothing: what the middle level gave is written behind it for each look."""
        past, text = state.target_cache.lengths, state.own.text
        sampling, vocab = self.settings.sampling, models.target.config.vocab_size

        def look(carried: tuple[()], standing: Standing, keys: Key[Array, " B"]) -> InnerDraft:
            known = write_on(text, standing.tokens, past + 1)
            tokens = look_up(known, standing.have + 1, longest=LONGEST, window=self.inner)
            return InnerDraft(tokens, certain(tokens, vocab, sampling), carried)

        return look, ()

    def catch_up(
        self, models: Models, state: DecodeState, middle: Proposed, wanted: Int32[Array, " B"], verdict: Verdict
    ) -> DecodeState:
        """Writes what was decided behind the text; what is not committed lies beyond its end."""
        text = write_on(state.own.text, verdict.tokens, state.target_cache.lengths + 1)
        return dataclasses.replace(state, own=dataclasses.replace(state.own, text=text))

    def cost(self, scenario: Scenario) -> Work:
        """Passes of the target over few entries, and one dense pass; the text is nothing beside its cache."""
        return self.work(scenario, scenario.text_rate)
