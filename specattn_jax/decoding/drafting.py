"""The draft's part of a window: W tokens one after the other, watched by the selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key
from specattn_kernels import lay

from specattn_jax.decoding.sampling import Sampling, is_sound, match_vocabulary, penalise
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.selection.protocol import Selection

# Chooses the token of a step from its logits: takes the step's number, a key per sequence and the logits; gives the
# tokens, and the distribution that they were drawn from (None where it is known to be certain).
Chooser: TypeAlias = Callable[
    [Int32[Array, ""], Key[Array, " B"], Float[Array, "B V"]], tuple[Int32[Array, " B"], Float[Array, "B V"] | None]
]


class Drafted(NamedTuple):
    """What W draft steps produced.

    Attributes:
        tokens: the drafted tokens.
        probs: the distributions they were drawn from, over the target's vocabulary; None when greedy.
        sound: whether all logits of a sequence were numbers that a token can be chosen from.
        cache: the draft's cache, lengths unchanged.
        selection_state: the selection's state, after it has watched all steps.
    """

    tokens: Int32[Array, "B W"]
    probs: Float[Array, "B W V"] | None
    sound: Bool[Array, " B"]
    cache: KVCache
    selection_state: Any


def draft_window(
    draft: LanguageModel,
    cache: KVCache,
    last: Int32[Array, "B 2"],
    keys: Key[Array, " B"],
    selection: Selection,
    selection_state: Any,
    *,
    window: int,
    choose: Chooser,
    vocab_size: int,
    sampling: Sampling,
    history: Bool[Array, "B V"] | None = None,
) -> Drafted:
    """Drafts W tokens, one after the other.

    Every step re-reads the second-last token, so that a window in which all drafted tokens were accepted needs no
    catch-up call.

    Args:
        draft: the draft.
        cache: what it has read; its lengths exclude the two tokens in `last`.
        last: the last two committed tokens.
        keys: one key per sequence.
        selection: watches the steps, and decides what they read.
        selection_state: its state.
        window: W.
        choose: chooses the tokens.
        vocab_size: the target's V.
        sampling: with the repetition penalty.
        history: which tokens the prompt and the output hold; None where nobody minds.
    """
    step_keys = jnp.swapaxes(jax.vmap(lambda key: jax.random.split(key, window))(keys), 0, 1)

    def step(
        carry: _DraftState, inputs: tuple[Int32[Array, ""], Key[Array, " B"]]
    ) -> tuple[_DraftState, tuple[Int32[Array, " B"], Float[Array, "B V"] | None]]:
        (cache, last, state, sound, history), (index, key) = carry, inputs
        read, state = selection.observe(state, lambda attend: forward(draft, last, cache, attend), index)
        logits = lay(draft.split, match_vocabulary(draft.logits(read.hidden[:, -1]), vocab_size), "B V")
        sound &= is_sound(logits)
        # A draft of which every device has all waits for nobody, nor for the vocabulary of the target.
        token, probs = lay(draft.split, choose(index, key, penalise(logits, history, sampling)), "B V")
        if history is not None:
            history = history.at[jnp.arange(len(token)), token].set(True)
        last = jnp.stack([last[:, 1], token], axis=1)
        return _DraftState(read.cache.at(cache.lengths + 1), last, state, sound, history), (token, probs)

    sound = jnp.ones(cache.lengths.shape, jnp.bool_)
    begun = _DraftState(cache, last, selection_state, sound, history)
    end, drafted = jax.lax.scan(step, begun, (jnp.arange(window), step_keys))
    tokens, probs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), drafted)
    return Drafted(tokens, probs, end.sound, end.cache.at(cache.lengths), end.selection_state)


class _DraftState(NamedTuple):
    """Between two draft steps.

    Attributes:
        cache: what was read; its lengths exclude the last two tokens.
        last: the last two tokens. The first of them was read before, but for the first step perhaps.
        selection_state: what was watched so far.
        sound: whether all logits so far were sound.
        history: which tokens the prompt, the output and the steps before hold; None where nobody minds.
    """

    cache: KVCache
    last: Int32[Array, "B 2"]
    selection_state: Any
    sound: Bool[Array, " B"]
    history: Bool[Array, "B V"] | None
