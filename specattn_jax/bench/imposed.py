"""What a real pair accepts, imposed on random weights: every method at its own rate, token by token."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Key

from specattn_jax.bench.decode_cases import LARGER, DecodeCase, shape
from specattn_jax.bench.decode_methods import REAL_METHODS, Imposed
from specattn_jax.decoding.levels import TwoLevels
from specattn_jax.decoding.protocol import DecodeSettings, Strategy
from specattn_jax.decoding.sampling import leading
from specattn_jax.decoding.work import Drafter, Scenario
from specattn_jax.loading.pair import NO_DRAFT
from specattn_jax.planning.acceptance import Acceptance
from specattn_jax.planning.device import DeviceProfile
from specattn_jax.planning.gate import Choice, Decision, Situation, choose_strategy
from specattn_jax.runtime.request import AUTO, Request, strategies_of
from specattn_jax.runtime.session import DRAFT_REACH


@dataclasses.dataclass(frozen=True)
class ImposedRate(Imposed):
    """Each drafted token is accepted with a chance if all before it were.

    Attributes:
        rate: the chance.
    """

    rate: float

    def accepted(self, keys: Key[Array, " B"], window: int, windows: Int32[Array, " B"]) -> Int32[Array, " B"]:
        """By the luck of each sequence's key."""
        return leading(jax.vmap(lambda key: jax.random.uniform(key, (window,)))(keys) < self.rate)


class Rates(NamedTuple):
    """The chance that a proposed token is kept if all before it were.

    Attributes:
        draft: of the draft's tokens, before the target that reads everything; likewise
        sparse_draft: those of a draft that reads few entries,
        target: the target's own over few entries, and
        text: those that are looked up.
        ahead: of what the middle level of `hierarchical` gave, before its dense pass; likewise
        inner_draft: of the draft's tokens before that level, and
        inner_text: of those that are looked up for it.
        specattn: of a sparse draft's tokens, before a target that reads a tenth.
    """

    draft: float
    sparse_draft: float
    target: float
    text: float
    ahead: float
    inner_draft: float
    inner_text: float
    specattn: float


def _rate(accepted: float, proposed: int = 5) -> float:
    """The rate at which so many of so many tokens are accepted on average."""
    return Acceptance().at_mean(proposed, accepted).rate


# What pairs accepted while they continued a novel greedily, by preset: 16 sequences of 256 tokens after 24,000
# (scripts/results/lossless-nvidia-h100/near_ties_24000.json and self_24000.json; specattn after 30,000).
RATES = {
    LARGER: Rates(
        draft=_rate(2.96),
        sparse_draft=_rate(2.94),
        target=_rate(4.32),
        text=_rate(1.85),
        # At this rate a dense pass is given 11 tokens, of which 7.9 are kept.
        ahead=0.943,
        inner_draft=_rate(1.93, 3),
        inner_text=_rate(1.25, 3),
        specattn=_rate(2.93),
    )
}


def impose(strategy: Strategy, rates: Rates) -> Strategy:
    """The same strategy, with judges that accept at these rates."""
    if isinstance(strategy, TwoLevels):
        inner = rates.inner_draft if strategy.needs_draft else rates.inner_text
        return dataclasses.replace(strategy, judge=ImposedRate(rates.ahead), inner_judge=ImposedRate(inner))
    rate = {
        Drafter.DRAFT: rates.draft if strategy.lossless else rates.specattn,
        Drafter.SPARSE_DRAFT: rates.sparse_draft,
        Drafter.TARGET: rates.target,
        Drafter.TEXT: rates.text,
    }.get(strategy.drafter)
    # Who drafts nothing has nobody to judge.
    return strategy if rate is None else dataclasses.replace(strategy, judge=ImposedRate(rate))  # type: ignore[type-var]


def lossless_strategy(
    case: DecodeCase, name: str, rates: Rates, profile: DeviceProfile
) -> tuple[Strategy, Decision | None]:
    """The strategy of a lossless method of `REAL_METHODS`, at imposed rates.

    Args:
        case: what is decoded.
        name: of the method.
        rates: what is accepted.
        profile: the device, for what `auto` decides.

    Returns:
        The strategy, and of `auto` what it decided, knowing the rates.
    """
    asked: dict[str, Any] = dict(REAL_METHODS[name])
    has_draft = asked.pop("draft", None) != NO_DRAFT
    request = Request(**asked)
    found = tuple(strategies_of(request, DecodeSettings(), None, has_draft))
    if request.mode != AUTO:
        return impose(found[0], rates), None
    scenario = Scenario(shape(case.target), shape(case.draft), case.batch, itemsize=jnp.dtype(case.dtype).itemsize)
    situation = Situation(
        case.context,
        case.room,
        Acceptance(rates.draft),
        Acceptance(rates.target),
        Acceptance(rates.text),
        draft_reach=DRAFT_REACH,
    )
    decision = choose_strategy(scenario, profile, situation, found)
    chosen = next(one for one in found if Choice.of(one) == decision.choice)
    return impose(chosen, rates), decision
