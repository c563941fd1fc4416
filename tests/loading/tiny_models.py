"""Tiny random models of every family, made with transformers, and what transformers computes with them."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

torch = pytest.importorskip("torch", reason="the oracle needs torch, which the test extra installs on Python 3.11 only")

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, LENGTH = 160, 512
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The transition lies among this model's 16 channels, and half of the test's tokens beyond the original context.
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHAPE, head_dim=32),
    "llama-tied": lambda: LlamaConfig(**{**_SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama-linear": lambda: LlamaConfig(
        **_SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "llama-llama3": lambda: LlamaConfig(
        **{**_SHAPE, "num_attention_heads": 2, "head_dim": 64}, rope_parameters=_LLAMA3
    ),
    "mistral": lambda: MistralConfig(**{**_SHAPE, "num_key_value_heads": 1}, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-yarn": lambda: Qwen2Config(**_SHAPE, rope_parameters=_YARN),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=32, tie_word_embeddings=True),
}


@functools.cache
def tiny(name: str) -> Any:
    """One model per configuration, in float32; norms and biases are random too, so that a mix-up shows."""
    torch.manual_seed(sorted(CONFIGS).index(name))
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) * 0.3 + (0 if key.endswith("bias") else 1))
    return model


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)


def reference_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))).logits.float().numpy()


def save(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and transformers about themselves
        model.save_pretrained(folder, **options)
    return folder
