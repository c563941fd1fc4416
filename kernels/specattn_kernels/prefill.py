"""The public op for prompts: many new tokens over a cache that already has them.

Axes as in api.py. Which backend serves a call is decided here, until all ops ask one place.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from specattn_kernels import checks
from specattn_kernels.api import _scale
from specattn_kernels.dispatch import IMPLEMENTATIONS, Choice, Device, Implementation, current_device, find_obstacle
from specattn_kernels.types import AttentionOutput

_MODULES = {
    "xla": "xla_prefill",
    "pallas_triton": "triton.prefill",
    "pallas_mosaic_gpu": "mosaic_gpu.prefill",
    "pallas_tpu": "tpu.prefill",
}


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    *,
    lengths: Int[Array, " B"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """Attention of T new tokens, up to whole prompts, over the KV cache; causal, aligned at the bottom right.

    The new tokens' keys and values are already in the cache: query t of a sequence is at slot `starts + t` and sees the
    slots up to and including that one. Slots at or beyond `starts + T` may hold anything, NaN included, and cost
    nothing, and so do those that the causal mask hides, but for the tiles that it cuts. No array has both a T and an S
    axis. Softmax and lse are float32 whatever the dtype, and float32 inputs are multiplied in float32.

    The same as `decode_attention` with `lengths = starts + T`, and made for T of 64 or more, where arithmetic is what
    takes the time; that one is made for a few tokens, where reading the cache is. Reading in chunks gives what reading
    at once does. It cannot be differentiated in reverse mode.

    Args:
        q: queries, any floating dtype. The N / K consecutive query heads n with equal n // (N / K) share a kv head.
        k: cached keys.
        v: cached values, in the dtype of `k`.
        starts: slot of each sequence's first new token, not negative; `starts + T` is at most S.
        lengths: valid slots of each sequence, for prompts that are padded on the right to T tokens: slots at or beyond
            may hold anything, queries there get something finite, and blocks of such queries cost nothing. All
            `starts + T` if None.
        scale: factor on the logits, above 0; H ** -0.5 if None.
        return_lse: whether to return the log-sum-exp of the scaled logits, [B, T, N] float32; anything for queries at
            or beyond `lengths`.
        implementation: backend; None chooses by what was measured. Derivatives are those of "xla" in any case.

    Returns:
        The output in the dtype of `q`, and the lse if it was asked for.

    Raises:
        ValueError: if an argument has the wrong shape, dtype or value.
        NotImplementedError: if the named backend cannot serve; it says why.
    """
    op = "prefill_attention"
    q, k, v, starts = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(starts)
    checks.check_attention(op, q, k, v, starts, "starts")
    limits = starts.astype(jnp.int32) + q.shape[1]
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        checks.check_shape(op, "lengths", lengths, starts.shape, "[B]")
        checks.check_integer(op, "lengths", lengths)
        limits = jnp.minimum(limits, lengths.astype(jnp.int32))
    backend = _load_backend(op, implementation, q, k)

    def attend(module: ModuleType, *arguments: Any) -> AttentionOutput:
        *arrays, factor = arguments
        result: AttentionOutput = module.prefill_attention(*arrays, scale=factor, return_lse=return_lse)
        return result

    arguments = (q, k, v, starts.astype(jnp.int32), limits, _scale(op, scale, q.shape[-1]))
    plain = functools.partial(attend, _module("xla"))
    if backend is _module("xla"):
        return plain(*arguments)
    kernel = jax.custom_jvp(functools.partial(attend, backend))
    kernel.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return kernel(*arguments)


def choose_prefill(device: Device, cache: tuple[int, ...], dtype: DTypeLike, query_dtype: DTypeLike) -> Choice:
    """The backend that `implementation=None` means, with the reason.

    Args:
        device: where it will run.
        cache: shape of `k`, [B, K, S, H].
        dtype: of the cache.
        query_dtype: of the queries.
    """
    if device.platform != "gpu":
        return Choice("xla", f"no kernel of ours is measured to be faster on a {device.platform.upper()}")
    if jnp.promote_types(dtype, query_dtype) == jnp.float32:
        return Choice("xla", "matrix products of XLA are the fastest in float32")
    for name, reason in (
        ("pallas_mosaic_gpu", "takes turns between matrix products and softmax"),
        ("pallas_triton", "holds no logits in memory"),
    ):
        if find_obstacle(name, device) is None and _module(name).refusal(cache, dtype, query_dtype) is None:
            return Choice(name, reason)
    return Choice("xla", "no kernel takes this call on this GPU")


def _load_backend(op: str, implementation: str | None, q: jax.Array, k: jax.Array) -> ModuleType:
    """The module of a backend that can serve; one that is named is never replaced by another."""
    device = current_device()
    name = choose_prefill(device, k.shape, k.dtype, q.dtype).name if implementation is None else implementation
    known = ", ".join(map(repr, IMPLEMENTATIONS))
    checks.require(name in IMPLEMENTATIONS, op, "implementation", repr(name), f"None or one of {known}")
    module = _module(name)
    refused = find_obstacle(name, device) if device.platform != "cpu" else None
    if refused is None and name != "xla":
        refused = module.refusal(k.shape, k.dtype, q.dtype)
    if refused is not None:
        raise NotImplementedError(f"{op}: {name}: {refused}; use implementation='xla', or None.")
    return module


def _module(name: str) -> ModuleType:
    """Where a backend has the op."""
    return importlib.import_module(f"specattn_kernels.{_MODULES[name]}")
