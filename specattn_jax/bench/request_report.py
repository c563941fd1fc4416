"""What the request benchmark shows: whole requests beside each other, prefill by its arithmetic, and a plot."""

from __future__ import annotations

from typing import Any

from specattn_jax.bench.decode_methods import AUTOREGRESSIVE
from specattn_jax.bench.decode_report import describe_links
from specattn_jax.bench.drawing import failed_row, make_panels, markdown
from specattn_jax.models.sharding import MeshShape
from specattn_jax.reporting.plots import as_png

_COLUMNS = (
    "case",
    "method",
    "first token",
    "decoding",
    "request",
    "over autoregressive",
    "over transformers",
    "pays from",
)
_MESH = (
    "case",
    "method",
    "first token of one device",
    "of the mesh",
    "gain",
    "decoding of one device",
    "of the mesh",
    "gain",
)
_PREFILL = ("case", "seconds", "transformers", "over transformers", "of the causal bound", "draft besides")


def _title(case: dict[str, Any]) -> str:
    where = f" on {case['mesh']}" if case.get("mesh") else ""
    pair = f"{case['target']} with {case['draft']}" if case.get("rates") else case["target"]
    texts = f", {case['texts']} texts" if case.get("texts", 1) > 1 else ""
    return f"{pair} {case['batch']} x {case['slots'] - case['room']:,} + {case['room']}{texts}{where}"


def _at(points: list[dict[str, Any]], case: dict[str, Any], method: str) -> dict[str, Any] | None:
    """The measured point of a method in a case."""
    return next((one for one in points if one["case"] == case and one["method"] == method and not one["failure"]), None)


def _peer(peers: dict[str, Any] | None, case: dict[str, Any], what: str) -> float | None:
    """Seconds that transformers took for the same prompt."""
    for one in (peers or {"points": []})["points"]:
        same = (one["pair"], one["batch"], one["prompt"]) == (
            case["target"],
            case["batch"],
            case["slots"] - case["room"],
        )
        if same and one["what"] == what and one["failure"] is None:
            return float(one["seconds"])
    return None


def request_table(report: dict[str, Any], peers: dict[str, Any] | None) -> str:
    """The points as Markdown: requests, prefill, and what `auto` chooses.

    Args:
        report: what request.json holds.
        peers: what hf.json holds.
    """
    points = report["points"]
    parts = [
        f"Device {report['device']}, jax {report['versions']['jax']}, commit {report['commit'][:7]}, a product of "
        f"matrices at {report['matrix_flops'] / 1e12:.0f} TFLOP/s. Random weights but for a real pair: acceptance is "
        "imposed, and the share that sparse verification reads is set. Seconds, once everything is compiled.\n",
        markdown(_COLUMNS, [_row(points, point, peers) for point in points]),
        "### Prefill of the target\n",
        markdown(_PREFILL, _prefill_rows(report, peers)),
    ]
    together = _mesh_rows(points)
    if together:
        parts += [f"### Devices together\n{describe_links(report)}", markdown(_MESH, together)]
    if report.get("auto"):
        rows = [(_title(one["case"]), one["chosen"], one["best"], f"{one['of_best']:.2f}") for one in report["auto"]]
        parts += ["### What `--mode auto` chooses\n", markdown(("case", "chosen", "fastest", "of the best"), rows)]
    return "\n".join(parts)


def _mesh_rows(points: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What meshes gain over one device of the same run: the prompt, and decoding."""
    rows = []
    for point in points:
        case = point["case"]
        if point["failure"] is not None or not case.get("mesh"):
            continue
        alone = _at(points, {**case, "mesh": ""}, point["method"])
        if alone is not None:
            parts = ("prefill_seconds", "decode_seconds_median")
            gains = [f"{alone[part] / point[part]:.2f}" for part in parts]
            seconds = [f"{one[part]:.3f}" for part in parts for one in (alone, point)]
            rows.append((_title(case), point["method"], *seconds[:2], gains[0], *seconds[2:], gains[1]))
    return rows


def _row(points: list[dict[str, Any]], point: dict[str, Any], peers: dict[str, Any] | None) -> tuple[str, ...]:
    case, head = point["case"], (_title(point["case"]), point["method"])
    if point["failure"] is not None:
        return failed_row(head, point["failure"], len(_COLUMNS))
    alone, theirs = _at(points, case, AUTOREGRESSIVE), _peer(peers, case, "generate")
    whole = point["request_seconds"]
    return (
        *head,
        f"{point['prefill_seconds']:.3f}",
        f"{point['decode_seconds_median']:.3f}",
        f"{whole:.3f}",
        "" if alone is None else f"{alone['request_seconds'] / whole:.2f}",
        "" if theirs is None else f"{theirs / whole:.2f}",
        "" if alone is None else _break_even(point, alone),
    )


def _break_even(point: dict[str, Any], alone: dict[str, Any]) -> str:
    """From how many new tokens on a method ends before autoregressive decoding does."""
    later = point["prefill_seconds"] - alone["prefill_seconds"]
    gain = alone["seconds_per_token"] - point["seconds_per_token"]
    if point is alone:
        return ""
    return "never" if gain <= 0 else f"{max(1, round(later / gain)):,} tokens"


def _prefill_rows(report: dict[str, Any], peers: dict[str, Any] | None) -> list[tuple[str, ...]]:
    points = [point for point in report["points"] if point["failure"] is None]
    rows: list[tuple[str, ...]] = []
    for point in points:
        if point["method"] != AUTOREGRESSIVE or "arithmetic" not in point:
            continue
        case, mine = point["case"], point["prefill_seconds"]
        flops = report["matrix_flops"] * (MeshShape.parse(case["mesh"]).devices if case.get("mesh") else 1)
        theirs, bound = _peer(peers, case, "prefill"), sum(point["arithmetic"].values()) / flops
        both = next(
            (one for one in points if one["case"] == case and one["method"] != AUTOREGRESSIVE and not one["failure"]),
            None,
        )
        rows.append(
            (
                _title(case),
                f"{mine:.3f}",
                "" if theirs is None else f"{theirs:.3f}",
                "" if theirs is None else f"{theirs / mine:.2f}",
                f"{bound / mine:.0%}",
                "" if both is None else f"{(both['prefill_seconds'] - mine) / mine:.0%}",
            )
        )
    return rows


def draw_requests(points: list[dict[str, Any]]) -> bytes:
    """A PNG: seconds until the n-th new token, one panel a case and one line a method."""
    good = [point for point in points if point["failure"] is None]
    titles = list(dict.fromkeys(_title(point["case"]) for point in good))
    places, figure = make_panels(len(titles))
    for axes, title in zip(places, titles, strict=True):
        for point in good:
            if _title(point["case"]) == title:
                room, start = point["case"]["room"], point["prefill_seconds"]
                axes.plot([1, room], [start, point["request_seconds"]], label=point["method"])
        axes.set(xlabel="new tokens", ylabel="seconds", ylim=(0, None))
        axes.set_title(title, fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="xx-small")
    return as_png(figure)
