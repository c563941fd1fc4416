"""What a strategy is: how it starts from a prefilled state, what one window of it does, and what that costs."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from specattn_jax.decoding.sampling import Sampling, Verdict, history_along, is_sound, penalise
from specattn_jax.decoding.state import DecodeState, note_faults
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.models.cache import KVCache
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.selection.protocol import Seen

# Far beyond what pays: the chance that a token is accepted falls with every one before it.
MAX_WINDOW = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Models:
    """The weights that decoding works with.

    Attributes:
        target: the model whose output is wanted.
        draft: the model that proposes tokens; None where there is none.
    """

    target: LanguageModel
    draft: LanguageModel | None = None


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """What all strategies have in common; static under jit.

    Attributes:
        sampling: how tokens are drawn.
        stop_tokens: ids that end a sequence; the id itself is kept in the output.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()


class WindowRecord(NamedTuple):
    """What happened in one window, for whoever wants to keep some of it.

    Attributes:
        seen: what the target saw: past lengths, active sequences, and layer by layer what it read.
        read: share of the past that each target layer read.
        hidden: the target's hidden states of the last committed token and the drafted ones.
        verdict: what was decided.
    """

    seen: Seen
    read: Float[Array, "B L"]
    hidden: Float[Array, "B T D"]
    verdict: Verdict


@runtime_checkable
class Strategy(Protocol):
    """A way of decoding: a frozen pytree of static settings and of the arrays that a selection needs."""

    @property
    def name(self) -> str:
        """The mode that people know it by."""
        ...

    @property
    def settings(self) -> DecodeSettings:
        """What it has in common with all others."""
        ...

    @property
    def window(self) -> int:
        """Drafted tokens per window; 0 where nothing is drafted. A window commits at most one token more."""
        ...

    @property
    def needs_draft(self) -> bool:
        """Whether there has to be a draft, with a prefilled cache."""
        ...

    @property
    def needs_text(self) -> bool:
        """Whether the state has to hold the prompts' tokens."""
        ...

    @property
    def drafter(self) -> Drafter:
        """Who proposes what the target verifies."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether the output is distributed as the target's own."""
        ...

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        """Takes a state over, fresh from prefill or from another strategy."""
        ...

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        """One window."""
        ...

    def cost(self, scenario: Scenario) -> Work:
        """What a window consists of."""
        ...


def check_window(window: int) -> None:
    """Raises UserError for a window that cannot be."""
    if not 1 <= window <= MAX_WINDOW:
        raise UserError(f"window is {window}; expected 1 to {MAX_WINDOW} drafted tokens, which one pass verifies.")


def next_keys(state: DecodeState, count: int) -> list[Array]:
    """So many fresh keys per sequence, each `[B]`; the last is for the next window."""
    split = jax.vmap(lambda key: jax.random.split(key, count))(state.keys)
    return [split[:, index] for index in range(count)]


def newest(state: DecodeState) -> Int32[Array, "B 1"]:
    """The last committed token of every sequence, which the target has not read yet."""
    return state.last[:, 1:]


def target_logits(
    models: Models,
    state: DecodeState,
    hidden: Float[Array, "B T D"],
    drafted: Int32[Array, "B W"],
    sampling: Sampling,
    draft_sound: Bool[Array, " B"] | None = None,
) -> tuple[DecodeState, Float[Array, "B T V"]]:
    """The target's logits by which a window is judged, after the repetition penalty; faults are noted in the state.

    Args:
        models: with the target.
        state: before the window is committed.
        hidden: the target's hidden states of the last committed token and the drafted ones.
        drafted: the drafted tokens.
        sampling: with the penalty.
        draft_sound: whether the draft's logits were sound; None without a draft, or where nobody noted it.
    """
    logits = models.target.logits(hidden)
    state = note_faults(state, jnp.all(is_sound(logits), axis=1), draft_sound)
    return state, penalise(logits, history_along(state.history, drafted), sampling)


def drafting(models: Models, state: DecodeState) -> tuple[LanguageModel, KVCache]:
    """The draft and its cache.

    Raises:
        ValueError: there is no draft, or it has no cache.
    """
    if models.draft is None or state.draft_cache is None:
        raise ValueError("models.draft or state.draft_cache is None; a strategy with a draft needs both.")
    return models.draft, state.draft_cache
