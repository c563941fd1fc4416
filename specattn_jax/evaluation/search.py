"""Finds how much attention mass must be left out to save a wanted share of the reads."""

from __future__ import annotations

import math
from collections.abc import Callable

# Savings are read from texts, whose own scatter is larger than this.
TOLERANCE = 0.003
READINGS = 7
# Where nothing is known yet.
_START = 0.1
_LIMITS = (1e-6, 0.9999)
# Density goes about as the inverse square root of the mass left out (see `alignment.NucleusMass`).
_POWER = 2.0
_LONGEST_STEP = math.log(30.0)
_SHORTEST_STEP = 1e-3
_DIGITS = 6


def find_left_out(saving: Callable[[float], float], wanted: float, known: dict[float, float]) -> float:
    """Mass to leave out, the same in every layer, for a saving as near as possible to the wanted one.

    A secant in the logarithms of mass and density that never leaves the bracket found so far. A selection whose
    saving jumps may have no mass that comes near: the search ends when its bracket has closed.

    Args:
        saving: measures the share of reads saved with a mass; it does not fall as the mass grows.
        wanted: the saving to meet within `TOLERANCE`, in (0, 1).
        known: savings measured before, by mass; new measurements are added.

    Returns:
        The mass in `known` whose saving is nearest, after at most `READINGS` new measurements.
    """

    def distance(mass: float) -> float:
        return abs(known[mass] - wanted)

    for _ in range(READINGS):
        if known and distance(min(known, key=distance)) <= TOLERANCE:
            break
        mass = _next_mass(known, wanted)
        if mass is None or mass in known:
            break
        known[mass] = saving(mass)
    return min(known, key=distance)


def _next_mass(known: dict[float, float], wanted: float) -> float | None:
    """Where to measure next; None where the bracket has closed."""
    if not known:
        return _START
    points = sorted((math.log(mass), math.log(max(1.0 - saving, 1e-6))) for mass, saving in known.items())
    aim = math.log(1.0 - wanted)
    # The density falls as the mass grows.
    below = [point for point in points if point[1] > aim]
    above = [point for point in points if point[1] <= aim]
    if below and above:
        (low, dense), (high, sparse) = below[-1], above[0]
        if high - low < _SHORTEST_STEP:
            return None
        share = (dense - aim) / (dense - sparse)
        place = low + min(max(share, 0.1), 0.9) * (high - low)
    else:
        near = below[-1] if below else above[0]
        step = _slope(points, near) * (aim - near[1])
        place = near[0] + min(max(step, -_LONGEST_STEP), _LONGEST_STEP)
    mass = min(max(math.exp(place), _LIMITS[0]), _LIMITS[1])
    # Short enough to stand in a table and in the name of a file.
    return float(f"{mass:.{_DIGITS}g}")


def _slope(points: list[tuple[float, float]], near: tuple[float, float]) -> float:
    """Change of log mass per change of log density around a point at the edge of what was measured."""
    others = [point for point in points if point != near]
    if not others:
        return -_POWER
    other = min(others, key=lambda point: abs(point[0] - near[0]))
    change = near[1] - other[1]
    return (near[0] - other[0]) / change if abs(change) > _SHORTEST_STEP else -_POWER
