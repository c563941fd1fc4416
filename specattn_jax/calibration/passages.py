"""What calibration reads: passages of every kind of text, and the windows in them that are looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from specattn_jax.errors import UserError
from specattn_jax.selection.alignment import Granularity
from specattn_jax.texts import Documents, by_kind

# Tokens of what is quoted at a time, from a phrase to a paragraph.
_PIECE = (16, 129)


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """What calibration reads.

    Attributes:
        context: tokens per passage.
        window: W.
        passages: how many passages; the first half fits the mixture, the second the budgets.
        windows: windows looked at per passage.
        granularity: sources of the mixture.
        iterations: EM steps.
        gradients: samples of the Fisher information per passage.
        seed: of window places and sampled tokens.
        budgets: whether each layer or each kv head of the target gets a budget of its own.
        quotes: share of each passage, at its end, that repeats pieces of what stands before it. Running text looks
            things up rarely; without some the heads that do so would be fitted to what they do meanwhile.
        draft_windows: windows of held-out passages in which is measured what it costs that the draft reads sparsely;
            0 measures nothing.
    """

    context: int = 2048
    window: int = 5
    passages: int = 4
    windows: int = 32
    granularity: Granularity = "kv_head"
    iterations: int = 60
    gradients: int = 4
    seed: int = 0
    budgets: Literal["layer", "kv_head"] = "kv_head"
    quotes: float = 0.0
    draft_windows: int = 32

    def __post_init__(self) -> None:
        if self.passages < 2:
            raise UserError(
                f"passages is {self.passages}; expected at least 2, one to fit the mixture and one the budgets."
            )
        if self.context < 4 * (self.window + 1) or self.windows < 1:
            raise UserError(f"context is {self.context}; expected at least four windows of {self.window + 1} tokens.")
        if not 0.0 <= self.quotes <= 0.5:
            raise UserError(f"quotes is {self.quotes}; expected a share of each passage from 0 to 0.5.")
        if self.draft_windows < 0:
            raise UserError(f"draft_windows is {self.draft_windows}; expected at least 0.")


def usual_passages(kinds: int) -> int:
    """Passages where nobody says how many: at least two of each kind of text, one of which fits the mixture."""
    return max(CalibrationSettings.passages, 2 * kinds)


class Passage(NamedTuple):
    """One passage and where its windows begin."""

    tokens: Int32[Array, " T"]
    starts: np.ndarray


def choose_passages(documents: Documents, settings: CalibrationSettings, rng: np.random.Generator) -> list[Passage]:
    """Passages that visit the kinds of text in turn, and the documents of each; windows spread over each passage.

    Raises:
        UserError: a kind has no document as long as one passage, or more kinds than passages of each half.
    """
    kinds = []
    for kind, texts in by_kind(documents).items():
        kinds.append(_long_enough(texts, settings.context))
        if not kinds[-1]:
            raise UserError(
                f"text: all texts{f' of {kind}' if kind else ''} have {sum(map(len, texts))} tokens; expected at least "
                f"the calibration context of {settings.context} tokens; give a longer text or a shorter --context."
            )
    if settings.passages < 2 * len(kinds) > 2:
        raise UserError(
            f"passages is {settings.passages}; expected at least {2 * len(kinds)}, two for each kind of text."
        )
    passages = []
    for index in range(settings.passages):
        texts = kinds[index % len(kinds)]
        document = texts[index // len(kinds) % len(texts)]
        begin = int(rng.integers(0, len(document) - settings.context + 1))
        text = document[begin : begin + settings.context]
        tokens = jnp.asarray(quoting(text, round(settings.quotes * len(text)), rng), jnp.int32)
        # Spread evenly, each window jittered within its share, so that every context length is seen.
        first, last = settings.context // 16, settings.context - settings.window - 1
        edges = np.linspace(first, last, settings.windows + 1)
        starts = rng.uniform(edges[:-1], edges[1:]).astype(np.int32)
        passages.append(Passage(tokens, starts))
    return passages


def _long_enough(texts: Sequence[Sequence[int]], context: int) -> list[Sequence[int]]:
    """The texts that hold a passage, and those that are too short for one, joined until they do."""
    found, joined = [text for text in texts if len(text) >= context], list[int]()
    for text in texts:
        if len(text) < context:
            joined += text
        if len(joined) >= context:
            found.append(joined)
            joined = []
    return found


def quoting(text: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
    """The text, with its last `count` tokens replaced by pieces of what stands before them, in any order."""
    said, repeated = list(text[: len(text) - count]), list[int]()
    while len(repeated) < count:
        begin = int(rng.integers(0, len(said)))
        repeated += said[begin : begin + int(rng.integers(*_PIECE))]
    return said + repeated[:count]


def rows_of(starts: np.ndarray, count: int) -> Int32[Array, " Q"]:
    """`count` consecutive rows per window."""
    return jnp.asarray((starts[:, None] + np.arange(count)).reshape(-1), jnp.int32)
