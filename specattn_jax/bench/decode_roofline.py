"""What the decode benchmark's times are held against: the bytes of a window, and the other methods of the same run."""

from __future__ import annotations

from typing import Any, NamedTuple

from specattn_jax.bench.decode_cases import DecodeCase, shape
from specattn_jax.bench.decode_methods import AUTOREGRESSIVE, MOSAIC, RIVAL, SPECULATIVE, Method
from specattn_jax.decoding.judging import judge_exactly
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.work import Scenario, Work
from specattn_jax.models.sharding import MeshShape, abstract_mesh, split_draft
from specattn_jax.planning.cost import window_bytes
from specattn_jax.planning.mesh import share_of
from specattn_jax.selection.reads import ReadEverything


class Predicted(NamedTuple):
    """What a method decodes in a case, as the cost model sees it.

    Attributes:
        strategy: how, as far as it can be known without models.
        scenario: what.
        work: what a window of it consists of.
    """

    strategy: Strategy
    scenario: Scenario
    work: Work


def predict(case: DecodeCase, method: Method, density: float | None = None) -> Predicted:
    """What the cost model is asked of a method.

    Args:
        case: what is decoded.
        method: how.
        density: share of the target's cache that was read; where it was not measured, what is wanted.
    """
    strategy = method.make(ReadEverything(), case.window, judge_exactly)
    if density is None:
        density = 1.0 if strategy.lossless else case.density
    scenario = Scenario(
        shape(case.target),
        shape(case.draft),
        case.batch,
        case.context,
        case.window,
        case.mean_accepted,
        kv_reduction=max(0.0, 1.0 - density),
        itemsize=4 if case.dtype == "float32" else 2,
        draft_reads=1.0 if method.policy is None else method.policy.draft_reads,
    )
    return Predicted(strategy, scenario, strategy.cost(scenario))


def roofline(case: DecodeCase, method: Method, found: dict[str, Any], copy: float) -> dict[str, Any]:
    """The bytes that each device has to move in a window, and how near to its copy bandwidth the window came.

    Args:
        case: what was decoded.
        method: how.
        found: `window_seconds` and `density`.
        copy: bytes per second of a copy.
    """
    _, scenario, work = predict(case, method, found["density"])
    if case.mesh:
        mesh = MeshShape.parse(case.mesh)
        split = split_draft(abstract_mesh(mesh), scenario.draft, scenario.itemsize)
        scenario = share_of(scenario, mesh, whole_draft=split.heads is None)
    moved = window_bytes(scenario, work)
    return {"bytes": moved._asdict(), "share_of_copy_bandwidth": moved.total / found["window_seconds"] / copy}


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
