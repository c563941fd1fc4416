"""Draft, select, verify, roll back: speculative decoding, with dense or sparse verification."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from specattn_jax.decoding.drafting import Chooser, Drafted, draft_window
from specattn_jax.decoding.judging import Judge, judge_exactly
from specattn_jax.decoding.protocol import (
    DecodeSettings,
    Models,
    WindowRecord,
    check_window,
    drafting,
    newest,
    next_keys,
    target_logits,
)
from specattn_jax.decoding.sampling import Verdict, choose
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.models.forward import forward
from specattn_jax.selection.own import SparseDraft
from specattn_jax.selection.protocol import Opening, Seen, Selection
from specattn_jax.selection.reads import ReadEverything, attend_as_chosen, layer_shares


class Verified(NamedTuple):
    """A window that was drafted and read by the target, not yet judged.

    Attributes:
        drafted: what the draft proposed, with its cache.
        seen: what the target saw.
        hidden: the target's hidden states of the last committed token and the drafted ones.
        own: the selection's state for the next window.
    """

    drafted: Drafted
    seen: Seen
    hidden: Float[Array, "B T D"]
    own: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculative:
    """The draft proposes W tokens, the target verifies them in one pass that reads everything.

    What a strategy of this kind keeps for itself is the state of its selection.

    Attributes:
        selection: watches the draft, and decides what it and the target read.
        settings: how tokens are drawn, and where sequences end.
        window: W, tokens drafted per window.
        judge: decides what is kept; another one than the exact rule is for measuring.
    """

    selection: Selection = dataclasses.field(default_factory=ReadEverything)
    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings, metadata={"static": True})
    window: int = dataclasses.field(default=5, metadata={"static": True})
    judge: Judge = dataclasses.field(default=judge_exactly, metadata={"static": True})

    name: ClassVar[str] = "speculative"
    needs_draft: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False
    drafter: ClassVar[Drafter] = Drafter.DRAFT
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_window(self.window)

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Lets the selection begin; it may let the draft read its last two tokens."""
        draft, cache = drafting(models, state)
        past = state.target_cache.lengths
        opened = self.selection.init(
            Opening(
                target=models.target.config,
                past=past,
                num_slots=cache.num_slots,
                window=self.window,
                dtype=draft.dtype,
                draft_cache=cache,
                read=lambda attend: forward(draft, state.last, cache.at(past - 1), attend),
                target_cache=state.target_cache,
                read_target=lambda attend: forward(models.target, state.last, state.target_cache.at(past - 1), attend),
            )
        )
        return dataclasses.replace(
            state,
            target_cache=opened.target_cache.at(past),
            draft_cache=None if opened.draft_cache is None else opened.draft_cache.at(past - 1),
            own=opened.state,
        )

    def verify(
        self, models: Models, state: DecodeState, keys: Key[Array, " B"], choose_token: Chooser | None = None
    ) -> Verified:
        """Drafts W tokens, selects what to read, and reads them with the target in one pass.

        Args:
            models: target and draft.
            state: where decoding stands.
            keys: one per sequence, for the draft.
            choose_token: chooses the drafted tokens; None draws them as the settings say.
        """
        draft, cache = drafting(models, state)
        past = state.target_cache.lengths
        drafted = draft_window(
            draft,
            cache.at(past - 1),
            state.last,
            keys,
            self.selection,
            state.own,
            window=self.window,
            choose=choose_token or (lambda _, key, logits: choose(key, logits, self.settings.sampling)),
            vocab_size=models.target.config.vocab_size,
            sampling=self.settings.sampling,
            history=state.history,
        )
        readable = state.target_cache.readable(past)
        choices, own = self.selection.plan(drafted.selection_state, drafted.cache, readable)
        tokens = jnp.concatenate([newest(state), drafted.tokens], axis=1)
        read = forward(models.target, tokens, state.target_cache, attend_as_chosen(choices))
        seen = Seen(past, ~state.done, read.notes, read.cache.at(past))
        return Verified(drafted, seen, read.hidden, self.selection.learn(own, seen))

    def finish(self, state: DecodeState, window: Verified, verdict: Verdict) -> tuple[DecodeState, WindowRecord]:
        """Commits what was decided of a window, and rolls both caches back."""
        shares = layer_shares(window.seen)
        state = dataclasses.replace(
            state, target_cache=window.seen.cache, draft_cache=window.drafted.cache, own=window.own
        )
        state = commit(state, verdict, shares, drafted=self.window, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(window.seen, shares, window.hidden, verdict)

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One window: draft, select, read, accept or reject, roll back."""
        for_draft, for_verdict, later = next_keys(state, 3)
        window = self.verify(models, state, for_draft)
        sampling, drafted = self.settings.sampling, window.drafted
        state, logits = target_logits(models, state, window.hidden, drafted.tokens, sampling, drafted.sound)
        verdict = self.judge(for_verdict, drafted.tokens, drafted.probs, logits, sampling, state.statistics.windows)
        return self.finish(dataclasses.replace(state, keys=later), window, verdict)

    def cost(self, scenario: Scenario) -> Work:
        """W dense steps of the draft, and one dense pass of the target."""
        return Work(tokens=scenario.accepted + 1.0, verified=self.window + 1, steps=self.window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparselyDrafted(Speculative):
    """As `Speculative`, but the draft reads few entries of its own cache; the target reads everything."""

    selection: SparseDraft = dataclasses.field(default_factory=SparseDraft)

    drafter: ClassVar[Drafter] = Drafter.SPARSE_DRAFT

    def cost(self, scenario: Scenario) -> Work:
        """W sparse steps of the draft, the scores that choose what they read, and one dense pass of the target."""
        share = self.selection.reads.share_of(scenario.context)
        return super().cost(scenario)._replace(draft_reads=share, scores=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpecAttn(Speculative):
    """As `Speculative`, but the target reads what the selection chooses: fewer bytes, and approximate."""

    name: ClassVar[str] = "specattn"
    lossless: ClassVar[bool] = False

    def cost(self, scenario: Scenario) -> Work:
        """W steps of a draft that may read sparsely, scores and plans, and one sparse pass of the target."""
        return (
            super()
            .cost(scenario)
            ._replace(
                target_reads=1.0 - scenario.kv_reduction, draft_reads=scenario.draft_share, scores=True, plans=True
            )
        )
