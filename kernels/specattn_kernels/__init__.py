"""Attention and selection ops for speculating sparse attention: pure functions on JAX arrays.

The ops of SpecAttn (arXiv 2510.27641) without a model around them: dense attention of a few new tokens over a KV cache,
the same over selected blocks of it, and the selection of those blocks from somebody's attention scores.
"""

from specattn_kernels.api import (
    compact_blocks,
    decode_attention,
    merge_states,
    score_cache,
    select_blocks,
    sparse_decode_attention,
    top_p_threshold,
)
from specattn_kernels.dispatch import (
    IMPLEMENTATIONS,
    Call,
    Choice,
    Device,
    Implementation,
    SelectionCall,
    choose_implementation,
    current_device,
    find_obstacle,
)
from specattn_kernels.prefill import prefill_attention
from specattn_kernels.types import AttentionOutput, Scores, SelectionPlan
from specattn_kernels.xla import plan_slots

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionOutput",
    "Call",
    "Choice",
    "Device",
    "Implementation",
    "Scores",
    "SelectionCall",
    "SelectionPlan",
    "choose_implementation",
    "compact_blocks",
    "current_device",
    "decode_attention",
    "find_obstacle",
    "merge_states",
    "plan_slots",
    "prefill_attention",
    "score_cache",
    "select_blocks",
    "sparse_decode_attention",
    "top_p_threshold",
]
