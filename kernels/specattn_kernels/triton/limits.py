"""What the Triton kernels take; known without loading them."""

from __future__ import annotations

import math

from specattn_kernels.calls import AttentionCall, Call
from specattn_kernels.common import power_of_two
from specattn_kernels.devices import Device

# Pallas lowers through Triton up to here; it is deprecated upstream.
LAST_JAX = (0, 12)
LEAST_CAPABILITY = (8, 0)
# Query rows of one program: T * G.
MAX_QUERY_ROWS = 128
MAX_HEAD_DIM = 256
# Numbers that 32-bit addresses reach.
MAX_NUMBERS = (1 << 31) - 1


def refuse_device(device: Device) -> str | None:
    """Why the kernels cannot run compiled on a GPU; None if they can."""
    if device.compute_capability is None:
        return "it needs an NVIDIA GPU, this is another"
    if device.compute_capability < LEAST_CAPABILITY:
        return "it needs compute capability 8.0 or more, this GPU has {}.{}".format(*device.compute_capability)
    if device.jax_version > LAST_JAX:
        return "this JAX is newer than its kernels were written for"
    return None


def refuse_call(call: Call) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    if isinstance(call, AttentionCall):
        return _refuse_attention(call)
    if call.method != "exact":
        return f"method {call.method!r}; expected 'exact'"
    numbers = call.rows * call.slots
    return None if numbers <= MAX_NUMBERS else f"{numbers} scores; expected fewer than 2 ** 31, of fewer rows"


def _refuse_attention(call: AttentionCall) -> str | None:
    """The same for attention and the scores of a cache."""
    head_dim, size = call.cache[3], math.prod(call.cache)
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim}; expected a multiple of 16 up to {MAX_HEAD_DIM}"
    if size > MAX_NUMBERS:
        return f"a cache of {size} numbers per layer; expected fewer than 2 ** 31, of a smaller batch"
    if call.op == "prefill_attention":
        return None
    if call.op == "score_cache":
        tokens, group = padded_rows(call.tokens, call.group)
        if tokens * group > MAX_QUERY_ROWS:
            return (
                f"{call.tokens} tokens and {call.group} query heads per kv head; expected a product of at most "
                f"{MAX_QUERY_ROWS}, each rounded up to a power of two"
            )
    elif call.query_rows > MAX_QUERY_ROWS:
        return f"{call.query_rows} query rows per kv head (new tokens times group); expected at most {MAX_QUERY_ROWS}"
    return None


def padded_rows(tokens: int, group: int) -> tuple[int, int]:
    """Tokens and group members of a program that scores a cache: powers of two, 16 rows at least."""
    members = power_of_two(group)
    return max(power_of_two(tokens), 16 // members), members
