"""The backends, what each of them can serve, and which one serves a call."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp

from specattn_kernels import checks
from specattn_kernels.calls import AttentionCall, Call
from specattn_kernels.devices import Device, current_device
from specattn_kernels.mosaic_gpu import limits as mosaic_gpu
from specattn_kernels.tpu import limits as tpu
from specattn_kernels.triton import limits as triton

Implementation: TypeAlias = Literal["xla", "pallas_triton", "pallas_mosaic_gpu", "pallas_tpu"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
# A backend, or several in order of preference; None leaves the choice to `choose_implementation`.
Wanted: TypeAlias = Implementation | Sequence[Implementation] | None

ATTENTION_OPS = ("decode_attention", "sparse_decode_attention")
PREFILL_OPS = ("prefill_attention",)
SCORE_OPS = ("score_cache",)
SELECTION_OPS = ("top_p_threshold", "select_blocks", "compact_blocks")
# For which the compiled Triton attention kernels have been compared with float64 on a GPU: head dims from here to 256.
_CHECKED_DTYPES = ("float32", "bfloat16")
_CHECKED_HEAD_DIM = 64


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of some of the ops.

    Attributes:
        name: what `implementation` calls it.
        modules: where its ops are, by op; loaded when an op is first called.
        platform: where its kernels run compiled; None: everywhere, as there are none.
        refuse_device: why the kernels cannot run on a device of that platform; None if they can.
        refuse_call: why they cannot serve a call wherever they run; None if they can.
    """

    name: Implementation
    modules: Mapping[str, str]
    platform: str | None
    refuse_device: Callable[[Device], str | None]
    refuse_call: Callable[[Call], str | None]

    def refusal(self, call: Call, device: Device) -> str | None:
        """Why this backend cannot serve a call on a device; None if it can. On a CPU kernels are interpreted."""
        if call.op not in self.modules:
            return f"it does not have this op; expected one of {', '.join(self.modules)}"
        if self.platform is not None and device.platform != "cpu":
            if device.platform != self.platform:
                return f"its kernels run on a {self.platform.upper()}, this is a {device.platform.upper()}"
            refused = self.refuse_device(device)
            if refused is not None:
                return refused
        return self.refuse_call(call)

    def load(self, op: str) -> Callable[..., Any]:
        """The function that implements an op, on arguments that have been checked."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.modules[op]), op)
        return function


class Choice(NamedTuple):
    """A backend, and why it was chosen."""

    name: Implementation
    reason: str


def _modules(room: str, **ops_of_file: Sequence[str]) -> dict[str, str]:
    """Modules by op, from the ops of each file of a room."""
    return {op: f"specattn_kernels.{room}{file}" for file, ops in ops_of_file.items() for op in ops}


def _nothing(_: Any) -> None:
    """Refuses nothing."""


_ALL_OPS = {"attention": ATTENTION_OPS, "prefill": PREFILL_OPS, "scores": SCORE_OPS, "selection": SELECTION_OPS}
XLA = Backend(
    "xla",
    _modules("", xla=ATTENTION_OPS + SCORE_OPS + SELECTION_OPS, xla_prefill=PREFILL_OPS),
    None,
    _nothing,
    _nothing,
)
TRITON = Backend("pallas_triton", _modules("triton.", **_ALL_OPS), "gpu", triton.refuse_device, triton.refuse_call)
MOSAIC_GPU = Backend(
    "pallas_mosaic_gpu",
    _modules("mosaic_gpu.", attention=ATTENTION_OPS, prefill=PREFILL_OPS),
    "gpu",
    mosaic_gpu.refuse_device,
    mosaic_gpu.refuse_call,
)
TPU = Backend("pallas_tpu", _modules("tpu.", **_ALL_OPS), "tpu", _nothing, tpu.refuse_call)
BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in (XLA, TRITON, MOSAIC_GPU, TPU)}


def choose_implementation(call: Call, device: Device) -> Choice:
    """The backend that `implementation=None` means.

    Args:
        call: what is called.
        device: where it will run, see `current_device`.

    Returns:
        Name and reason, the latter half a sentence.
    """
    if device.platform != TRITON.platform:
        return Choice("xla", f"no kernel of ours is measured to be faster on a {device.platform.upper()}")
    if isinstance(call, AttentionCall) and call.op in PREFILL_OPS:
        return _choose_prefill(call, device)
    refused = TRITON.refusal(call, device)
    if refused is not None:
        return Choice("xla", f"pallas_triton cannot serve: {refused}")
    if not isinstance(call, AttentionCall):
        return Choice("pallas_triton", "finds thresholds without sorting, and writes only ids that are chosen")
    dtype, head_dim = jnp.dtype(call.dtype).name, call.cache[3]
    if dtype not in _CHECKED_DTYPES or head_dim < _CHECKED_HEAD_DIM:
        what = f"{dtype} and head dim {head_dim}"
        return Choice("xla", f"pallas_triton has not been checked on a GPU for {what} yet")
    granularity = "token" if call.block_size in (None, 1) else f"{call.block_size}-slot block"
    return Choice("pallas_triton", f"reads each cache entry once, {granularity} granular")


def _choose_prefill(call: AttentionCall, device: Device) -> Choice:
    """The same for prompts on a GPU: in half precision the kernel that uses the matrix units best."""
    if jnp.promote_types(call.dtype, call.query_dtype or call.dtype) == jnp.float32:
        return Choice("xla", "in float32 its matrix products are the fastest")
    if MOSAIC_GPU.refusal(call, device) is None:
        return Choice("pallas_mosaic_gpu", "multiplies while it is at its softmax")
    refused = TRITON.refusal(call, device)
    if refused is not None:
        return Choice("xla", f"pallas_triton cannot serve: {refused}")
    return Choice("pallas_triton", "holds no logits in memory")


def compiled_implementations(call: Call, device: Device) -> tuple[Implementation, ...]:
    """All backends that can serve a call on a device with compiled kernels, or without any."""
    return tuple(
        backend.name
        for backend in BACKENDS.values()
        if backend.platform in (None, device.platform) and backend.refusal(call, device) is None
    )


def find_backend(call: Call, wanted: Wanted) -> Backend:
    """The backend that serves a call: the first of those that are named that can. No other ever takes their place.

    Args:
        call: what is called.
        wanted: a name or several; None chooses.

    Raises:
        ValueError: for an unknown name, or none at all.
        NotImplementedError: if none of those that are named can serve; it says why not, name by name.
    """
    device = current_device()
    if wanted is None:
        return BACKENDS[choose_implementation(call, device).name]
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    known = ", ".join(map(repr, IMPLEMENTATIONS))
    fine = names and all(name in IMPLEMENTATIONS for name in names)
    expected = f"None or one of {known}, or several of these in order of preference"
    checks.require(bool(fine), call.op, "implementation", repr(wanted), expected)
    refusals = []
    for name in names:
        refused = BACKENDS[name].refusal(call, device)
        if refused is None:
            return BACKENDS[name]
        refusals.append(f"{name}: {refused}")
    raise NotImplementedError(f"{call.op}: {'; '.join(refusals)}; use implementation='xla', or None.")
