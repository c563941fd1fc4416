"""What this process computes on, and which kernels serve a model there."""

from __future__ import annotations

from typing import Any

import jax
from specattn_kernels import (
    ATTENTION_OPS,
    SCORE_OPS,
    SELECTION_OPS,
    AttentionCall,
    Call,
    SelectionCall,
    choose_implementation,
    current_device,
)

from specattn_jax.config import ModelConfig
from specattn_jax.loading.memory import available_bytes
from specattn_jax.speculative import DecodeSettings


def describe_devices() -> list[dict[str, Any]]:
    """The devices of this process: their `kind`, and the `available_bytes` that they have left.

    Example:
        >>> [sorted(device) for device in describe_devices()]
        [['available_bytes', 'kind']]
    """
    return [{"kind": device.device_kind, "available_bytes": available_bytes(device)} for device in jax.local_devices()]


def describe_kernels(config: ModelConfig, context: int, dtype: str) -> dict[str, dict[str, str]]:
    """The backend of every op on this device, for one sequence and the default window.

    Args:
        config: of the target.
        context: tokens in its cache.
        dtype: of its cache.

    Returns:
        `name` and `reason` (half a sentence) by op.

    Example:
        >>> from specattn_jax.examples import tiny_pair
        >>> ops = describe_kernels(tiny_pair().target.config, context=1024, dtype="float32")
        >>> ops["sparse_decode_attention"]["name"]
        'xla'
    """
    cache = 1, config.num_kv_heads, context, config.head_dim
    tokens = DecodeSettings().tokens_per_window
    calls: list[Call] = [
        *(AttentionCall(op, cache, tokens, config.group_size, dtype) for op in ATTENTION_OPS + SCORE_OPS),
        *(SelectionCall(op, config.num_kv_heads, context) for op in SELECTION_OPS),
    ]
    device = current_device()
    return {call.op: choose_implementation(call, device)._asdict() for call in calls}
