"""The device that a call would run on."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """What a choice needs to know of the device.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        compute_capability: of an NVIDIA GPU, e.g. (9, 0); None for all else.
        jax_version: major and minor.
        cores: multiprocessors of a GPU; None where it is not known.
    """

    platform: str
    compute_capability: tuple[int, int] | None
    jax_version: tuple[int, int]
    cores: int | None = None


def current_device() -> Device:
    """The device that a call would run on now: JAX's default device."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    devices = jax.local_devices(backend=default) if isinstance(default, str) else jax.local_devices()
    device = devices[0] if default is None or isinstance(default, str) else default
    capability = None
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    if device.platform == "gpu" and major.isdecimal() and minor.isdecimal():
        capability = int(major), int(minor)
    version = jax.__version__.split(".")
    cores = getattr(device, "core_count", None) if device.platform == "gpu" else None
    return Device(device.platform, capability, (int(version[0]), int(version[1])), cores)
