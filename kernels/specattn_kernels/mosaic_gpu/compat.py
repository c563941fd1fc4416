"""The only place that depends on the version of JAX."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def mosaic_gpu_interpreter() -> Any:
    """What makes Pallas run a Mosaic GPU kernel on the CPU; public since JAX 0.11."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
