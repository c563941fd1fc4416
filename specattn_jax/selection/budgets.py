"""Per-layer budgets: how much of its attention mass each layer may leave out to save a wanted share of reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Forced sinks and recent entries can make a saving unreachable in a short cache; the factor stays sane there.
_SCALE_LIMITS = (0.2, 5.0)


class Budgets(NamedTuple):
    """Fitted budgets.

    Attributes:
        left_out: attention mass `[Q, L]` that each layer leaves out, for each of Q wanted savings.
        length_scale: factor `[Q, C]` on that mass when the cache is as long as each of C knots.
    """

    left_out: np.ndarray
    length_scale: np.ndarray


def length_knots(context: int) -> np.ndarray:
    """Cache lengths at which savings are matched, up to the calibration context."""
    return context * np.array([0.125, 0.25, 0.5, 1.0])


def fit_budgets(
    costs: np.ndarray, densities: np.ndarray, starts: np.ndarray, grid: np.ndarray, savings: Sequence[float]
) -> Budgets:
    """Shares a budget of reads among layers so that the estimated loss is least.

    For a multiplier m every layer takes the point of its curve with the least `cost + m * density`; m is bisected until
    the mean density is the wanted one. Then one factor on all left-out masses, per cache length, makes the densities
    there match: the same mass is a smaller share of a longer cache.

    Args:
        costs: `[L, C]` estimated KL of each layer at each point of the grid.
        densities: `[L, C, n]` share of the past read, per window.
        starts: `[n]` cache length at each window.
        grid: `[C]` left-out masses, descending.
        savings: wanted shares saved.
    """
    # Sampling noise aside, reading more never costs more.
    costs = np.minimum.accumulate(costs, axis=1)
    mean_density = densities.mean(axis=2)
    knots = length_knots(int(starts.max()))
    left_out, scales = [], []
    for saving in savings:
        choice = _allocate(costs, mean_density, 1.0 - saving)
        masses = grid[choice]
        left_out.append(masses)
        scales.append([_match(masses, densities, grid, _near(starts, knot), 1.0 - saving) for knot in knots])
    return Budgets(np.stack(left_out), np.array(scales))


def _allocate(costs: np.ndarray, density: np.ndarray, wanted: float) -> np.ndarray:
    """Grid index per layer whose mean density is about `wanted` at the least total cost."""
    layers = np.arange(len(costs))
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        choice = np.argmin(costs + np.exp(middle) * density, axis=1)
        if density[layers, choice].mean() > wanted:
            low = middle
        else:
            high = middle
    return np.argmin(costs + np.exp(high) * density, axis=1)


def _near(starts: np.ndarray, knot: float) -> np.ndarray:
    """Weight of each window for a cache length: a bump in the logarithm of the length, one octave wide."""
    weight = np.exp(-0.5 * (np.log2(starts / knot) / 0.5) ** 2)
    return weight / weight.sum()


def _match(masses: np.ndarray, densities: np.ndarray, grid: np.ndarray, weight: np.ndarray, wanted: float) -> float:
    """Factor on all left-out masses that makes the weighted mean density the wanted one."""
    curves = densities @ weight
    log_grid = np.log(grid[::-1])

    def density(scale: float) -> float:
        points = np.log(masses * scale)
        return float(
            np.mean([np.interp(point, log_grid, curve[::-1]) for point, curve in zip(points, curves, strict=True)])
        )

    low, high = np.log(1e-3), np.log(1e3)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if density(np.exp(middle)) > wanted else (low, middle)
    return float(np.clip(np.exp((low + high) / 2), *_SCALE_LIMITS))
