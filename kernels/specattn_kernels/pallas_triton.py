"""NVIDIA GPU kernels through Pallas's Triton lowering.

On a CPU they run in Pallas's interpreter: slow, and for tests only.
"""

from specattn_kernels.pallas_triton_attention import decode_attention, sparse_decode_attention
from specattn_kernels.pallas_triton_scores import score_cache
from specattn_kernels.pallas_triton_selection import compact_blocks, select_blocks, top_p_threshold

__all__ = [
    "compact_blocks",
    "decode_attention",
    "score_cache",
    "select_blocks",
    "sparse_decode_attention",
    "top_p_threshold",
]
