"""Where the time of one call goes."""

from __future__ import annotations

import time

import jax


class Clock:
    """Sums wall time by kind, waiting for the device at each lap."""

    def __init__(self) -> None:
        self.seconds = {"compile_s": 0.0, "prefill_s": 0.0, "decode_s": 0.0}
        self._last = time.perf_counter()

    def lap(self, kind: str, value: object = None) -> float:
        """Adds, and returns, the time since the last lap, once `value` is there."""
        jax.block_until_ready(value)
        now = time.perf_counter()
        passed = now - self._last
        self.seconds[f"{kind}_s"] += passed
        self._last = now
        return passed
