"""Fits the constants of `configs/devices.toml` to what decode benchmarks measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from specattn_jax.bench.decode_cases import case_of
from specattn_jax.bench.decode_methods import CHOICES, methods
from specattn_jax.bench.decode_roofline import predict
from specattn_jax.decoding.work import Scenario, Work
from specattn_jax.errors import UserError
from specattn_jax.planning.device import DeviceProfile, window_seconds

FITTED = (
    "weights_share", "attention_share", "sparse_share", "selection_share", "layer_s", "selecting_layer_s",
    "forward_s", "window_s",
)  # fmt: skip
# Reading alone can be faster than a copy. Seconds may become so many times what they are, or so many times less.
_SHARES, _TIMES = (0.05, 1.3), 30.0
# The windows decide what `auto` chooses. A constant that nothing was measured of stays as it is.
_WINDOW_WEIGHT, _PRIOR_WEIGHT = 2.0, 0.05
_PARTS = {"draft": "draft", "select": "selection", "verify": "verify"}


class Term(NamedTuple):
    """One measured time.

    Attributes:
        case: of which case, for people.
        method: likewise.
        part: a field of `WindowSeconds`, or `total`.
        seconds: the time.
        scenario: what was decoded.
        work: what a window of it consists of.
        bandwidth: of a copy, in the same run.
    """

    case: str
    method: str
    part: str
    seconds: float
    scenario: Scenario
    work: Work
    bandwidth: float

    def ratio(self, profile: DeviceProfile) -> float:
        """Predicted over measured."""
        profile = dataclasses.replace(profile, bandwidth=self.bandwidth)
        return float(getattr(window_seconds(self.scenario, self.work, profile), self.part)) / self.seconds


def fit_terms(reports: Sequence[dict[str, Any]]) -> list[Term]:
    """What can be fitted to: windows, and their parts, of the methods that `auto` chooses from.

    Args:
        reports: what decode.json and request.json files of the benchmarks hold, or window.json of the profiler.

    Raises:
        UserError: there is nothing.
    """
    terms = []
    for report in reports:
        for point in report["points"]:
            case, name = case_of(point), point["method"]
            if point["failure"] is not None or case.real or name not in CHOICES:
                continue
            _, scenario, work = predict(case, methods()[name], point.get("density"))
            parts = {ours: point["parts"][its] for its, ours in _PARTS.items() if "parts" in point}
            times = {"total": point["window_seconds"], **{part: took for part, took in parts.items() if took > 0}}
            terms += [
                Term(case.title, name, part, took, scenario, work, report["copy_bytes_per_second"])
                for part, took in times.items()
            ]
    if not terms:
        raise UserError("the reports hold no measured window of random weights; expected those of bench decode.")
    return terms


def fit_profile(terms: Sequence[Term], prior: DeviceProfile) -> DeviceProfile:
    """Constants by least squares of the logarithms of predicted over measured, held weakly where they were."""
    start = np.log([getattr(prior, name) for name in FITTED])
    ranges = [
        np.log(_SHARES) if name.endswith("_share") else centre + math.log(_TIMES) * np.array([-1.0, 1.0])
        for name, centre in zip(FITTED, start, strict=True)
    ]
    low, high = np.array(ranges).T

    def profile(logs: np.ndarray) -> DeviceProfile:
        return dataclasses.replace(prior, **dict(zip(FITTED, np.exp(logs).tolist(), strict=True)))

    def residuals(logs: np.ndarray) -> np.ndarray:
        new = profile(logs)
        errors = [
            (_WINDOW_WEIGHT if term.part == "total" else 1.0) * math.log(max(term.ratio(new), 1e-9)) for term in terms
        ]
        return np.array([*errors, *(_PRIOR_WEIGHT * (logs - start))])

    return profile(least_squares(residuals, np.clip(start, low + 1e-9, high - 1e-9), bounds=(low, high)).x)
