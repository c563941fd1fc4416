"""What `--mode auto` would choose in the cases of a decode benchmark, held against what was measured there."""

from __future__ import annotations

from typing import Any

from specattn_jax.bench.decode_cases import DecodeCase, by_case
from specattn_jax.bench.decode_methods import AUTO, CHOICES, SPECATTN, methods
from specattn_jax.bench.decode_roofline import predict
from specattn_jax.planning.acceptance import Acceptance
from specattn_jax.planning.device import DeviceProfile, device_kind, load_profile, window_seconds
from specattn_jax.planning.gate import Situation, choose_strategy

# More tokens than any compilation costs; at the start it does not matter anyway.
_REMAINING = 10**6


def auto_choices(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The choice in each case, with the window, acceptance and share of reads that were measured.

    It depends on nothing but the report and `configs/devices.toml`, so that it can be asked again with other constants.

    Args:
        report: what decode.json holds.

    Returns:
        For each case the method that is `chosen`, and why; the `best` of those that `auto` chooses from; what share of
        its tokens per second the chosen one reached (`of_best`, None where it was not measured); and predicted beside
        measured seconds of a window, method by method. Of a real pair, `auto` itself was measured.
    """
    found = []
    for case, points in by_case(report["points"]).items():
        good = {point["method"]: point for point in points if point["failure"] is None}
        speeds = {name: good[name]["tokens_per_second"] for name in CHOICES if name in good}
        # What devices gain together is not predicted yet.
        if not speeds or case.mesh:
            continue
        best = max(speeds, key=lambda name: speeds[name])
        if not case.real:
            choice = _choose(case, good, report_profile(report))
            speed = speeds.get(choice["chosen"])
        elif AUTO in good:
            choice = {"chosen": good[AUTO]["plan"], "reason": " ".join(good[AUTO]["decisions"]), "methods": {}}
            speed = good[AUTO]["tokens_per_second"]
        else:
            continue
        of_best = None if speed is None else speed / speeds[best]
        found.append({"case": points[0]["case"], **choice, "best": best, "of_best": of_best})
    return found


def report_profile(report: dict[str, Any]) -> DeviceProfile:
    """The device of a report, by its measured bandwidth."""
    kind = device_kind(report["platform"])
    return load_profile(kind, bandwidth=report["copy_bytes_per_second"], flops=report.get("flops"))


def _choose(case: DecodeCase, good: dict[str, dict[str, Any]], profile: DeviceProfile) -> dict[str, Any]:
    """What is chosen, and what was predicted."""
    asked = {name: predict(case, methods()[name], good.get(name, {}).get("density")) for name in CHOICES}
    decision = choose_strategy(
        asked[SPECATTN].scenario,
        profile,
        Situation(case.context, _REMAINING, Acceptance().at_mean(case.window, case.mean_accepted)),
        tuple(one.strategy for one in asked.values()),
    )
    return {
        "chosen": decision.mode,
        "reason": decision.reason,
        "methods": {
            name: {
                "predicted_window_seconds": window_seconds(one.scenario, one.work, profile).total,
                "window_seconds": good.get(name, {}).get("window_seconds"),
            }
            for name, one in asked.items()
        },
    }
