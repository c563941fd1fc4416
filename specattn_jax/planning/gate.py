"""Which strategy to decode with: predicted times, what was accepted so far, and reluctance to switch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.work import Drafter, Scenario
from specattn_jax.loading.pair import ModelPair
from specattn_jax.loading.presets import get_preset, preset_names
from specattn_jax.models.cache import Reach
from specattn_jax.models.sharding import mesh_shape
from specattn_jax.planning.acceptance import OWN_ACCEPTANCE, TEXT_ACCEPTANCE, Acceptance
from specattn_jax.planning.device import DeviceProfile, prefill_seconds, seconds_per_token
from specattn_jax.planning.mesh import measure_mesh, share
from specattn_jax.selection.make import DraftedSelection

# Drafted tokens per window that `auto` considers; longer ones pay for drafts that accept nearly everything only.
WINDOWS = (1, 2, 3, 4, 5, 6, 8)
# What is nearer than this share to the fastest counts as equally fast: the prediction knows no better.
TIE = 0.01
# A running strategy is left for one that is faster by at least this share, lest it be taken up again at the next look.
HYSTERESIS = 0.05
# A program is compiled only to save this many times the time that it takes.
COMPILE_MARGIN = 1.5


class Choice(NamedTuple):
    """One way to decode, by name.

    Attributes:
        mode: name of the strategy.
        window: drafted tokens per window; 0 where nothing is drafted.
        sparse_draft: whether the draft reads few entries, though the target reads all.
    """

    mode: str
    window: int
    sparse_draft: bool = False

    @classmethod
    def of(cls, strategy: Strategy) -> Choice:
        """That of a strategy."""
        return cls(strategy.name, strategy.window, strategy.drafter is Drafter.SPARSE_DRAFT)

    def __str__(self) -> str:
        sparse = ", sparse draft" if self.sparse_draft else ""
        return f"{self.mode} (window {self.window}{sparse})" if self.window else self.mode


class Prediction(NamedTuple):
    """What a way to decode is thought to take.

    Attributes:
        choice: which.
        seconds: per token of each sequence.
        request: until the end of the request: all tokens still wanted, and what has to be prefilled first.
    """

    choice: Choice
    seconds: float
    request: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """A choice, and why.

    Attributes:
        choice: how to decode.
        reason: one sentence.
        predictions: the fastest choice of each mode, and the one that was running.
        context: mean entries in a cache when it was made.
        acceptance: the assumed chance that a drafted token is accepted.
        others: that of tokens that no draft proposed, by who proposes them.
        bandwidth: measured bytes per second of a copy.
        is_final: whether nothing that may be seen until the end could change it, so that nobody has to look.
    """

    choice: Choice
    reason: str = ""
    predictions: tuple[Prediction, ...] = ()
    context: int = 0
    acceptance: float = Acceptance().rate
    others: tuple[tuple[Drafter, float], ...] = ()
    bandwidth: float = 0.0
    is_final: bool = False

    @property
    def mode(self) -> str:
        """Name of the strategy."""
        return self.choice.mode

    @property
    def window(self) -> int:
        """Drafted tokens per window; 0 where nothing is drafted."""
        return self.choice.window

    def explain(self) -> list[str]:
        """Lines for people: what was known, what each mode was thought to take, and the reason."""
        if not self.predictions:
            return [f"  {self.reason}"]
        known = f"at {self.context:,} tokens, {self.acceptance:.0%} of drafted tokens accepted one by one"
        if self.others:
            known += f" ({', '.join(f'{rate:.0%} of those by {who.value}' for who, rate in self.others)})"
        lines = [f"{known}, copies at {self.bandwidth / 1e9:,.1f} GB/s:"]
        lines += [
            f"  {one.choice}: {1e3 * one.seconds:.3g} ms per token, {one.request:.3g} s until the end predicted"
            for one in self.predictions
        ]
        return [*lines, f"  {self.reason}"]


class Situation(NamedTuple):
    """What is known when it is time to decide.

    Attributes:
        context: mean entries in a sequence's cache.
        remaining: most tokens that a sequence still wants.
        acceptance: what was accepted of the draft's tokens so far, or is assumed; likewise
        own_acceptance: of tokens that the target proposes itself, over few entries, and
        text_acceptance: of tokens that are looked up in the text, for which nothing of the kind has to run.
        can_draft: whether the draft's cache is there, or can be had; without it there is no way back.
        kv_reduction: share of the target's reads that sparse verification saved here; None where it did not run yet.
        current: the choice that runs; None at the start.
        compiled: choices whose programs are there.
        compile_s: seconds that the slowest program of this run took to compile; little where all came from a cache.
        draft_reach: how far back the draft sees while it prefills; None is everything.
    """

    context: int
    remaining: int
    acceptance: Acceptance = Acceptance()
    own_acceptance: Acceptance = OWN_ACCEPTANCE
    text_acceptance: Acceptance = TEXT_ACCEPTANCE
    can_draft: bool = True
    kv_reduction: float | None = None
    current: Choice | None = None
    compiled: frozenset[Choice] = frozenset()
    compile_s: float = 0.0
    draft_reach: Reach | None = None

    def accepted_of(self, strategy: Strategy) -> Acceptance:
        """What is accepted of what a strategy lets the target verify."""
        others = {Drafter.TARGET: self.own_acceptance, Drafter.TEXT: self.text_acceptance}
        return others.get(strategy.drafter, self.acceptance)

    def observe(self, strategy: Strategy, proposed: int, windows: int, accepted: int) -> Situation:
        """What is known after windows of a strategy, each with so many proposed tokens, `accepted` of them in all."""
        seen = self.accepted_of(strategy).observe(proposed, windows, accepted)
        if strategy.drafter is Drafter.TARGET:
            return self._replace(own_acceptance=seen)
        if strategy.drafter is Drafter.TEXT:
            return self._replace(text_acceptance=seen)
        return self._replace(acceptance=seen)


Decide = Callable[[Situation], Decision]


class _Predicted(NamedTuple):
    """A strategy, its predicted seconds per token, and those until the end of the request."""

    strategy: Strategy
    seconds: float
    request: float

    @property
    def choice(self) -> Choice:
        return Choice.of(self.strategy)


def choose_strategy(
    scenario: Scenario, profile: DeviceProfile, situation: Situation, strategies: Sequence[Strategy]
) -> Decision:
    """The strategy predicted to end the request first; among equals the first mode; a running one unless leaving pays.

    Before anything runs, the prompts have yet to be prefilled, by the draft too where a strategy needs one.

    Args:
        scenario: shapes, batch, and what a sparse verification would read; context, window and acceptance are the
            situation's.
        profile: the device.
        situation: what is known.
        strategies: those that can be had, the simplest mode first and the approximate ones last.
    """
    scenario = scenario._replace(
        context=max(1, situation.context),
        draft_rate=situation.acceptance.rate,
        text_rate=situation.text_acceptance.rate,
    )
    if not situation.can_draft:
        strategies = [strategy for strategy in strategies if not strategy.needs_draft]
    found = predict(scenario, profile, situation, strategies)
    by_mode: dict[str, list[_Predicted]] = {}
    for one in found:
        by_mode.setdefault(one.strategy.name, []).append(one)
    # Within one mode, only speed counts.
    best = [min(group, key=lambda one: one.request) for group in by_mode.values()]
    fastest = min(best, key=lambda one: one.request)
    chosen = next(one for one in best if one.request <= fastest.request * (1 + TIE))
    running = next((one for one in found if one.choice == situation.current), None)
    if running is not None:
        chosen, reason = _leave_or_stay(scenario, profile, situation, running, chosen)
    elif chosen is fastest:
        reason = f"{chosen.choice}, predicted to be the fastest{_shortness(found, chosen)}."
    else:
        reason = f"{chosen.choice}, because {fastest.choice} is predicted to be no more than {TIE:.0%} faster."
    shown = [*best, *(one for one in (running, chosen) if one is not None)]
    return Decision(
        chosen.choice,
        reason=reason,
        predictions=tuple(dict.fromkeys(Prediction(one.choice, one.seconds, one.request) for one in shown)),
        context=situation.context,
        acceptance=situation.acceptance.rate,
        others=tuple(
            {
                one.strategy.drafter: situation.accepted_of(one.strategy).rate
                for one in best
                if one.strategy.drafter in (Drafter.TARGET, Drafter.TEXT)
            }.items()
        ),
        bandwidth=profile.bandwidth,
        is_final=_is_final(scenario, profile, chosen.strategy, situation, strategies),
    )


def _is_final(
    scenario: Scenario,
    profile: DeviceProfile,
    strategy: Strategy,
    situation: Situation,
    strategies: Sequence[Strategy],
) -> bool:
    """Whether nothing else can be had without the draft, or no switch can pay.

    None pays where all that is left, were nothing accepted, takes less than compiling another program.
    """
    if not strategy.needs_draft and sum(not one.needs_draft for one in strategies) == 1:
        return True
    longest = situation.remaining * _seconds(scenario, profile, strategy, Acceptance(0.0))
    return situation.compiled <= {Choice.of(strategy)} and longest <= COMPILE_MARGIN * profile.compile_s


def predict(
    scenario: Scenario, profile: DeviceProfile, situation: Situation, strategies: Sequence[Strategy]
) -> list[_Predicted]:
    """Seconds of every strategy, per token and until the end of the request."""
    batch, tokens, reach = scenario.batch, situation.context, situation.draft_reach
    alone = prefill_seconds(scenario.target, batch, tokens, profile)
    drafted = alone + prefill_seconds(scenario.draft, batch, tokens, profile, reach)
    found = []
    for strategy in strategies:
        seconds = _seconds(scenario, profile, strategy, situation.accepted_of(strategy))
        request = seconds * situation.remaining
        if situation.current is None:
            request += drafted if strategy.needs_draft else alone
        found.append(_Predicted(strategy, seconds, request))
    return found


def _shortness(found: Sequence[_Predicted], chosen: _Predicted) -> str:
    """Half a sentence where what decodes faster does not pay, as its draft would have to read the prompts first."""
    faster = min(found, key=lambda one: one.seconds)
    if faster.seconds * (1 + TIE) >= chosen.seconds:
        return ""
    return f": {faster.choice} decodes faster, but not by as much as its draft needs to read the prompt"


def _seconds(scenario: Scenario, profile: DeviceProfile, strategy: Strategy, acceptance: Acceptance) -> float:
    """Predicted seconds per token of one strategy."""
    case = scenario._replace(window=max(1, strategy.window), rate=acceptance.rate)
    # What the dense pass has to judge may be less than what is drafted.
    case = case._replace(accepted=acceptance.expected(strategy.cost(case._replace(accepted=0.0)).verified - 1))
    return seconds_per_token(case, strategy.cost(case), profile)


def _leave_or_stay(
    scenario: Scenario, profile: DeviceProfile, situation: Situation, running: _Predicted, better: _Predicted
) -> tuple[_Predicted, str]:
    """Whether what is predicted to be faster is worth leaving what runs, and why.

    Few windows tell little of the acceptance: leaving has to pay if that of either is somewhat lower or higher too.
    """
    if better.choice == running.choice:
        return running, f"stays with {running.choice}, predicted to be the fastest."
    here, there = (situation.accepted_of(one.strategy) for one in (running, better))
    window = max(1, running.strategy.window)
    if here is there:
        believed = [(rate, rate) for rate in (here, *here.bounds(window))]
    else:
        believed = [(rate, there) for rate in (here, *here.bounds(window))]
        believed += [(here, rate) for rate in there.bounds(max(1, better.strategy.window))]
    gain = min(
        _seconds(scenario, profile, running.strategy, one) - _seconds(scenario, profile, better.strategy, other)
        for one, other in believed
    )
    saved = gain * situation.remaining
    cost = 0.0 if better.choice in situation.compiled else max(situation.compile_s, profile.compile_s)
    if gain <= HYSTERESIS * running.seconds:
        return running, f"stays with {running.choice}: {better.choice} is not {HYSTERESIS:.0%} faster beyond doubt."
    if saved <= COMPILE_MARGIN * cost:
        return running, (
            f"stays with {running.choice}: {better.choice} would save {saved:.2g} s, compiling it takes about "
            f"{cost:.2g} s."
        )
    return better, f"switches from {running.choice} to {better.choice}, which is predicted to save {saved:.2g} s."


@dataclasses.dataclass(frozen=True)
class Gate:
    """Decides for one run of `generate`.

    Attributes:
        scenario: shapes, batch, and what a sparse verification would read.
        profile: the device.
        strategies: those that can be had, the simplest mode first and the approximate ones last.
        always_read: entries of every cache that a sparse verification reads, however short it is.
    """

    scenario: Scenario
    profile: DeviceProfile
    strategies: tuple[Strategy, ...]
    always_read: int = 0

    def __call__(self, situation: Situation) -> Decision:
        """The choice for a situation."""
        saved = self.scenario.kv_reduction if situation.kv_reduction is None else situation.kv_reduction
        most = 1.0 - min(1.0, self.always_read / max(1, situation.context))
        scenario = self.scenario._replace(kv_reduction=min(max(saved, 0.0), most))
        return choose_strategy(scenario, self.profile, situation, self.strategies)


def make_gate(
    pair: ModelPair,
    batch: int,
    strategies: Sequence[Strategy],
    selection: DraftedSelection | None,
    *,
    profile: DeviceProfile | None = None,
) -> Gate:
    """The gate of a pair.

    Args:
        pair: the models.
        batch: sequences decoded at a time.
        strategies: those that can be had, the simplest mode first and the approximate ones last.
        selection: what a sparse verification would read; None where there is none.
        profile: the device; measured where it is not given.
    """
    # Without a draft nobody asks for its shape.
    draft = pair.target if pair.draft is None else pair.draft
    scenario = Scenario(pair.target.config, draft.config, batch, itemsize=pair.target.dtype.itemsize)
    always_read = 0
    if selection is not None:
        policy = selection.policy
        scenario = scenario._replace(kv_reduction=expected_saving(selection), draft_reads=policy.draft_reads)
        always_read = policy.num_sink + policy.num_recent
    split = pair.target.split
    profile = profile or measure_mesh(None if split is None else split.mesh)
    if split is not None:
        whole = pair.draft is None or pair.draft.split is None or pair.draft.split.heads is None
        scenario, profile = share(scenario, profile, mesh_shape(split), whole_draft=whole)
    return Gate(scenario, profile, tuple(strategies), always_read)


def expected_saving(selection: DraftedSelection) -> float:
    """Share of the target's reads that a selection saves: the wanted one, or what calibration says of its mass."""
    wanted = float(selection.mass.wanted_read)
    if wanted > 0:
        return 1.0 - wanted
    left_out = float(selection.mass.left_out.mean())
    if left_out <= 0:
        return 0.0
    alignment, policy = selection.alignment, selection.policy
    # Savings go about as the logarithm of the mass left out; none at all is saved somewhere far below the first budget.
    budgets = np.asarray(alignment.left_out).mean(axis=1)
    masses = np.log([min(1e-4, budgets[0] / 10), *budgets])
    saved = float(np.interp(math.log(left_out), masses, [0.0, *np.asarray(alignment.savings)]))
    return saved * (1 - policy.dense_layers / selection.target.num_layers)


def prior_acceptance(pair: ModelPair) -> Acceptance:
    """What is known of a pair before it decodes: its preset's rate, or that most tokens of a draft are accepted."""
    if pair.draft is pair.target:
        return Acceptance(0.99)
    if pair.draft_name == "default" and pair.target_name in preset_names():
        return Acceptance(get_preset(pair.target_name).acceptance or Acceptance().rate)
    return Acceptance()
