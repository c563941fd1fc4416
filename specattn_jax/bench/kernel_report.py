"""Tables and pictures of a kernel benchmark."""

from __future__ import annotations

from typing import Any

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


def draw(points: list[dict[str, Any]]) -> dict[str, bytes]:
    """The plots, as PNG by file name: latency over context, speed-up over density, selection over row length."""
    latency, speedup, selection = [], [], []
    for point in points:
        if point["failure"] is not None:
            continue
        case, over = point["case"], _speedup(point)
        dense, sparse = (case["op"] == op for op in ("decode_attention", "sparse_decode_attention"))
        shape = "B{batch} K{kv_heads} G{group} T{tokens} H{head_dim} {dtype}".format(**case)
        block, us = f"block {case['block_size']}", point["seconds"] * 1e6
        # There is room for few of the sparse cases.
        if dense or (sparse and case["density"] in (0.25, 0.1) and case["block_size"] in (1, 16)):
            what = "dense" if dense else f"{case['density']:.0%}, {block}"
            latency.append((shape, f"{point['contender']}, {what}", case["slots"], us))
        if sparse and over is not None:
            speedup.append((f"{shape} S{case['slots']}", f"{point['contender']}, {block}", case["density"], over))
        if not _reads_cache(case):
            rows = f"{point['contender']}, {case['batch'] * case['kv_heads']} rows"
            selection.append(("{op}, p {p}, block {block_size}".format(**case), rows, case["slots"], us))
    return {
        "latency.png": _draw(latency, "cache slots", "microseconds", "log"),
        "speedup.png": _draw(speedup, "share of the cache read", "speed-up over the best dense attention", "linear"),
        "selection.png": _draw(selection, "row length", "microseconds", "log"),
    }


def _draw(points: list[tuple[str, str, float, float]], x: str, y: str, y_scale: str) -> bytes:
    """Draws lines; panels of a single place on the horizontal axis are left out if others have more."""
    panels = gather(points)
    telling = {
        name: lines for name, lines in panels.items() if len({x for line in lines.values() for x, _ in line}) > 1
    }
    return draw_lines(telling or panels, x, y, y_scale)
