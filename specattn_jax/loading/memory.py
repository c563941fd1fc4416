"""Whether it fits, asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from specattn_jax.errors import UserError
from specattn_jax.models.config import ModelConfig

_MIB, _GIB = 1 << 20, 1 << 30


def weight_bytes(config: ModelConfig, dtype: np.dtype) -> int:
    """Bytes of a model's weights."""
    return config.parameter_count() * dtype.itemsize


def available_bytes(device: jax.Device | None = None) -> int:
    """Bytes that can still be allocated on a device, by default the first one."""
    device = device if device is not None else jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    # The CPU, and devices that share its memory and keep no count.
    import psutil

    return int(psutil.virtual_memory().available)


def check_memory(needed: Mapping[str, int], device: jax.Device | None = None) -> None:
    """Refuses what cannot fit.

    Args:
        needed: bytes by what they are for ("target weights", "draft cache", ...), in the words of the message.
        device: where; by default the first device.

    Raises:
        UserError: the sum is more than what is available.
    """
    total, available = sum(needed.values()), available_bytes(device)
    if total <= available:
        return
    device = device if device is not None else jax.local_devices()[0]
    parts = " + ".join(f"{name} {_readable(size)}" for name, size in needed.items())
    raise UserError(
        f"memory: needs {_readable(total)} ({parts}), {_readable(available)} available on {device.platform}; use a "
        "smaller model, a shorter context or dtype bfloat16."
    )


def _readable(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"
