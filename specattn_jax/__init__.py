"""SpecAttn: speculative decoding in which the draft's attention decides what the target reads.

The names below are public; everything else may change from one version to the next.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specattn_jax.bench.kernels import kernel_benchmark
    from specattn_jax.bench.runner import run_benchmark
    from specattn_jax.calibration.calibrate import calibrate
    from specattn_jax.calibration.passages import CalibrationSettings
    from specattn_jax.decoding.protocol import DecodeSettings, Models, Strategy, WindowRecord
    from specattn_jax.decoding.sampling import Sampling
    from specattn_jax.errors import UserError
    from specattn_jax.examples import save_tiny_pair, tiny_pair
    from specattn_jax.loading.pair import ModelPair, load_pair
    from specattn_jax.loading.resolve import resolve
    from specattn_jax.loading.tokenizer import check_compatible
    from specattn_jax.notebook.compare import compare
    from specattn_jax.notebook.devices import describe_devices, describe_kernels
    from specattn_jax.notebook.sweep import sweep
    from specattn_jax.reporting.display import Table
    from specattn_jax.runtime.generate import generate
    from specattn_jax.runtime.request import Request
    from specattn_jax.runtime.session import Session
    from specattn_jax.selection.protocol import Selection
    from specattn_jax.texts import find_text, read_text

__version__ = "0.1.0"

__all__ = [
    "CalibrationSettings",
    "DecodeSettings",
    "ModelPair",
    "Models",
    "Request",
    "Sampling",
    "Selection",
    "Session",
    "Strategy",
    "Table",
    "UserError",
    "WindowRecord",
    "__version__",
    "calibrate",
    "check_compatible",
    "compare",
    "describe_devices",
    "describe_kernels",
    "find_text",
    "generate",
    "kernel_benchmark",
    "load_pair",
    "read_text",
    "resolve",
    "run_benchmark",
    "save_tiny_pair",
    "sweep",
    "tiny_pair",
]

_HOMES = {
    "CalibrationSettings": "calibration.passages",
    "DecodeSettings": "decoding.protocol",
    "ModelPair": "loading.pair",
    "Models": "decoding.protocol",
    "Request": "runtime.request",
    "Sampling": "decoding.sampling",
    "Selection": "selection.protocol",
    "Session": "runtime.session",
    "Strategy": "decoding.protocol",
    "Table": "reporting.display",
    "UserError": "errors",
    "WindowRecord": "decoding.protocol",
    "calibrate": "calibration.calibrate",
    "check_compatible": "loading.tokenizer",
    "compare": "notebook.compare",
    "describe_devices": "notebook.devices",
    "describe_kernels": "notebook.devices",
    "find_text": "texts",
    "generate": "runtime.generate",
    "kernel_benchmark": "bench.kernels",
    "load_pair": "loading.pair",
    "read_text": "texts",
    "resolve": "loading.resolve",
    "run_benchmark": "bench.runner",
    "save_tiny_pair": "examples",
    "sweep": "notebook.sweep",
    "tiny_pair": "examples",
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that `specattn --help` need not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
