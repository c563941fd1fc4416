"""Which mode and window to decode with: predicted times, what was accepted so far, and reluctance to switch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from specattn_jax.decoding.speculative import MODES, Mode
from specattn_jax.loading.pair import ModelPair
from specattn_jax.loading.presets import get_preset, preset_names
from specattn_jax.planning.cost import Scenario
from specattn_jax.planning.device import DeviceProfile, measure_profile, seconds_per_token
from specattn_jax.selection.policies import Selector

# Drafted tokens per window that `auto` considers; longer ones pay for drafts that accept nearly everything only.
WINDOWS = (1, 2, 3, 4, 5, 6, 8)
# What is nearer than this share to the fastest counts as equally fast: the prediction knows no better.
TIE = 0.01
# A running mode is left for one that is faster by at least this share, lest it be taken up again at the next look.
HYSTERESIS = 0.05
# A program is compiled only to save this many times the time that it takes.
COMPILE_MARGIN = 1.5
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


class Plan(NamedTuple):
    """One way to decode.

    Attributes:
        mode: of `DecodeSettings`.
        window: drafted tokens per window; 0 in mode `autoregressive`.
    """

    mode: Mode
    window: int

    def __str__(self) -> str:
        return self.mode if self.mode == "autoregressive" else f"{self.mode} (window {self.window})"


class Prediction(NamedTuple):
    """What a plan is thought to take.

    Attributes:
        plan: the plan.
        seconds: per token of each sequence.
    """

    plan: Plan
    seconds: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """A plan, and why.

    Attributes:
        mode: how to decode.
        window: drafted tokens per window; 0 in mode `autoregressive`.
        reason: one sentence.
        predictions: the fastest plan of each mode, and the one that was running.
        context: mean entries in a cache when it was made.
        acceptance: the assumed chance that a drafted token is accepted.
        bandwidth: measured bytes per second of a copy.
        is_final: whether nothing that may be seen until the end could change it, so that nobody has to look.
    """

    mode: Mode
    window: int
    reason: str = ""
    predictions: tuple[Prediction, ...] = ()
    context: int = 0
    acceptance: float = _DEFAULT_RATE
    bandwidth: float = 0.0
    is_final: bool = False

    @property
    def plan(self) -> Plan:
        """Mode and window."""
        return Plan(self.mode, 0 if self.mode == "autoregressive" else self.window)

    @property
    def may_change(self) -> bool:
        """Whether another decision can follow. Without the draft's cache there is no way back."""
        return self.mode != "autoregressive" and not self.is_final

    def explain(self) -> list[str]:
        """Lines for people: what was known, what each mode was thought to take, and the reason."""
        known = f"at {self.context:,} tokens, {self.acceptance:.0%} of drafted tokens accepted one by one"
        lines = [f"{known}, copies at {self.bandwidth / 1e9:,.1f} GB/s:"]
        lines += [f"  {plan}: {1e3 * seconds:.3g} ms per token predicted" for plan, seconds in self.predictions]
        return [*lines, f"  {self.reason}"]


class Situation(NamedTuple):
    """What is known when it is time to decide.

    Attributes:
        context: mean entries in a sequence's cache.
        remaining: most tokens that a sequence still wants.
        acceptance: what was accepted so far, or is assumed.
        kv_reduction: share of the target's reads that mode `specattn` saved here; None where it did not run yet.
        current: the plan that runs; None at the start.
        compiled: plans whose programs are there.
        compile_s: seconds that the slowest program of this run took to compile; little where all came from a cache.
    """

    context: int
    remaining: int
    acceptance: Acceptance = Acceptance()
    kv_reduction: float | None = None
    current: Plan | None = None
    compiled: frozenset[Plan] = frozenset()
    compile_s: float = 0.0


Decide = Callable[[Situation], Decision]


def choose_plan(
    scenario: Scenario,
    profile: DeviceProfile,
    situation: Situation,
    *,
    modes: Sequence[Mode] = MODES,
    windows: Sequence[int] = WINDOWS,
) -> Decision:
    """The plan predicted to be fastest; among equals the one of the simpler mode; a running one unless leaving it pays.

    Args:
        scenario: shapes, batch, and what `specattn` would read; context, window and acceptance are the situation's.
        profile: the device.
        situation: what is known.
        modes: those that can be had.
        windows: drafted tokens per window that may be chosen.
    """
    scenario = scenario._replace(context=max(1, situation.context))
    found = predict(scenario, profile, situation.acceptance, modes, windows)
    # From simple to approximate.
    best = [
        min((one for one in found if one.plan.mode == mode), key=lambda one: one.seconds)
        for mode in sorted(modes, key=MODES.index)
    ]
    fastest = min(best, key=lambda one: one.seconds)
    # Within one mode, only speed counts.
    chosen = next(one for one in best if one.seconds <= fastest.seconds * (1 + TIE))
    running = next((one for one in found if one.plan == situation.current), None)
    if running is not None:
        chosen, reason = _leave_or_stay(scenario, profile, situation, running, chosen)
    elif chosen is fastest:
        reason = f"{chosen.plan}, predicted to be the fastest."
    else:
        reason = f"{chosen.plan}, because {fastest.plan} is predicted to be no more than {TIE:.0%} faster."
    shown = [*best, *(one for one in (running, chosen) if one is not None)]
    return Decision(
        *chosen.plan,
        reason=reason,
        predictions=tuple(dict.fromkeys(shown)),
        context=situation.context,
        acceptance=situation.acceptance.rate,
        bandwidth=profile.bandwidth,
        is_final=_is_final(scenario, profile, chosen.plan, situation),
    )


def _is_final(scenario: Scenario, profile: DeviceProfile, plan: Plan, situation: Situation) -> bool:
    """Whether no switch can pay: all that is left, were nothing accepted, takes less than compiling another program."""
    longest = situation.remaining * _seconds(scenario, profile, plan, Acceptance(0.0))
    return situation.compiled <= {plan} and longest <= COMPILE_MARGIN * profile.compile_s


def predict(
    scenario: Scenario,
    profile: DeviceProfile,
    acceptance: Acceptance,
    modes: Sequence[Mode],
    windows: Sequence[int],
) -> list[Prediction]:
    """Seconds per token of every plan."""
    found = []
    for mode in modes:
        for window in (1,) if mode == "autoregressive" else windows:
            plan = Plan(mode, 0 if mode == "autoregressive" else window)
            found.append(Prediction(plan, _seconds(scenario, profile, plan, acceptance)))
    return found


def _seconds(scenario: Scenario, profile: DeviceProfile, plan: Plan, acceptance: Acceptance) -> float:
    """Predicted seconds per token of one plan."""
    window = max(1, plan.window)
    case = scenario._replace(window=window, accepted=acceptance.expected(window))
    return seconds_per_token(case, plan.mode, profile)


def _leave_or_stay(
    scenario: Scenario, profile: DeviceProfile, situation: Situation, running: Prediction, better: Prediction
) -> tuple[Prediction, str]:
    """Whether what is predicted to be faster is worth leaving what runs, and why.

    Few windows tell little of the acceptance: leaving has to pay if that is somewhat lower or higher too.
    """
    if better.plan == running.plan:
        return running, f"stays with {running.plan}, predicted to be the fastest."
    believed = situation.acceptance, *situation.acceptance.bounds(max(1, running.plan.window))
    gain = min(
        _seconds(scenario, profile, running.plan, rate) - _seconds(scenario, profile, better.plan, rate)
        for rate in believed
    )
    saved = gain * situation.remaining
    cost = 0.0 if better.plan in situation.compiled else max(situation.compile_s, profile.compile_s)
    if gain <= HYSTERESIS * running.seconds:
        return running, f"stays with {running.plan}: {better.plan} is not {HYSTERESIS:.0%} faster beyond doubt."
    if saved <= COMPILE_MARGIN * cost:
        return running, (
            f"stays with {running.plan}: {better.plan} would save {saved:.2g} s, compiling it takes about {cost:.2g} s."
        )
    return better, f"switches from {running.plan} to {better.plan}, which is predicted to save {saved:.2g} s."


@dataclasses.dataclass(frozen=True)
class Gate:
    """Decides for one run of `generate`.

    Attributes:
        scenario: shapes, batch, and what `specattn` would read.
        profile: the device.
        modes: those that can be had.
        windows: drafted tokens per window that may be chosen.
        always_read: entries of every cache that `specattn` reads, however short it is.
    """

    scenario: Scenario
    profile: DeviceProfile
    modes: tuple[Mode, ...] = MODES
    windows: tuple[int, ...] = WINDOWS
    always_read: int = 0

    def __call__(self, situation: Situation) -> Decision:
        """The plan for a situation."""
        saved = self.scenario.kv_reduction if situation.kv_reduction is None else situation.kv_reduction
        most = 1.0 - min(1.0, self.always_read / max(1, situation.context))
        return choose_plan(
            self.scenario._replace(kv_reduction=min(max(saved, 0.0), most)),
            self.profile,
            situation,
            modes=self.modes,
            windows=self.windows,
        )


def make_gate(
    pair: ModelPair,
    batch: int,
    selector: Selector | None,
    *,
    windows: Sequence[int] = WINDOWS,
    profile: DeviceProfile | None = None,
) -> Gate:
    """The gate of a pair.

    Args:
        pair: the models.
        batch: sequences decoded at a time.
        selector: what `specattn` would read; without one it is not chosen.
        windows: drafted tokens per window that may be chosen.
        profile: the device; measured where it is not given.
    """
    scenario = Scenario(pair.target.config, pair.draft.config, batch, itemsize=pair.target.dtype.itemsize)
    profile = profile or measure_profile()
    if selector is None:
        return Gate(scenario, profile, tuple(mode for mode in MODES if mode != "specattn"), tuple(windows))
    policy = selector.policy
    scenario = scenario._replace(kv_reduction=expected_saving(selector), draft_reads=policy.draft_reads)
    return Gate(scenario, profile, MODES, tuple(windows), policy.num_sink + policy.num_recent)


def expected_saving(selector: Selector) -> float:
    """Share of the target's reads that a selector saves: the wanted one, or what calibration says of its mass."""
    wanted = float(selector.mass.wanted_read)
    if wanted > 0:
        return 1.0 - wanted
    left_out = float(selector.mass.left_out.mean())
    if left_out <= 0:
        return 0.0
    alignment, policy = selector.alignment, selector.policy
    # Savings go about as the logarithm of the mass left out; none at all is saved somewhere far below the first budget.
    budgets = np.asarray(alignment.left_out).mean(axis=1)
    masses = np.log([min(1e-4, budgets[0] / 10), *budgets])
    saved = float(np.interp(math.log(left_out), masses, [0.0, *np.asarray(alignment.savings)]))
    return saved * (1 - policy.dense_layers / selector.target.num_layers)


def prior_acceptance(pair: ModelPair) -> Acceptance:
    """What is known of a pair before it decodes: its preset's rate, or that most tokens of a draft are accepted."""
    if pair.draft is pair.target:
        return Acceptance(0.99)
    if pair.draft_name == "default" and pair.target_name in preset_names():
        return Acceptance(get_preset(pair.target_name).acceptance or _DEFAULT_RATE)
    return Acceptance()
