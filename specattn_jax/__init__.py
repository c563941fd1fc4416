"""SpecAttn: speculative decoding in which the draft's attention decides what the target reads."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specattn_jax.calibration.calibrate import calibrate
    from specattn_jax.errors import UserError
    from specattn_jax.loading.pair import ModelPair, load_pair
    from specattn_jax.notebook.compare import compare
    from specattn_jax.notebook.sweep import sweep
    from specattn_jax.runtime.generate import generate

__version__ = "0.1.0"

__all__ = ["ModelPair", "UserError", "__version__", "calibrate", "compare", "generate", "load_pair", "sweep"]

_HOMES = {
    "ModelPair": "loading.pair",
    "UserError": "errors",
    "calibrate": "calibration.calibrate",
    "compare": "notebook.compare",
    "generate": "runtime.generate",
    "load_pair": "loading.pair",
    "sweep": "notebook.sweep",
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that `specattn --help` need not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
