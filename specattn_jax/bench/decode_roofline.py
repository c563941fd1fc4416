"""What the decode benchmark's times are held against: the bytes of a window, and the other methods of the same run."""

from __future__ import annotations

from typing import Any

from specattn_jax.bench.decode_cases import DecodeCase, shape
from specattn_jax.bench.decode_methods import AUTOREGRESSIVE, MOSAIC, RIVAL, SPECULATIVE, Method
from specattn_jax.decoding.work import Scenario, Work
from specattn_jax.planning.cost import window_bytes


def roofline(case: DecodeCase, method: Method, found: dict[str, Any], copy: float) -> dict[str, Any]:
    """The bytes that a window has to move, and how near to the copy bandwidth it came.

    Args:
        case: what was decoded.
        method: how.
        found: `window_seconds` and `density`.
        copy: bytes per second of a copy.
    """
    scenario = scenario_of(case, method, found["density"])
    moved = window_bytes(scenario, work_of(case, method, scenario))
    return {"bytes": moved._asdict(), "share_of_copy_bandwidth": moved.total / found["window_seconds"] / copy}


def work_of(case: DecodeCase, method: Method, scenario: Scenario) -> Work:
    """What a window of a method consists of."""
    return method.outline(case.window).cost(scenario)


def scenario_of(case: DecodeCase, method: Method, density: float) -> Scenario:
    """What a method decodes, where it read that share of the target's cache."""
    return Scenario(
        shape(case.target),
        shape(case.draft),
        case.batch,
        case.context,
        case.window,
        case.mean_accepted,
        kv_reduction=max(0.0, 1.0 - density),
        itemsize=4 if case.dtype == "float32" else 2,
        draft_reads=method.draft_reads,
    )


def compare(points: list[dict[str, Any]]) -> None:
    """Adds to every point its speed-ups over the baselines of the same case in the same run."""
    good = [point for point in points if point["failure"] is None]
    for point in good:
        speeds = {other["method"]: other["tokens_per_second"] for other in good if other["case"] == point["case"]}
        over = {
            name: point["tokens_per_second"] / speeds[name]
            for name in (AUTOREGRESSIVE, SPECULATIVE, RIVAL)
            if name in speeds
        }
        # Dense speculative decoding with our best dense attention.
        dense = [speeds[name] for name in (SPECULATIVE, MOSAIC) if name in speeds]
        if dense:
            over["best dense speculative"] = point["tokens_per_second"] / max(dense)
        point["speedup_over"] = over
