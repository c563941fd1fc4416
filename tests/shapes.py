"""Annotations of shapes and dtypes hold while tests run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beartype
from jaxtyping import install_import_hook

# Where arrays are. Commands, loaders and reports are left to mypy.
CHECKED = [
    "specattn_kernels",
    *(
        f"specattn_jax.{room}"
        for room in ("models", "selection", "decoding", "calibration", "planning", "runtime", "evaluation", "training")
    ),
]

# As for mypy, a whole number is a number.
_checker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping is to wrap functions with.

    Not what makes objects: JAX takes dataclasses apart and puts them together with whatever it has in place of arrays.
    """
    return function if function.__name__ == "__init__" else _checker(function)


def check_shapes() -> None:
    """Must be called before the packages are imported."""
    install_import_hook(CHECKED, "shapes.checked")
