"""Time on a device: many calls inside one jitted loop, inputs that rotate past the cache, medians."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# More than the level-2 cache of any GPU of today.
_PAST_THE_CACHE = 128 * 2**20
_MAX_SETS = 16
_MAX_CALLS = 256
# Calls in one step of the loop, so that the loop's own work between steps does not count.
_LEAST_CALLS_A_STEP = 8
# Half of what current accelerators read; only decides how many calls make one measurement.
_ASSUMED_BANDWIDTH = {"cpu": 5e9, "gpu": 1.5e12, "tpu": 5e11}


class TimingSettings(NamedTuple):
    """How long to measure.

    Attributes:
        seconds: what one measurement should take.
        repeats: measurements, of which the median counts.
        rotate: bytes of inputs to go through before the first come again.
    """

    seconds: float = 0.02
    repeats: int = 7
    rotate: int = _PAST_THE_CACHE


class Timing(NamedTuple):
    """Time of one call.

    Attributes:
        seconds: median over the measurements.
        spread: largest minus smallest measurement over the median.
        calls: calls in each measurement.
        sets: input sets that were used in turn.
    """

    seconds: float
    spread: float
    calls: int
    sets: int


def time_calls(
    call: Callable[..., Any],
    make: Callable[[int], tuple[jax.Array, ...]],
    nbytes: int,
    settings: TimingSettings,
) -> Timing:
    """Times a function of arrays.

    Args:
        call: the function.
        make: inputs from a seed.
        nbytes: bytes that one call moves, which decide how many calls and input sets there are.
        settings: how long to measure.
    """
    sets = min(_MAX_SETS, -(-settings.rotate // nbytes) + 1)
    wanted = settings.seconds * _ASSUMED_BANDWIDTH[jax.default_backend()] / nbytes
    cycles = -(-_LEAST_CALLS_A_STEP // sets)
    rounds = max(1, min(_MAX_CALLS, round(wanted)) // (cycles * sets))
    inputs = [make(seed) for seed in range(sets)]
    loop = jax.jit(functools.partial(_loop, call, rounds, cycles))
    calls = rounds * cycles * sets
    measured = []
    jax.block_until_ready(loop(inputs))
    for _ in range(settings.repeats):
        began = time.perf_counter()
        jax.block_until_ready(loop(inputs))
        measured.append((time.perf_counter() - began) / calls)
    return Timing(*median_and_spread(measured), calls, sets)


def median_and_spread(measured: Sequence[float]) -> tuple[float, float]:
    """The median of measurements, and the largest minus the smallest over it."""
    median = statistics.median(measured)
    return median, (max(measured) - min(measured)) / median


def _loop(call: Callable[..., Any], rounds: int, cycles: int, inputs: Sequence[tuple[jax.Array, ...]]) -> Any:
    """Every input set in turn, `rounds` times `cycles` times; each call waits for the one before.

    The barrier makes the compiler believe that inputs depend on the results before, at no cost on the device. All
    results are carried along, or XLA would compute no more of them than is looked at.
    """
    shapes = [jax.eval_shape(call, *arrays) for arrays in inputs] * cycles

    def body(_: jax.Array, results: list[Any]) -> list[Any]:
        previous, results = results[-1], []
        for arrays in [*inputs] * cycles:
            waiting, _ = lax.optimization_barrier((arrays, previous))
            previous = call(*waiting)
            results.append(previous)
        return results

    empty = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return lax.fori_loop(0, rounds, body, empty)


def copy_bandwidth(settings: TimingSettings, nbytes: int) -> float:
    """Bytes read and written per second while an array of `nbytes` is copied on the device: the practical ceiling."""

    def make(seed: int) -> tuple[jax.Array]:
        return (jax.random.uniform(jax.random.key(seed), (nbytes // 4,)),)

    return 2 * nbytes / time_calls(jnp.negative, make, 2 * nbytes, settings).seconds
