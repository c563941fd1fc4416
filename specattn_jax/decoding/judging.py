"""Who decides what of a window is kept: the exact rule, or for measuring another one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32, Key

from specattn_jax.decoding.sampling import Sampling, Verdict, verify


@runtime_checkable
class Judge(Protocol):
    """Decides what of a window is kept."""

    def __call__(
        self,
        keys: Key[Array, " B"],
        drafted: Int32[Array, "B W"],
        probs: Float[Array, "B W V"] | None,
        logits: Float[Array, "B T V"],
        sampling: Sampling,
        windows: Int32[Array, " B"],
        count: Int32[Array, " B"] | None = None,
    ) -> Verdict:
        """The verdict.

        Args:
            keys: one per sequence.
            drafted: the drafted tokens.
            probs: the distributions that they were drawn from; None when greedy.
            logits: the target's.
            sampling: how tokens are drawn.
            windows: how many there were before.
            count: how many of the tokens are proposed; None is all.
        """


def judge_exactly(
    keys: Key[Array, " B"],
    drafted: Int32[Array, "B W"],
    probs: Float[Array, "B W V"] | None,
    logits: Float[Array, "B T V"],
    sampling: Sampling,
    windows: Int32[Array, " B"],
    count: Int32[Array, " B"] | None = None,
) -> Verdict:
    """The exact acceptance rule, whatever came before."""
    return verify(keys, drafted, probs, logits, sampling, count)
