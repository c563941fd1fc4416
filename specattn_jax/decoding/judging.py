"""Who decides what of a window is kept: the exact rule, or for measuring another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Array, Float, Int32, Key

from specattn_jax.decoding.sampling import Sampling, Verdict, verify

# Decides what of a window is kept: takes a key per sequence, the drafted tokens, the distributions that they were drawn
# from, the target's logits, how tokens are drawn, and the number of windows before.
Judge: TypeAlias = Callable[
    [Key[Array, " B"], Int32[Array, "B W"], Float[Array, "B W V"] | None, Float[Array, "B T V"], Sampling, Array],
    Verdict,
]


def judge_exactly(
    keys: Key[Array, " B"],
    drafted: Int32[Array, "B W"],
    probs: Float[Array, "B W V"] | None,
    logits: Float[Array, "B T V"],
    sampling: Sampling,
    windows: Int32[Array, " B"],
) -> Verdict:
    """The exact acceptance rule, whatever came before."""
    return verify(keys, drafted, probs, logits, sampling)
