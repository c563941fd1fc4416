"""How often drafted tokens are accepted: what is thought at first, and what windows tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

_DEFAULT_RATE, _PRIOR_WINDOWS = 0.7, 4.0
# Old windows count no more than this many: texts change.
_MOST_WEIGHT = 64.0
# Tokens of the rows that are counted in a text, and found ones that count as if further ones were no likelier.
ROW, _PRIOR_FOUND = 8, 16.0
# Of the tokens that the prompt does not tell, those that greedy decoding repeats of its own; most models repeat more
# (scripts/results/repetition-two-cores).
_REPEATED = 1 / 3
# Tokens of all prompts together from which is counted how often they repeat themselves.
_MOST_TEXT = 2**16


class Acceptance(NamedTuple):
    """How often a drafted token is accepted, if all before it were.

    Attributes:
        rate: the chance of the first token of a window, below 1.
        weight: how many windows this is worth beside new ones.
        further: the chance of each further token is `rate ** further`. At 1 all tokens of a window are alike; near 0
            what has begun right goes on right, as where a text repeats itself.
    """

    rate: float = _DEFAULT_RATE
    weight: float = _PRIOR_WINDOWS
    further: float = 1.0

    def reaches(self, place: int) -> float:
        """The chance that a window's tokens are accepted up to this one; the first is 1."""
        return self.rate ** (1.0 + self.further * (place - 1))

    def expected(self, window: int) -> float:
        """Accepted tokens per window of W drafted ones."""
        return math.fsum(self.reaches(place) for place in range(1, window + 1))

    def observe(self, window: int, windows: int, accepted: int) -> Acceptance:
        """Adds windows of W drafted tokens, of which `accepted` were accepted in all."""
        if windows < 1:
            return self
        weight = self.weight + windows
        mean = (self.weight * self.expected(window) + accepted) / weight
        return self.at_mean(window, mean)._replace(weight=min(weight, _MOST_WEIGHT))

    def bounds(self, window: int) -> tuple[Acceptance, Acceptance]:
        """The rates at which windows of W would give one standard error less or more than they are thought to."""
        mean = self.expected(window)
        square = math.fsum((2 * place - 1) * self.reaches(place) for place in range(1, window + 1))
        error = math.sqrt(max(0.0, square - mean**2) / self.weight)
        return self.at_mean(window, mean - error), self.at_mean(window, mean + error)

    def at_mean(self, window: int, accepted: float) -> Acceptance:
        """The same with the rate at which this many of W drafted tokens are accepted on average."""
        below, _ = _halved(0.999, lambda rate: self._replace(rate=rate).expected(window) < accepted)
        return self._replace(rate=below)

    def in_rows(self, window: int, accepted: float) -> Acceptance:
        """The same with what becomes of further tokens so that this many of W drafted tokens are accepted on average.

        They are at least as likely as the first one.
        """
        _, above = _halved(1.0, lambda further: self._replace(further=further).expected(window) > accepted)
        return self._replace(further=above)


def _halved(most: float, is_below: Callable[[float], bool]) -> tuple[float, float]:
    """Both sides of the place from 0 to `most` up to which numbers are below what is looked for."""
    low, high = 0.0, most
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return low, high


# Of a model that reads a tenth of its own cache: a guess until windows tell.
OWN_ACCEPTANCE = Acceptance(0.85)
# Of what is looked up in a text of which nothing is known, likewise.
TEXT_ACCEPTANCE = Acceptance(0.2)


class Replay:
    """How often prompt lookup would have proposed the right next token of a text, were it asked before each of them.

    Attributes:
        tokens: that were looked up so far.
        found: of these, the ones that were proposed.
        in_a_row: how many of `ROW` tokens were found in a row, summed over all tokens with which a row may begin.
    """

    def __init__(self, longest: int = 3) -> None:
        """Of an empty text; `longest` is that of `PromptLookup`."""
        self.tokens = self.found = self.in_a_row = 0
        self._longest, self._newest, self._row = longest, tuple[int, ...](), 0
        # What followed some tokens the last time that they stood in the text.
        self._next = dict[tuple[int, ...], int]()

    def push(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            before = [self._newest[back:] for back in range(len(self._newest))]
            proposed = next((self._next[some] for some in before if some in self._next), None)
            self._next.update(dict.fromkeys(before, token))
            self._newest = (*self._newest, token)[-self._longest :]
            self._row = self._row + 1 if proposed == token else 0
            self.tokens += 1
            self.found += self._row > 0
            # A token goes on with every row that begins no more than so far before it.
            self.in_a_row += min(self._row, ROW)


def text_acceptance(replays: Sequence[Replay], *, greedy: bool = False) -> Acceptance:
    """What texts say of themselves; prompts are no more than a hint of what is written behind them.

    Args:
        replays: of the prompts.
        greedy: whether always the likeliest token is written: a model that does so repeats itself, whatever the prompt.
    """
    tokens, found, in_a_row = (sum(getattr(one, name) for one in replays) for name in ("tokens", "found", "in_a_row"))
    known = TEXT_ACCEPTANCE.observe(1, tokens, found)
    # Of few that were found nothing is learned: they count beside some after which all are alike.
    alike = known.expected(ROW) / known.rate
    row = known.rate * (in_a_row + _PRIOR_FOUND * alike) / (found + _PRIOR_FOUND)
    known = known.in_rows(ROW, row)
    rate = known.rate + (_REPEATED if greedy else 0.0) * (1.0 - known.rate)
    return known._replace(rate=rate, weight=_PRIOR_WINDOWS)


def replay_prompts(prompts: Sequence[Sequence[int]]) -> list[Replay]:
    """A replay per prompt, of its last part where prompts are very long."""
    replays = [Replay() for _ in prompts]
    for replay, prompt in zip(replays, prompts, strict=True):
        replay.push(prompt[-(_MOST_TEXT // len(prompts)) :])
    return replays
