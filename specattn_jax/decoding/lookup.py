"""Prompt lookup: what followed the newest tokens when they stood in the text before is proposed again."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specattn_jax.decoding.judging import Judge, judge_exactly
from specattn_jax.decoding.looking import LONGEST, certain, look_up, text_so_far, write_on
from specattn_jax.decoding.protocol import (
    DecodeSettings,
    Models,
    WindowRecord,
    check_window,
    newest,
    next_keys,
    target_logits,
)
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.models.forward import forward
from specattn_jax.selection.protocol import Seen
from specattn_jax.selection.reads import attend_as_chosen, layer_shares


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Proposes what the text says after its newest tokens; the target verifies it in one pass that reads everything.

    No model drafts: it pays where the output repeats the prompt or itself. What the strategy keeps for itself is the
    text, prompt and output in one array.

    Attributes:
        settings: how tokens are drawn, and where sequences end.
        window: W, tokens proposed per window.
        longest: most of the newest tokens that are looked for.
        judge: decides what is kept; another one than the exact rule is for measuring.
    """

    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings)
    window: int = 5
    longest: int = LONGEST
    judge: Judge = judge_exactly

    name: ClassVar[str] = "lookup"
    needs_draft: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    drafter: ClassVar[Drafter] = Drafter.TEXT
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.longest < 1:
            raise UserError(f"longest is {self.longest}; expected at least 1 token to look for.")

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Writes the output so far behind the prompt."""
        return dataclasses.replace(state, draft_cache=None, own=text_so_far(state))

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One window: look up, read, accept or reject, roll back."""
        for_verdict, later = next_keys(state, 2)
        past, sampling = state.target_cache.lengths, self.settings.sampling
        drafted = look_up(state.own, past + 1, longest=self.longest, window=self.window)
        probs = certain(drafted, models.target.config.vocab_size, sampling)
        tokens = jnp.concatenate([newest(state), drafted], axis=1)
        read = forward(models.target, tokens, state.target_cache, attend_as_chosen(None))
        seen = Seen(past, ~state.done, read.notes, read.cache.at(past))
        state, logits = target_logits(models, state, read.hidden, drafted, sampling)
        verdict = self.judge(for_verdict, drafted, probs, logits, sampling, state.statistics.windows)
        shares, text = layer_shares(seen), write_on(state.own, verdict.tokens, past + 1)
        state = dataclasses.replace(state, target_cache=seen.cache, keys=later, own=text)
        state = commit(state, verdict, shares, drafted=self.window, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(seen, shares, read.hidden, verdict)

    def cost(self, scenario: Scenario) -> Work:
        """One dense pass of the target; the text is nothing beside its cache."""
        return Work(tokens=scenario.accepted + 1.0, verified=self.window + 1)
