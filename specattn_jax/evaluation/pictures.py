"""Pictures of an evaluation: quality against reads saved, one window's selection, drift over position."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from specattn_jax.decoding.forced import Forced
from specattn_jax.decoding.protocol import Models, WindowRecord
from specattn_jax.evaluation.methods import Case
from specattn_jax.evaluation.tables import Row
from specattn_jax.loading.pair import ModelPair
from specattn_jax.reporting.plots import as_png, new_figure
from specattn_jax.runtime.session import Session
from specattn_jax.selection.protocol import Selection
from specattn_jax.selection.reads import past_mask

# Table 1 of arXiv 2510.27641: share of reads saved and relative increase of perplexity (Llama-2-7b, PG-19).
PUBLISHED = {
    "SpecAttn": [(0.443, 0.0056), (0.688, 0.0443), (0.784, 0.1529)],
    "StreamingLLM": [(0.774, 27.94)],
    "Quest": [(0.774, 0.2158)],
}
_MARKS = {"SpecAttn": "x", "StreamingLLM": "+", "Quest": "1"}
# Columns of the picture of a selection; a longer cache is drawn several slots to a column.
_COLUMNS = 512
_COLOURS = {
    "specattn default": "tab:blue",
    "specattn paper": "tab:red",
    "specattn paper_exact": "tab:orange",
    "oracle": "tab:green",
    "oracle_layer": "tab:olive",
    "vegas": "tab:cyan",
    "quest": "tab:purple",
    "streaming": "tab:brown",
}


def _plain_numbers(axes: Any) -> None:
    """Labels a logarithmic axis with numbers, between the powers of ten too where it spans few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def pareto(rows: Sequence[tuple[Case, Row]], title: str) -> bytes:
    """Draws KL and perplexity increase against reads saved, one line per method, with the paper's own points.

    Args:
        rows: of the table.
        title: what was measured.

    Returns:
        A PNG.
    """
    figure = new_figure(11, 5.0)
    left, right = figure.subplots(1, 2, sharex=True)
    figure.suptitle(title, fontsize="medium")
    lines: dict[str, list[Row]] = {}
    for case, row in rows:
        if case.method != "full":
            lines.setdefault(case.line, []).append(row)
    for name, points in lines.items():
        points.sort(key=lambda row: row["kv_reduction"])
        saved = [100 * row["kv_reduction"] for row in points]
        style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2, "color": _COLOURS.get(name)}
        for axes, value, scale in ((left, "kl", 1.0), (right, "relative_increase", 100.0)):
            error = [scale * (row[f"{value}_se"] or 0.0) for row in points]
            axes.errorbar(saved, [scale * row[value] for row in points], yerr=error, label=name, **style)
    for name, published in PUBLISHED.items():
        x, y = zip(*((100 * saved, 100 * increase) for saved, increase in published), strict=True)
        label = f"{name}, as published (Llama-2-7b)"
        right.plot(x, y, linestyle=":", marker=_MARKS[name], color="0.5", linewidth=1, label=label)
    left.set(ylabel="KL(full || sparse), nats per token", yscale="log", title="Distance from the full target")
    right.set(ylabel="increase of perplexity, %", title="Perplexity (below 0: better by luck)")
    right.set_yscale("symlog", linthresh=1.0, linscale=0.6)
    right.axhline(0.0, color="0.7", linewidth=0.8)
    shown = [-10, -1, 0, 1, 10, 100, 1000]
    right.set_yticks(shown, [str(value) for value in shown])
    right.set_ylim(1.5 * min(-1.0, *(100 * row["relative_increase"] for _, row in rows)), 5000)
    _plain_numbers(left)
    for axes in (left, right):
        axes.set_xlabel("cache reads saved, %")
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="x-small")
    return as_png(figure)


def trade_off(lines: Mapping[str, Sequence[tuple[float, float, float, str]]], title: str) -> bytes:
    """Draws distance and agreement against reads saved.

    Args:
        lines: by name, points of reads saved, KL in nats, top-1 and a label, which is drawn for the first line.
        title: what was measured.

    Returns:
        A PNG.
    """
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2, sharex=True)
    figure.suptitle(title, fontsize="medium")
    for number, (name, unsorted) in enumerate(lines.items()):
        points = sorted(unsorted)
        saved = [100 * point[0] for point in points]
        for axes, values in ((left, [point[1] for point in points]), (right, [100 * point[2] for point in points])):
            axes.plot(saved, values, "o-", markersize=4, linewidth=1.2, label=name)
            for x, y, point in zip(saved, values, points, strict=True) if number == 0 else ():
                place = (6, -9) if axes is left else (6, 4)
                axes.annotate(point[3], (x, y), place, textcoords="offset points", fontsize="x-small", color="0.35")
    left.set(ylabel="KL(full || sparse), nats per token", yscale="log")
    right.set(ylabel="same likeliest token, %")
    _plain_numbers(left)
    for axes in (left, right):
        axes.set_xlabel("cache reads saved, %")
        axes.margins(x=0.15, y=0.12)
        axes.grid(alpha=0.3)
    if len(lines) > 1:
        left.legend(fontsize="small")
    return as_png(figure)


def slots_read(
    pair: ModelPair, selection: Selection, document: Sequence[int], window: int = 5
) -> Bool[np.ndarray, "L K past"]:
    """What is read in one window in the middle of a document, after a dense prefill of the first half.

    Args:
        pair: the models.
        selection: what the target reads.
        document: token ids, at least `2 * window + 4` of them.
        window: W.
    """
    past = len(document) // 2
    session = Session(Models(pair.target, pair.need_draft()))
    strategy = Forced(jnp.asarray([document[past : past + window + 1]], jnp.int32), selection, window)
    state = session.start(strategy, session.prefill([document[:past]], window + 1, window=window))
    masks = session.watch(strategy, state, 1, _KeepMasks())[1]
    return np.asarray(masks)[0, :, 0, :, :past]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _KeepMasks:
    """Keeps the slots of the past that each layer read."""

    def __call__(self, record: WindowRecord) -> Bool[Array, "L B K S"]:
        past, _, layers, cache = record.seen
        return jnp.stack([past_mask(seen.plan, past, cache) for seen in layers])


def selection_picture(mask: Bool[np.ndarray, "L K past"], title: str) -> bytes:
    """Draws what one window reads, one line per layer and kv head, and how much each of them reads.

    Args:
        mask: from `slots_read`.
        title: what chose it.

    Returns:
        A PNG.
    """
    layers, heads, past = mask.shape
    rows = mask.reshape(layers * heads, past).astype(np.float64)
    width = -(-past // _COLUMNS)
    padded = np.pad(rows, ((0, 0), (0, -past % width)), constant_values=np.nan)
    columns = np.nanmean(padded.reshape(len(rows), -1, width), axis=2)
    figure = new_figure(11, max(3.5, 0.06 * len(rows) + 1.6))
    left, right = figure.subplots(1, 2, width_ratios=(5, 1), sharey=True)
    figure.suptitle(title, fontsize="medium")
    left.imshow(
        columns, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.0, extent=(0, past, layers, 0), interpolation="nearest"
    )
    share = f" (darkness: share of {width} slots)" if width > 1 else ""
    left.set(xlabel=f"slot of the cache{share}", ylabel=f"target layer ({heads} kv heads each)")
    left.set_yticks(np.arange(0, layers, max(1, layers // 15)))
    left.hlines(np.arange(1, layers), 0, past, color="0.85", linewidth=0.4)
    places = (np.arange(layers * heads) + 0.5) / heads
    right.barh(places, 100 * rows.mean(axis=1), height=0.9 / heads, color="tab:blue")
    right.axvline(100 * rows.mean(), color="0.4", linewidth=0.8, linestyle="--")
    right.set(xlabel="read, %")
    right.grid(alpha=0.3, axis="x")
    return as_png(figure)


def drift_curves(rows: Sequence[dict[str, Any]], smooth: int = 32) -> bytes:
    """Draws KL from a clean dense pass over position, one line per selection.

    Args:
        rows: from `drift.drift_row`.
        smooth: positions that are averaged.

    Returns:
        A PNG.
    """
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    for row in rows:
        kl = np.asarray(row["kl_by_position"])
        width = min(smooth, len(kl))
        kernel = np.ones(width) / width
        mean = np.convolve(kl, kernel, mode="valid")
        place = row["prompt_tokens"] + 1 + width / 2 + np.arange(len(mean))
        axes.plot(place, mean, linewidth=1.2, label=f"{row['label']} ({row['kv_reduction']:.1%} here)")
    axes.set(
        xlabel=f"position (prompt of {rows[0]['prompt_tokens']} tokens, read densely)",
        ylabel="KL(clean dense pass || sparse), nats",
        yscale="log",
        title=f"Free-running generation, {rows[0]['documents']} texts, running mean over {smooth} positions",
    )
    axes.title.set_fontsize("medium")
    _plain_numbers(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return as_png(figure)
