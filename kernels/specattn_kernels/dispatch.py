"""Which backend serves an op: the choice that `implementation=None` makes, with its reason."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from specattn_kernels import checks

Implementation: TypeAlias = Literal["xla", "pallas_triton", "pallas_mosaic_gpu", "pallas_tpu"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

ATTENTION_OPS = ("decode_attention", "sparse_decode_attention")
SCORE_OPS = ("score_cache",)
SELECTION_OPS = ("top_p_threshold", "select_blocks", "compact_blocks")
# What each backend has.
BACKEND_OPS: dict[str, tuple[str, ...]] = {
    "xla": ATTENTION_OPS + SCORE_OPS + SELECTION_OPS,
    "pallas_triton": ATTENTION_OPS + SCORE_OPS + SELECTION_OPS,
    "pallas_mosaic_gpu": ATTENTION_OPS,
    "pallas_tpu": ATTENTION_OPS + SCORE_OPS + SELECTION_OPS,
}
# Where the kernels of each run compiled; XLA runs everywhere, and on a CPU kernels are interpreted.
BACKEND_PLATFORMS = {"pallas_triton": "gpu", "pallas_mosaic_gpu": "gpu", "pallas_tpu": "tpu"}
# Pallas lowers through Triton up to here; it is deprecated upstream.
_LAST_TRITON_JAX = (0, 12)
# Hopper: later GPUs have other matrix instructions.
_MOSAIC_CAPABILITY = (9, 0)
# For which the compiled Triton attention kernels have been compared with float64 on a GPU: head dims from here to 256.
_CHECKED_DTYPES = ("float32", "bfloat16")
_CHECKED_HEAD_DIM = 64


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


class Call(NamedTuple):
    """What a choice needs to know of an attention call; nothing of it matters to the selection ops.

    Attributes:
        cache: shape of `k` and `v`, [B, K, S, H].
        query_rows: T * G.
        dtype: of the cache.
        block_size: slots per block of the plan; None where there is no plan.
    """

    cache: tuple[int, ...]
    query_rows: int
    dtype: DTypeLike
    block_size: int | None = None


class SelectionCall(NamedTuple):
    """What a choice needs to know of a selection call.

    Attributes:
        scores: numbers to select from, all rows together.
        method: how the threshold is found.
    """

    scores: int
    method: str = "exact"


class Choice(NamedTuple):
    """A backend, and why it was chosen."""

    name: str
    reason: str


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


def choose_implementation(op: str, device: Device, call: Call | SelectionCall | None = None) -> Choice:
    """The backend that `implementation=None` means.

    Args:
        op: name of the public op.
        device: where it will run, see `current_device`.
        call: what is called, if it is known.

    Returns:
        Name and reason, the latter half a sentence.
    """
    if device.platform != "gpu":
        return Choice("xla", f"no kernel of ours is measured to be faster on a {device.platform.upper()}")
    obstacle = _triton_obstacle(device, call)
    if obstacle is not None:
        return Choice("xla", f"the Triton kernels cannot serve: {obstacle}")
    if op in SELECTION_OPS:
        return Choice("pallas_triton", "finds thresholds without sorting, and writes only ids that are chosen")
    if not isinstance(call, Call):
        return Choice("pallas_triton", "reads each cache entry once")
    if jnp.dtype(call.dtype).name not in _CHECKED_DTYPES or call.cache[3] < _CHECKED_HEAD_DIM:
        what = f"{jnp.dtype(call.dtype).name} and head dim {call.cache[3]}"
        return Choice("xla", f"the Triton kernels have not been checked on a GPU for {what} yet")
    granularity = "token" if call.block_size in (None, 1) else f"{call.block_size}-slot block"
    return Choice("pallas_triton", f"reads each cache entry once, {granularity} granular")


def _triton_obstacle(device: Device, call: Call | SelectionCall | None) -> str | None:
    """What keeps the Triton kernels from running on a device that is no CPU; None if nothing does."""
    if device.platform != "gpu":
        return f"they need an NVIDIA GPU, this is a {device.platform.upper()}"
    if device.compute_capability is None:
        return "they need an NVIDIA GPU, this is another"
    if device.compute_capability < (8, 0):
        return "they need compute capability 8.0 or more, this GPU has {}.{}".format(*device.compute_capability)
    if device.jax_version > _LAST_TRITON_JAX:
        return "this JAX is newer than they were written for"
    if call is None:
        return None
    if isinstance(call, SelectionCall):
        if call.method != "exact":
            return f"method {call.method!r}; expected 'exact'"
        return None if call.scores < 1 << 31 else f"{call.scores} scores; expected fewer than 2 ** 31, of fewer rows"
    from specattn_kernels.pallas_triton_attention import refusal

    return refusal(call.cache, call.query_rows)


def _mosaic_obstacle(device: Device, call: Call | SelectionCall | None) -> str | None:
    """What keeps the Mosaic GPU kernel from running on a device that is no CPU; None if nothing does."""
    if device.compute_capability != _MOSAIC_CAPABILITY:
        this = f"a {device.platform.upper()}"
        if device.compute_capability is not None:
            this = "one of {}.{}".format(*device.compute_capability)
        return f"it needs a GPU of compute capability 9.0 (Hopper), this is {this}"
    if not isinstance(call, Call):
        return None
    from specattn_kernels.pallas_mosaic_gpu import refusal

    return refusal(call.cache, call.query_rows, call.dtype, call.block_size)


_OBSTACLES = {"pallas_triton": _triton_obstacle, "pallas_mosaic_gpu": _mosaic_obstacle}


def find_obstacle(implementation: str, device: Device, call: Call | SelectionCall | None = None) -> str | None:
    """What keeps a backend from serving a call on a device that is no CPU; None if nothing is known to."""
    return _OBSTACLES[implementation](device, call) if implementation in _OBSTACLES else None


def load_backend(op: str, implementation: str | None, call: Call | SelectionCall | None = None) -> ModuleType:
    """Finds the module that implements `op`; a backend that is named explicitly is never replaced by another.

    Args:
        op: name of the public op.
        implementation: the backend; None chooses.
        call: what is called.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: for a known backend that lacks this op, or cannot serve on this device.
    """
    if implementation is None:
        implementation = choose_implementation(op, current_device(), call).name
    elif (device := current_device()).platform != "cpu":
        obstacle = find_obstacle(implementation, device, call)
        if obstacle is not None:
            raise NotImplementedError(f"{op}: {implementation}: {obstacle}; use implementation='xla', or None.")
    known = ", ".join(map(repr, IMPLEMENTATIONS))
    checks.require(
        implementation in IMPLEMENTATIONS, op, "implementation", repr(implementation), f"None or one of {known}"
    )
    if op not in BACKEND_OPS.get(implementation, ()):
        raise NotImplementedError(
            f"{op}: the backend {implementation!r} does not exist in this version for this op; "
            "use implementation='xla', or None to let the library choose."
        )
    return importlib.import_module(f"specattn_kernels.{implementation}")
