"""Attention and selection ops for speculating sparse attention: pure functions on JAX arrays.

The ops of SpecAttn (arXiv 2510.27641) without a model around them: dense attention of a few new tokens over a KV cache,
the same over selected blocks of it, and the selection of those blocks from somebody's attention scores; and dense
attention of many new tokens, for prompts.
"""

from specattn_kernels.api import (
    decode_attention,
    merge_states,
    prefill_attention,
    score_cache,
    sparse_decode_attention,
)
from specattn_kernels.api_selection import compact_blocks, select_blocks, top_p_threshold
from specattn_kernels.backends import (
    ATTENTION_OPS,
    BACKENDS,
    IMPLEMENTATIONS,
    PREFILL_OPS,
    SCORE_OPS,
    SELECTION_OPS,
    Backend,
    Choice,
    Implementation,
    choose_implementation,
    compiled_implementations,
)
from specattn_kernels.calls import AttentionCall, Call, SelectionCall
from specattn_kernels.devices import Device, current_device
from specattn_kernels.split import RULES, Split, lay
from specattn_kernels.types import AttentionOutput, Scores, SelectionPlan
from specattn_kernels.xla import plan_slots

__version__ = "0.1.0"

__all__ = [
    "ATTENTION_OPS",
    "BACKENDS",
    "IMPLEMENTATIONS",
    "PREFILL_OPS",
    "RULES",
    "SCORE_OPS",
    "SELECTION_OPS",
    "AttentionCall",
    "AttentionOutput",
    "Backend",
    "Call",
    "Choice",
    "Device",
    "Implementation",
    "Scores",
    "SelectionCall",
    "SelectionPlan",
    "Split",
    "choose_implementation",
    "compact_blocks",
    "compiled_implementations",
    "current_device",
    "decode_attention",
    "lay",
    "merge_states",
    "plan_slots",
    "prefill_attention",
    "score_cache",
    "select_blocks",
    "sparse_decode_attention",
    "top_p_threshold",
]
