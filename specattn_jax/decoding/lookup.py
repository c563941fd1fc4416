"""Prompt lookup: what followed the newest tokens when they stood in the text before is proposed again.

Source: Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from specattn_jax.decoding.protocol import (
    DecodeSettings,
    Models,
    WindowRecord,
    check_window,
    newest,
    next_keys,
    target_logits,
)
from specattn_jax.decoding.sampling import verify
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.models.forward import forward
from specattn_jax.selection.protocol import Seen
from specattn_jax.selection.reads import attend_as_chosen, layer_shares


def look_up(
    text: Int32[Array, "B S"], lengths: Int32[Array, " B"], *, longest: int, window: int
) -> Int32[Array, "B W"]:
    """What followed the newest tokens of a text where most of them stood before, the last time that they did.

    A place counts by how many of the `longest` newest tokens stand right before it, one after the other. Behind the end
    of the text its last part is thought to go on as it began. Where no token stands anywhere before, the newest is
    proposed again and again.

    Args:
        text: tokens of each sequence; beyond its length anything.
        lengths: tokens of each, at least 1.
        longest: most tokens that are compared.
        window: W, tokens to propose.
    """

    def of_one(text: Int32[Array, " S"], length: Int32[Array, ""]) -> Int32[Array, " W"]:
        place, same = jnp.arange(text.shape[0]), jnp.ones(text.shape, jnp.bool_)
        matched = jnp.zeros(text.shape, jnp.int32)
        for back in range(1, longest + 1):
            # Tokens that stand so far before each place; the text itself must reach back so far too.
            same &= (jnp.roll(text, back) == text[length - back]) & (place >= back) & (length > back)
            matched += same
        matched = jnp.where(place < length, matched, 0)
        most = jnp.max(matched)
        found = jnp.max(jnp.where((matched == most) & (place < length), place, 0))
        begun = jnp.where(most > 0, found, length - 1)
        return text[begun + jnp.arange(window) % (length - begun)]

    return jax.vmap(of_one)(text, lengths)


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
    """

    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings)
    window: int = 5
    longest: int = 3

    name: ClassVar[str] = "lookup"
    needs_draft: ClassVar[bool] = False
    drafter: ClassVar[Drafter] = Drafter.TEXT
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.longest < 1:
            raise UserError(f"longest is {self.longest}; expected at least 1 token to look for.")

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Writes the output so far behind the prompt."""
        if state.prompt is None:
            raise ValueError("state.prompt is None; prompt lookup needs the prompts' tokens.")
        text = _write(state.prompt, state.output, state.target_cache.lengths + 1 - state.emitted)
        return dataclasses.replace(state, draft_cache=None, own=text)

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One window: look up, read, accept or reject, roll back."""
        for_verdict, later = next_keys(state, 2)
        past, sampling, vocab = state.target_cache.lengths, self.settings.sampling, models.target.config.vocab_size
        drafted = look_up(state.own, past + 1, longest=self.longest, window=self.window)
        # There is nothing random about what is proposed.
        probs = None if sampling.greedy else jax.nn.one_hot(drafted, vocab, dtype=jnp.float32)
        tokens = jnp.concatenate([newest(state), drafted], axis=1)
        read = forward(models.target, tokens, state.target_cache, attend_as_chosen(None))
        seen = Seen(past, ~state.done, read.notes, read.cache.at(past))
        state, logits = target_logits(models, state, read.hidden, drafted, sampling)
        verdict = verify(for_verdict, drafted, probs, logits, sampling)
        shares, text = layer_shares(seen), _write(state.own, verdict.tokens, past + 1)
        state = dataclasses.replace(state, target_cache=seen.cache, keys=later, own=text)
        state = commit(state, verdict, shares, drafted=self.window, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(seen, shares, read.hidden, verdict)

    def cost(self, scenario: Scenario) -> Work:
        """One dense pass of the target; the text is nothing beside its cache."""
        return Work(tokens=scenario.accepted + 1.0, verified=self.window + 1)


def _write(text: Int32[Array, "B S"], new: Int32[Array, "B count"], at: Int32[Array, " B"]) -> Int32[Array, "B S"]:
    """The text with new tokens from a place on; what lies beyond its end is left out."""
    row = jnp.arange(len(text))[:, None]
    return text.at[row, at[:, None] + jnp.arange(new.shape[1])].set(new, mode="drop")
