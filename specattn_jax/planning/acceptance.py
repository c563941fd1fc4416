"""How often drafted tokens are accepted: what is thought at first, and what windows tell."""

from __future__ import annotations

import math
from typing import NamedTuple

_DEFAULT_RATE, _PRIOR_WINDOWS = 0.7, 4.0
# Old windows count no more than this many: texts change.
_MOST_WEIGHT = 64.0


class Acceptance(NamedTuple):
    """How often a drafted token is accepted, if all before it were.

    Attributes:
        rate: the chance of each token, below 1.
        weight: how many windows this is worth beside new ones.
    """

    rate: float = _DEFAULT_RATE
    weight: float = _PRIOR_WINDOWS

    def expected(self, window: int) -> float:
        """Accepted tokens per window of W drafted ones: rate + rate^2 + ... + rate^W."""
        return math.fsum(self.rate**place for place in range(1, window + 1))

    def observe(self, window: int, windows: int, accepted: int) -> Acceptance:
        """Adds windows of W drafted tokens, of which `accepted` were accepted in all."""
        if windows < 1:
            return self
        weight = self.weight + windows
        mean = (self.weight * self.expected(window) + accepted) / weight
        return Acceptance.of_mean(window, mean)._replace(weight=min(weight, _MOST_WEIGHT))

    def bounds(self, window: int) -> tuple[Acceptance, Acceptance]:
        """The rates at which windows of W would give one standard error less or more than they are thought to."""
        mean = self.expected(window)
        square = math.fsum((2 * place - 1) * self.rate**place for place in range(1, window + 1))
        error = math.sqrt(max(0.0, square - mean**2) / self.weight)
        return self.of_mean(window, mean - error), self.of_mean(window, mean + error)

    @classmethod
    def of_mean(cls, window: int, accepted: float) -> Acceptance:
        """The rate at which this many of W drafted tokens are accepted on average."""
        low, high = 0.0, 0.999
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if cls(middle).expected(window) < accepted else (low, middle)
        return cls(low)
