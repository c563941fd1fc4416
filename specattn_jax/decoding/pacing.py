"""How far a level runs ahead of the one that verifies it, by what was kept of its tokens so far."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from specattn_jax.decoding.sampling import Verdict

# So many tokens are thought to have been kept, and refused, before any was.
_KEPT, _REFUSED = 9.0, 1.0
# The next token is proposed as long as the chance that it and all before it are kept is at least this. The fastest pace
# depends on how much cheaper a token of the lower level is too, but little: at this chance it is near for a tenth as
# well as for a third of the cost.
LEAST_CHANCE = 0.5


def tokens_ahead(rate: float, most: int) -> int:
    """Tokens to propose if each is kept with this chance, were all before it: at least 1."""
    return max(1, min(most, math.floor(math.log(LEAST_CHANCE) / math.log(min(max(rate, 1e-6), 1 - 1e-6)))))


def passes_for(wanted: int, rate: float, proposed: int, batch: int) -> float:
    """Passes until each of so many sequences has the wanted tokens, on average: all wait for the slowest.

    Args:
        wanted: tokens for each sequence, at least 1.
        rate: the chance that a pass keeps a proposed token, if it kept all before it.
        proposed: tokens proposed to each pass, which gives one of its own besides those that it keeps.
        batch: sequences.
    """
    gives = [rate**kept * (1 - rate) for kept in range(proposed)] + [rate**proposed]
    # The chances that a sequence has none, one, and so on of its tokens, but not all of them.
    lacking, passes = [1.0] + [0.0] * (wanted - 1), 0.0
    for _ in range(wanted):
        passes += 1 - (1 - min(1.0, sum(lacking))) ** batch
        lacking = [
            sum(lacking[have - 1 - kept] * gives[kept] for kept in range(min(have, proposed + 1)))
            for have in range(wanted)
        ]
    return passes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tally:
    """What was kept so far, sequence by sequence, so that none depends on its neighbours.

    Attributes:
        kept: proposed tokens that were accepted.
        refused: windows that ended with a refused token.
    """

    kept: Float[Array, " B"]
    refused: Float[Array, " B"]

    @classmethod
    def start(cls, batch: int) -> Tally:
        """What is thought at first."""
        return cls(jnp.full((batch,), _KEPT, jnp.float32), jnp.full((batch,), _REFUSED, jnp.float32))

    def add(self, verdict: Verdict, proposed: Int32[Array, " B"], active: Bool[Array, " B"]) -> Tally:
        """After one more window.

        Args:
            verdict: with the tokens accepted.
            proposed: tokens that could have been.
            active: sequences that still decode; the others count for nothing.
        """
        kept = self.kept + active * verdict.accepted
        return Tally(kept, self.refused + (active & (verdict.accepted < proposed)))

    def tokens_ahead(self, most: int) -> Int32[Array, " B"]:
        """Tokens to propose in the next window: as the function of this name says of the rate so far."""
        rate = self.kept / (self.kept + self.refused)
        ahead = jnp.floor(jnp.log(LEAST_CHANCE) / jnp.log(jnp.minimum(rate, 1 - 1e-6)))
        return jnp.clip(ahead, 1, most).astype(jnp.int32)
