"""What the decode benchmark's times are held against: the bytes of a window, and the other methods of the same run."""

from __future__ import annotations

from typing import Any

from specattn_jax.bench.decode_cases import AUTOREGRESSIVE, RIVAL, SPECULATIVE, DecodeCase, Method, shape
from specattn_jax.planning.cost import Scenario, scored_bytes, scoring_bytes, window_bytes

# Whose best is the baseline "dense speculative decoding with our best dense attention".
_BEST_DENSE = (SPECULATIVE, "speculative (mosaic gpu)")


def roofline(case: DecodeCase, method: Method, found: dict[str, Any], copy: float) -> dict[str, Any]:
    """The bytes that a window has to move, and how near to the copy bandwidth it came, whole and in parts.

    Args:
        case: what was decoded.
        method: how.
        found: `window_seconds`, `density` and perhaps `parts`.
        copy: bytes per second of a copy.
    """
    scenario = scenario_of(case, method, found["density"])
    moved = window_bytes(scenario, method.mode)
    scored = 0.0
    if method.mode == "specattn":
        scored = scored_bytes(scenario) + scoring_bytes(scenario)
        if not method.sparse_target:
            moved = moved._replace(selection=scored)
    facts: dict[str, Any] = {
        "bytes": moved._asdict(),
        "share_of_copy_bandwidth": moved.total / found["window_seconds"] / copy,
    }
    if "parts" in found:
        floors = {
            "draft": (moved.draft_weights + moved.draft_cache + scored) / copy,
            "verify": (moved.target_weights + moved.target_cache) / copy,
        }
        facts["over_roofline"] = {name: found["parts"][name] / floor for name, floor in floors.items()}
    return facts


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
        dense = [speeds[name] for name in _BEST_DENSE if name in speeds]
        if dense:
            over["best dense speculative"] = point["tokens_per_second"] / max(dense)
        point["speedup_over"] = over
