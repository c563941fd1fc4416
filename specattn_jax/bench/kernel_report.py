"""Tables and pictures of a kernel benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from specattn_jax.bench.drawing import draw_lines, failed_row, gather, markdown

_COLUMNS = ("op", "shape", "point", "contender", "us", "GB/s", "of copy", "speed-up", "error")


def kernel_table(report: dict[str, Any]) -> str:
    """The points as Markdown: time, bandwidth achieved, share of a copy's, speed-up over the best baseline, error."""
    head = (
        f"Device {report['device']}, jax {report['versions']['jax']}, commit {report['commit'][:7]}, copy "
        f"{report['copy_bytes_per_second'] / 1e9:.0f} GB/s. "
        "Bytes are those that have to be moved; the speed-up is over the best baseline of the same run (of sparse "
        "attention: dense attention); the error is relative, against float64."
    )
    unfinished = "" if report["complete"] else "\nThe run stopped before its end.\n"
    return f"{head}\n{unfinished}\n" + markdown(_COLUMNS, [_row(point) for point in report["points"]])


def _reads_cache(case: dict[str, Any]) -> bool:
    """Whether the op of a case takes a cache, not scores."""
    return "attention" in case["op"] or case["op"] == "score_cache"


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    case = point["case"]
    shape = f"B{case['batch']} K{case['kv_heads']} S{case['slots']}"
    if _reads_cache(case):
        shape += f" G{case['group']} T{case['tokens']} H{case['head_dim']} {case['dtype']}"
    where = {
        "sparse_decode_attention": f"{case['density']:.0%}, block {case['block_size']}",
        "top_p_threshold": f"p {case['p']}",
        "select_blocks": f"p {case['p']}, block {case['block_size']}",
        "compact_blocks": f"{case['density']:.0%}",
    }.get(case["op"], "all")
    names = (case["op"], shape, where, point["contender"])
    if point["failure"] is not None:
        return failed_row(names, point["failure"], len(_COLUMNS))
    speedup, error = _speedup(point), point["relative_error"]
    return (
        *names,
        f"{point['seconds'] * 1e6:.1f}",
        f"{point['bytes'] / point['seconds'] / 1e9:.0f}",
        f"{point['share_of_copy_bandwidth']:.0%}",
        "" if speedup is None else f"{speedup:.2f}",
        "" if error is None else f"{error:.1e}",
    )


def _speedup(point: dict[str, Any]) -> float | None:
    """Over the best of what competes with the point."""
    return min(point.get("speedup_over", {}).values(), default=None)


class _Picture(NamedTuple):
    """One plot file: panels of lines, both named by functions of a point, for the points that are wanted."""

    wanted: Callable[[dict[str, Any]], bool]
    x: str
    y: Callable[[dict[str, Any]], float | None]
    panel: Callable[[dict[str, Any]], str]
    line: Callable[[dict[str, Any]], str]
    labels: tuple[str, str]
    y_scale: str


def _is_sparse(case: dict[str, Any]) -> bool:
    return bool(case["op"] == "sparse_decode_attention")


def _is_telling(case: dict[str, Any]) -> bool:
    """Whether a sparse case is one of the few that a crowded plot has room for."""
    return case["density"] in (0.25, 0.1) and case["block_size"] in (1, 16)


def _microseconds(point: dict[str, Any]) -> float:
    return float(point["seconds"]) * 1e6


def _attention_panel(point: dict[str, Any]) -> str:
    return "B{batch} K{kv_heads} G{group} T{tokens} H{head_dim} {dtype}".format(**point["case"])


def _attention_line(point: dict[str, Any]) -> str:
    case = point["case"]
    dense = case["op"] == "decode_attention"
    return f"{point['contender']}, " + ("dense" if dense else f"{case['density']:.0%}, block {case['block_size']}")


_PICTURES = {
    "latency.png": _Picture(
        lambda case: case["op"] == "decode_attention" or (_is_sparse(case) and _is_telling(case)),
        "slots",
        _microseconds,
        _attention_panel,
        _attention_line,
        ("cache slots", "microseconds"),
        "log",
    ),
    "speedup.png": _Picture(
        _is_sparse,
        "density",
        _speedup,
        lambda point: f"{_attention_panel(point)} S{point['case']['slots']}",
        lambda point: f"{point['contender']}, block {point['case']['block_size']}",
        ("share of the cache read", "speed-up over the best dense attention"),
        "linear",
    ),
    "selection.png": _Picture(
        lambda case: not _reads_cache(case),
        "slots",
        _microseconds,
        lambda point: "{op}, p {p}, block {block_size}".format(**point["case"]),
        lambda point: f"{point['contender']}, {point['case']['batch'] * point['case']['kv_heads']} rows",
        ("row length", "microseconds"),
        "log",
    ),
}


def draw(points: list[dict[str, Any]]) -> dict[str, bytes]:
    """The plots, as PNG by file name: latency over context, speed-up over density, selection over row length."""
    good = [point for point in points if point["failure"] is None]
    return {
        name: _draw([point for point in good if picture.wanted(point["case"])], picture)
        for name, picture in _PICTURES.items()
    }


def _draw(points: list[dict[str, Any]], picture: _Picture) -> bytes:
    """Draws the points; panels of a single place on the horizontal axis are left out if others have more."""
    panels = gather(
        (picture.panel(point), picture.line(point), point["case"][picture.x], value)
        for point in points
        if (value := picture.y(point)) is not None
    )
    telling = {
        name: lines for name, lines in panels.items() if len({x for line in lines.values() for x, _ in line}) > 1
    }
    return draw_lines(telling or panels, *picture.labels, y_scale=picture.y_scale)
