"""What the Mosaic GPU kernels take; known without loading them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from specattn_kernels.calls import AttentionCall, Call
from specattn_kernels.devices import Device

# Hopper: later GPUs have other matrix instructions.
CAPABILITY = (9, 0)
BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128)
# Of prefill, with the slots of its tiles.
PREFILL_TILE_SLOTS = {64: 128, 128: 128, 256: 64}
DTYPES = ("bfloat16", "float16")
# Rows of one matrix instruction; T * G query rows are padded to them.
QUERY_ROWS = 64
# Shared memory is written in groups of this many rows, and a copy begins at the first row of a group.
ALIGNMENT = 8
# Slots of one tile, unless a block is larger: the logits of more would not leave room in the registers.
TILE_SLOTS = 64


def refuse_device(device: Device) -> str | None:
    """Why the kernels cannot run compiled on a GPU; None if they can."""
    if device.compute_capability == CAPABILITY:
        return None
    this = "another" if device.compute_capability is None else "one of {}.{}".format(*device.compute_capability)
    return f"it needs a GPU of compute capability 9.0 (Hopper), this is {this}"


def refuse_call(call: Call) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    if not isinstance(call, AttentionCall):
        return None
    slots, head_dim = call.cache[2:]
    dtype = jnp.dtype(call.dtype).name
    queries = dtype if call.query_dtype is None else jnp.dtype(call.query_dtype).name
    prefill = call.op == "prefill_attention"
    head_dims = tuple(PREFILL_TILE_SLOTS) if prefill else HEAD_DIMS
    if call.scores:
        return "it returns no scores; expected return_scores=False"
    if dtype not in DTYPES:
        return f"dtype {dtype}; expected {_listed(DTYPES)}"
    if queries != dtype:
        return f"queries in {queries} over a cache in {dtype}; expected one dtype"
    if head_dim not in head_dims:
        return f"head dim {head_dim}; expected {_listed(head_dims)}"
    block_size = PREFILL_TILE_SLOTS[head_dim] if prefill else call.block_size or TILE_SLOTS
    if block_size not in BLOCK_SIZES:
        return f"block_size {block_size}; expected block_size at least 16, one of {_listed(BLOCK_SIZES)}"
    if slots % ALIGNMENT or slots < block_size:
        return f"{slots} cache slots; expected a multiple of {ALIGNMENT}, and at least one block of {block_size}"
    if call.query_rows > QUERY_ROWS and not prefill:
        return f"{call.query_rows} query rows per kv head (new tokens times group); expected at most {QUERY_ROWS}"
    return None


def _listed(values: tuple[Any, ...]) -> str:
    """As words: `1, 2 or 3`."""
    return " or ".join([", ".join(map(str, values[:-1])), str(values[-1])])
