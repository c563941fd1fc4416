"""What is decoded, and what one window of it consists of: what a strategy says to those who predict its cost."""

from __future__ import annotations

import enum
from typing import NamedTuple

from specattn_jax.errors import UserError
from specattn_jax.models.config import ModelConfig
from specattn_jax.selection.own import OwnReads


class Drafter(enum.Enum):
    """Who proposes the tokens that the target verifies: how many are accepted is a matter of each."""

    NOBODY = "nobody"
    DRAFT = "the draft"
    SPARSE_DRAFT = "the draft over few entries"
    TARGET = "the target over few entries"
    TEXT = "the text"


class Scenario(NamedTuple):
    """What is decoded.

    Attributes:
        target: shape of the target.
        draft: shape of the draft.
        batch: sequences.
        context: entries in the cache of each.
        window: W, tokens drafted per window.
        accepted: drafted tokens accepted per window, on average.
        kv_reduction: share of the target's cache reads that a sparse verification saves.
        itemsize: bytes of a weight and of a cache number.
        draft_reads: share of its own cache that a sparse draft reads, but not of very short ones.
        rate: the chance by which tokens are `accepted` one by one, for those that choose how many they propose.
        draft_rate: that of the draft's tokens at a level that stands between the draft and these; likewise
        text_rate: of tokens that are looked up in the text.
    """

    target: ModelConfig
    draft: ModelConfig
    batch: int = 1
    context: int = 32768
    window: int = 5
    accepted: float = 3.5
    kv_reduction: float = 0.75
    itemsize: int = 2
    draft_reads: float = 1.0
    rate: float = 0.85
    draft_rate: float = 0.7
    text_rate: float = 0.2

    @property
    def draft_share(self) -> float:
        """Share of its own cache that a sparse draft does read."""
        return OwnReads(self.draft_reads).share_of(self.context)

    def check(self) -> None:
        """Raises UserError for numbers that mean nothing."""
        for name in ("batch", "context", "window", "itemsize"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not 0 <= self.accepted <= self.window:
            raise UserError(f"accepted is {self.accepted}; expected 0 to the window's {self.window} drafted tokens.")
        if not 0 <= self.kv_reduction <= 1:
            raise UserError(f"kv_reduction is {self.kv_reduction}; expected a share from 0 to 1.")
        if not 0 < self.draft_reads <= 1:
            raise UserError(f"draft_reads is {self.draft_reads}; expected a share above 0, of at most 1.")


class Work(NamedTuple):
    """One window.

    Attributes:
        tokens: what it gives each sequence: the drafted tokens that are accepted, and the target's own.
        verified: tokens that the target reads in its pass.
        target_reads: share of its cache that the target reads.
        steps: of the draft; 0 without one.
        draft_reads: share of its cache that each of those steps reads.
        scores: whether the draft's cache is scored, for the draft's own next reading or for the target's.
        plans: whether what the target reads is selected by those scores.
        own_steps: sparse passes of the target that propose tokens.
        own_reads: share of its cache that each of those reads.
        own_tokens: tokens that each of those reads.
        own_scores: how often a window the target's keys are scored for those.
    """

    tokens: float
    verified: int
    target_reads: float = 1.0
    steps: float = 0
    draft_reads: float = 1.0
    scores: bool = False
    plans: bool = False
    own_steps: float = 0
    own_reads: float = 1.0
    own_tokens: int = 1
    own_scores: float = 1.0
