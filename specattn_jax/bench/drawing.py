"""What the tables and pictures of all benchmarks are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specattn_jax.reporting.plots import as_png, new_figure

# Lines by panel and label, made of points (x, y).
Panels = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def failed_row(cells: Sequence[str], failure: str, width: int) -> tuple[str, ...]:
    """The row of a point that failed, so many cells wide, with why behind the first ones."""
    said = (*cells, "failed", failure.replace("|", "/"))
    return (*said, *("",) * (width - len(said)))


def gather(points: Iterable[tuple[str, str, float, float]]) -> Panels:
    """Lines from points, each with its panel and label."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for panel, label, x, y in points:
        panels[panel][label].append((x, y))
    return panels


def draw_lines(panels: Panels, x: str, y: str, y_scale: str = "linear", bottom: float | None = None) -> bytes:
    """A PNG with a panel for each group of lines; the horizontal axis is logarithmic."""
    places, figure = make_panels(len(panels))
    for axes, (name, lines) in zip(places, panels.items(), strict=True):
        for label, line in lines.items():
            axes.plot(*zip(*sorted(line), strict=True), "o-", markersize=3, linewidth=1, label=label)
        axes.set(xlabel=x, ylabel=y, xscale="log", yscale=y_scale)
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        axes.set_title(name, fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="xx-small")
    return as_png(figure)


def make_panels(count: int) -> tuple[list[Any], Any]:
    """So many places to draw in, at most three in a row, and their figure."""
    columns = min(3, max(1, count))
    rows = max(1, -(-count // columns))
    figure = new_figure(5.5 * columns, 4.2 * rows, dpi=110)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in places[count:]:
        empty.remove()
    return places[:count], figure
