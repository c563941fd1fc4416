"""Pictures of alignments and of training runs, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specattn_jax.selection.alignment import Alignment

_CELL_INCHES = 0.22
_TITLE = "Draft {} predicts the attention of target {}"


def new_figure(width: float, height: float, dpi: int = 150) -> Any:
    """An empty figure of so many inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Any) -> bytes:
    """The figure as a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def short_name(reference: str) -> str:
    """The last part of a path or hub id, for titles."""
    return reference.rstrip("/").rpartition("/")[2] or reference


def mixture_by_layer(alignment: Alignment, num_draft_layers: int) -> np.ndarray:
    """Mixture weights `[M, L]`: how much of each target layer's prediction comes from each draft layer.

    Sources are summed per draft layer and averaged over the kv heads of a target layer, so each column sums to 1.
    """
    weights = np.asarray(alignment.weights)
    num_target = len(alignment.layer_map)
    per_source = weights.reshape(num_target, -1, num_draft_layers, weights.shape[1] // num_draft_layers)
    mixture: np.ndarray = per_source.sum(axis=3).mean(axis=1).T
    return mixture


def alignment_heatmap(similarity: np.ndarray, alignment: Alignment, *, target: str, draft: str) -> bytes:
    """Draws both ways in which draft attention stands for target attention.

    Args:
        similarity: `[M, L]`, from `calibration.calibrate`.
        alignment: the alignment.
        target: name of the target, for the title.
        draft: name of the draft, for the title.

    Returns:
        A PNG: on the left the similarity of layers with the published layer map drawn in, on the right the mixture.
    """
    num_draft, num_target = similarity.shape
    width = max(4.5, _CELL_INCHES * num_target + 1.8)
    height = max(3.2, _CELL_INCHES * num_draft + 1.6)
    figure = new_figure(2 * width, height)
    left, right = figure.subplots(1, 2)
    figure.suptitle(_TITLE.format(short_name(draft), short_name(target)))

    # A few hopeless pairs of layers would otherwise take up the whole colour scale.
    floor = float(np.quantile(similarity, 0.05))
    image = left.imshow(similarity, origin="lower", aspect="auto", cmap="viridis", vmin=floor)
    bar = figure.colorbar(image, ax=left, extend="min", pad=0.02)
    bar.set_label("similarity: -KL(target || draft), nats")
    left.plot(
        range(num_target), alignment.layer_map, "o-", color="crimson", markersize=3, linewidth=1, label="layer map"
    )
    left.legend(loc="lower right", framealpha=0.9)
    _label(left, "Similarity of layers and the layer map", num_draft, num_target)

    _draw_mixture(figure, right, alignment, num_draft)
    return as_png(figure)


def mixture_heatmap(alignment: Alignment, num_draft_layers: int, *, target: str, draft: str) -> bytes:
    """Draws what an alignment holds, without the similarities that it was made from: mixture and layer map.

    Args:
        alignment: the alignment.
        num_draft_layers: M.
        target: name of the target, for the title.
        draft: name of the draft, for the title.

    Returns:
        A PNG.
    """
    num_target = len(alignment.layer_map)
    size = (max(6.0, _CELL_INCHES * num_target + 1.8), max(3.2, _CELL_INCHES * num_draft_layers + 1.8))
    figure = new_figure(*size)
    axes = figure.subplots()
    figure.suptitle(_TITLE.format(short_name(draft), short_name(target)), fontsize="medium")
    _draw_mixture(figure, axes, alignment, num_draft_layers)
    places, colour = range(num_target), "deepskyblue"
    axes.plot(places, alignment.layer_map, "o-", color=colour, markersize=3, linewidth=1, label="published layer map")
    axes.legend(loc="upper left", fontsize="small", framealpha=0.9)
    return as_png(figure)


def _draw_mixture(figure: Any, axes: Any, alignment: Alignment, num_draft_layers: int) -> None:
    """Mixture weights by layer, with their scale."""
    mixture = mixture_by_layer(alignment, num_draft_layers)
    image = axes.imshow(mixture, origin="lower", aspect="auto", cmap="magma", vmin=0.0)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("weight, summed over the sources of a draft layer", fontsize="small")
    title = f"Mixture weights (sources: {alignment.granularity.replace('_', ' ')}s)"
    _label(axes, title, num_draft_layers, mixture.shape[1])


def training_curves(
    steps: Sequence[int], losses: Mapping[str, Sequence[float]], accepted: Mapping[int, float]
) -> bytes:
    """Draws a distillation run: the parts of the loss on the left, held-out acceptance on the right.

    Args:
        steps: where losses were noted.
        losses: values in nats at those steps, by name; a part that is always zero is left out.
        accepted: drafted tokens accepted per window of five, by step.

    Returns:
        A PNG.
    """
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for name, values in losses.items():
        if any(values):
            left.plot(steps, values, linewidth=1, label=name)
    left.set(xlabel="step", ylabel="KL(target || draft), nats", yscale="log", title="Loss")
    left.legend()
    right.plot(list(accepted), list(accepted.values()), "o-", markersize=3, linewidth=1)
    right.set(xlabel="step", ylabel="drafted tokens accepted per window of 5", title="Held-out acceptance")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return as_png(figure)


def _label(axes: Any, title: str, num_draft: int, num_target: int) -> None:
    """Title and layer numbers, thinned out so that they never overlap."""
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("target layer")
    axes.set_ylabel("draft layer")
    axes.set_xticks(range(0, num_target, max(1, num_target // 12)))
    axes.set_yticks(range(0, num_draft, max(1, num_draft // 12)))
