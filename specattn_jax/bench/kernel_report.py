"""Tables and pictures of a kernel benchmark."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from typing import Any

_COLUMNS = ("op", "shape", "point", "contender", "us", "GB/s", "of copy", "speed-up", "error")


def kernel_table(report: dict[str, Any]) -> str:
    """The points as Markdown: time, bandwidth achieved, share of a copy's, speed-up over the best baseline, error."""
    head = (
        f"Device {report['device']}, jax {report['jax']}, copy {report['copy_bytes_per_second'] / 1e9:.0f} GB/s. "
        "Bytes are those that have to be moved; the speed-up is over the best baseline of the same run (of sparse "
        "attention: dense attention); the error is relative, against float64."
    )
    rows = [_row(point) for point in report["points"]]
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *rows]
    unfinished = "" if report["complete"] else "\nThe run stopped before its end.\n"
    return f"{head}\n{unfinished}\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    case = point["case"]
    shape = f"B{case['batch']} K{case['kv_heads']} S{case['slots']}"
    if "attention" in case["op"]:
        shape += f" G{case['group']} T{case['tokens']} H{case['head_dim']} {case['dtype']}"
    where = {
        "sparse_decode_attention": f"{case['density']:.0%}, block {case['block_size']}",
        "top_p_threshold": f"p {case['p']}",
        "select_blocks": f"p {case['p']}, block {case['block_size']}",
        "compact_blocks": f"{case['density']:.0%}",
    }.get(case["op"], "all")
    names = (case["op"], shape, where, point["contender"])
    if point["failure"] is not None:
        return *names, "failed", "", "", "", point["failure"].replace("|", "/")
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
    """The three plots, as PNG by file name."""
    good = [point for point in points if point["failure"] is None]

    def of(*ops: str) -> list[dict[str, Any]]:
        return [point for point in good if point["case"]["op"] in ops]

    attention = of("decode_attention", "sparse_decode_attention")
    return {
        "latency.png": _curves(
            attention,
            x=lambda point: point["case"]["slots"],
            y=lambda point: point["seconds"] * 1e6,
            labels=("cache slots", "microseconds", "Attention: latency over context"),
            axes={"xscale": "log", "yscale": "log"},
            varies=("slots",),
        ),
        "speedup.png": _curves(
            of("sparse_decode_attention"),
            x=lambda point: point["case"]["density"],
            y=_speedup,
            labels=("share of the cache read", "speed-up over dense", "Sparse attention: speed-up over density"),
            axes={"xscale": "log"},
            varies=("density",),
        ),
        "selection.png": _curves(
            of("select_blocks", "top_p_threshold"),
            x=lambda point: point["case"]["slots"],
            y=lambda point: point["seconds"] * 1e6,
            labels=("row length", "microseconds", "Selection: time over row length"),
            axes={"xscale": "log", "yscale": "log"},
            varies=("slots",),
        ),
    }


def _curves(
    points: list[dict[str, Any]],
    *,
    x: Callable[[dict[str, Any]], float],
    y: Callable[[dict[str, Any]], float | None],
    labels: tuple[str, str, str],
    axes: dict[str, str],
    varies: tuple[str, ...],
) -> bytes:
    """One curve for all points that differ in nothing but `varies`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        value = y(point)
        if value is not None:
            rest = tuple((name, field) for name, field in point["case"].items() if name not in varies)
            curves[(point["contender"], *rest)].append((x(point), value))
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.subplots()
    fields = [dict(key[1:]) for key in curves]
    for key, curve in curves.items():
        mine = dict(key[1:])
        telling = [f"{name} {mine[name]}" for name in mine if len({str(other[name]) for other in fields}) > 1]
        label = ", ".join([key[0], *telling])
        plot.plot(*zip(*sorted(curve), strict=True), "o-", markersize=3, linewidth=1, label=label)
    plot.set(xlabel=labels[0], ylabel=labels[1], title=labels[2], **axes)
    plot.grid(alpha=0.3)
    if curves:
        figure.legend(loc="outside right upper", fontsize="xx-small")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
