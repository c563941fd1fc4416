"""How often drafted tokens are accepted: what is thought at first, and what windows tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_DEFAULT_RATE, _PRIOR_WINDOWS = 0.7, 4.0
# Old windows count no more than this many: texts change.
_MOST_WEIGHT = 64.0
# Tokens of all prompts together from which is counted how often they repeat themselves.
_MOST_TEXT = 2**16


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


# Of a model that reads a tenth of its own cache: a guess until windows tell.
OWN_ACCEPTANCE = Acceptance(0.85)
# Of what is looked up in a text of which nothing is known, likewise.
TEXT_ACCEPTANCE = Acceptance(0.2)


class Replay:
    """How often prompt lookup would have proposed the right next token of a text, were it asked before each of them.

    Attributes:
        tokens: that were looked up so far.
        found: of these, the ones that were proposed.
    """

    def __init__(self, longest: int = 3) -> None:
        """Of an empty text; `longest` is that of `PromptLookup`."""
        self.tokens = self.found = 0
        self._longest, self._newest = longest, tuple[int, ...]()
        # What followed some tokens the last time that they stood in the text.
        self._next = dict[tuple[int, ...], int]()

    def push(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            before = [self._newest[back:] for back in range(len(self._newest))]
            proposed = next((self._next[some] for some in before if some in self._next), None)
            self._next.update(dict.fromkeys(before, token))
            self._newest = (*self._newest, token)[-self._longest :]
            self.tokens += 1
            self.found += proposed == token


def text_acceptance(replays: Sequence[Replay]) -> Acceptance:
    """What texts say of themselves; prompts are no more than a hint of what is written behind them."""
    tokens, found = (sum(getattr(one, name) for one in replays) for name in ("tokens", "found"))
    return TEXT_ACCEPTANCE.observe(1, tokens, found)._replace(weight=_PRIOR_WINDOWS)


def replay_prompts(prompts: Sequence[Sequence[int]]) -> list[Replay]:
    """A replay per prompt, of its last part where prompts are very long."""
    replays = [Replay() for _ in prompts]
    for replay, prompt in zip(replays, prompts, strict=True):
        replay.push(prompt[-(_MOST_TEXT // len(prompts)) :])
    return replays
