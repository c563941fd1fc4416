"""The strategy that takes known text: what selections cost is measured in the windows of real decoding."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from specattn_jax.decoding.protocol import DecodeSettings, Models, WindowRecord, newest
from specattn_jax.decoding.sampling import Verdict
from specattn_jax.decoding.speculative import SpecAttn
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.models.forward import forward
from specattn_jax.selection.protocol import Seen, Selection
from specattn_jax.selection.reads import attend_as_chosen, layer_shares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced:
    """The strategy that takes known text: its windows are drafted, selected and read as in real decoding.

    But the drafted tokens are the text's own, and all of them count as accepted. The target's own token after a window,
    which decoding gets for nothing, is left to the next window.

    Attributes:
        text: what comes after the prompts.
        selection: what the target reads; None reads everything, without drafting.
        window: W.
    """

    text: Int32[Array, "B n"]
    selection: Selection | None
    window: int = dataclasses.field(default=5, metadata={"static": True})

    name: ClassVar[str] = "forced"
    needs_text: ClassVar[bool] = False
    drafter: ClassVar[Drafter] = Drafter.NOBODY
    lossless: ClassVar[bool] = False
    settings: ClassVar[DecodeSettings] = DecodeSettings()

    @property
    def needs_draft(self) -> bool:
        """Where something is selected."""
        return self.selection is not None

    def _strategy(self) -> SpecAttn:
        """The one whose windows are read; only where something is selected."""
        assert self.selection is not None
        return SpecAttn(self.selection, self.settings, self.window)

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """The first new token is the text's own too."""
        state = dataclasses.replace(state, last=state.last.at[:, 1].set(self.text[:, 0]))
        return state if self.selection is None else self._strategy().start(models, state)

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """The next W tokens of the text, the same place in all of them."""
        given = jax.lax.dynamic_slice_in_dim(self.text, state.emitted[0], self.window, axis=1)
        # Of W tokens that are known, the last one stands where the target's own would.
        verdict = Verdict(given, jnp.full_like(state.emitted, self.window - 1))
        if self.selection is not None:
            strategy = self._strategy()
            window = strategy.verify(models, state, state.keys, lambda step, *_: (given[:, step], None))
            return strategy.finish(state, window, verdict)
        past = state.target_cache.lengths
        tokens = jnp.concatenate([newest(state), given], axis=1)
        read = forward(models.target, tokens, state.target_cache, attend_as_chosen(None))
        seen = Seen(past, ~state.done, read.notes, read.cache.at(past))
        shares = layer_shares(seen)
        state = dataclasses.replace(state, target_cache=seen.cache)
        return commit(state, verdict, shares, drafted=0, stop_tokens=()), WindowRecord(
            seen, shares, read.hidden, verdict
        )

    def cost(self, scenario: Scenario) -> Work:
        """Nobody waits for it."""
        return Work(tokens=self.window, verified=self.window + 1)
