"""The target alone, token by token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specattn_jax.decoding.protocol import DecodeSettings, Models, WindowRecord, newest, next_keys
from specattn_jax.decoding.sampling import Verdict, choose, is_sound, penalise
from specattn_jax.decoding.state import DecodeState, commit, note_faults
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.models.forward import forward
from specattn_jax.selection.protocol import Seen
from specattn_jax.selection.reads import attend_as_chosen, layer_shares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Every token is the target's own; each reads the whole cache.

    Attributes:
        settings: how tokens are drawn, and where sequences end.
    """

    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings, metadata={"static": True})

    name: ClassVar[str] = "autoregressive"
    window: ClassVar[int] = 0
    needs_draft: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    drafter: ClassVar[Drafter] = Drafter.NOBODY
    lossless: ClassVar[bool] = True

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Needs nothing of its own, and no draft's cache."""
        return dataclasses.replace(state, draft_cache=None, own=())

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One token."""
        for_token, later = next_keys(state, 2)
        past = state.target_cache.lengths
        read = forward(models.target, newest(state), state.target_cache, attend_as_chosen(None))
        logits, sampling = models.target.logits(read.hidden[:, -1]), self.settings.sampling
        state = note_faults(state, is_sound(logits))
        token, _ = choose(for_token, penalise(logits, state.history, sampling), sampling)
        seen = Seen(past, ~state.done, read.notes, read.cache)
        verdict, shares = Verdict(token[:, None], jnp.zeros_like(past)), layer_shares(seen)
        state = dataclasses.replace(state, target_cache=read.cache.at(past), keys=later)
        state = commit(state, verdict, shares, drafted=0, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(seen, shares, read.hidden, verdict)

    def cost(self, scenario: Scenario) -> Work:
        """One token, for one dense pass of the target."""
        return Work(tokens=1.0, verified=1)
