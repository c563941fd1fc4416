"""Looking up in the text itself: what followed its newest tokens when they stood in it before.

Source: Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.state import DecodeState

# Most of the newest tokens that are looked for.
LONGEST = 3


def text_so_far(state: DecodeState) -> Int32[Array, "B S"]:
    """The prompts, with the output so far behind them; beyond a sequence's newest token it is meaningless.

    Raises:
        ValueError: the state does not hold the prompts.
    """
    if state.prompt is None:
        raise ValueError("state.prompt is None; prompt lookup needs the prompts' tokens.")
    return write_on(state.prompt, state.output, state.target_cache.lengths + 1 - state.emitted)


def write_on(text: Int32[Array, "B S"], new: Int32[Array, "B count"], at: Int32[Array, " B"]) -> Int32[Array, "B S"]:
    """The text with new tokens from a place on; what lies beyond its end is left out."""
    row = jnp.arange(len(text))[:, None]
    return text.at[row, at[:, None] + jnp.arange(new.shape[1])].set(new, mode="drop")


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


def certain(tokens: Int32[Array, "B W"], vocab: int, sampling: Sampling) -> Float[Array, "B W V"] | None:
    """The distributions that looked-up tokens are drawn from, about which there is nothing random; None when greedy."""
    return None if sampling.greedy else jax.nn.one_hot(tokens, vocab, dtype=jnp.float32)
