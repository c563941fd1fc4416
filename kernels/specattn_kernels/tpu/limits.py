"""What the TPU kernels take; known without loading them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import DTypeLike

from specattn_kernels.calls import AttentionCall, Call

LANES = 128
# Rows of a tile of 32-bit numbers.
SUBLANES = 8
DTYPES = ("float32", "bfloat16")
BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 128, 256)
# Query rows of one program: T * G.
MAX_ROWS = 256
# Scores of one kv head, which lie in vector memory as a whole.
SCORES_BYTES = 1 << 24
# Numbers of a row that is selected from.
MAX_SLOTS = 1 << 19


def sublanes(dtype: DTypeLike) -> int:
    """Rows of one tile of vector memory: 8 of 32 bits, more of narrower numbers."""
    return 32 // jnp.dtype(dtype).itemsize


def refuse_call(call: Call) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    if not isinstance(call, AttentionCall):
        if call.op != "compact_blocks" and call.blocks > MAX_SLOTS:
            return f"rows of {call.blocks} scores; expected at most {MAX_SLOTS}"
        return None
    if call.cache[3] not in HEAD_DIMS:
        return f"head dim {call.cache[3]}; expected one of {HEAD_DIMS}"
    if call.query_rows > MAX_ROWS and call.op != "prefill_attention":
        return f"{call.query_rows} query rows per kv head (new tokens times group); expected at most {MAX_ROWS}"
    return None if call.op == "score_cache" else _refuse_attention(call)


def _refuse_attention(call: AttentionCall) -> str | None:
    """What only attention asks for: whole tiles to copy by hand."""
    slots, block = call.cache[2], call.block_size or LANES
    dtype = jnp.dtype(call.dtype).name
    queries = dtype if call.query_dtype is None else jnp.dtype(call.query_dtype).name
    if not {queries, dtype} <= set(DTYPES):
        return f"dtypes {queries} and {dtype}; expected float32 or bfloat16"
    if block not in BLOCK_SIZES:
        return f"block size {block}; expected one of {BLOCK_SIZES}"
    if slots % sublanes(dtype) or slots < block:
        return f"{slots} cache slots; expected a multiple of {sublanes(dtype)} of at least {block}"
    rows = padded_rows(call.query_rows)
    if call.scores and rows * slots * 4 > SCORES_BYTES:
        return (
            f"scores of {rows} query rows over {slots} cache slots take more than {SCORES_BYTES >> 20} MiB per kv "
            "head; expected fewer new tokens"
        )
    return None


def padded_rows(query_rows: int) -> int:
    """Query rows, rounded up to whole tiles."""
    return -(-query_rows // SUBLANES) * SUBLANES
