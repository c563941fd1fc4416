"""GGUF files written from tiny transformers models, in llama.cpp's conventions, without any of our code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantisation

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(config: Any) -> np.ndarray:
    """Likewise: the divisor of each frequency, from the wavelengths."""
    rope, head_dim = config.rope_parameters, config.head_dim
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def hf_weights(model: Any) -> dict[str, np.ndarray]:
    tied = model.config.tie_word_embeddings
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


def quantised(name: str, tensor: np.ndarray, kind: Quantisation) -> tuple[np.ndarray, Quantisation]:
    """Matrices quantised, vectors in float32, as llama.cpp does it."""
    if tensor.ndim == 1 or kind == Quantisation.F32:
        return tensor, Quantisation.F32
    return gguf.quants.quantize(tensor, kind), kind


def write_gguf(
    path: Path,
    model: Any,
    kind: Quantisation = Quantisation.F32,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    split: int = 0,
) -> Path:
    """Writes `model`; `metadata` and `tensors` (by GGUF name; None to leave one out) override what follows from it.

    With `split`, into several files of so many tensors, called after `path`.
    """
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=split)
    prefix = gguf.MODEL_ARCH_NAMES[arch]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    fields = {
        f"{prefix}.block_count": config.num_hidden_layers,
        f"{prefix}.context_length": config.max_position_embeddings,
        f"{prefix}.embedding_length": config.hidden_size,
        f"{prefix}.feed_forward_length": config.intermediate_size,
        f"{prefix}.attention.head_count": heads,
        f"{prefix}.attention.head_count_kv": kv_heads,
        f"{prefix}.attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // heads,
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{prefix}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    arrays = {} if config.rope_parameters["rope_type"] != "llama3" else {"rope_freqs.weight": llama3_divisors(config)}
    if config.rope_parameters["rope_type"] == "linear":
        fields |= {
            f"{prefix}.rope.scaling.type": "linear",
            f"{prefix}.rope.scaling.factor": float(config.rope_parameters["factor"]),
        }
    if config.rope_parameters["rope_type"] == "yarn":
        fields |= {
            f"{prefix}.rope.scaling.type": "yarn",
            f"{prefix}.rope.scaling.factor": float(config.rope_parameters["factor"]),
            f"{prefix}.rope.scaling.original_context_length": 256,
        }
    for key, value in (fields | (metadata or {})).items():
        add_field(writer, key, value)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in hf_weights(model).items():
        if arch == gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            tensor = permuted(tensor, heads if ".q_proj." in name else kv_heads)
        arrays[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    for name, tensor in (arrays | (tensors or {})).items():
        if isinstance(tensor, tuple):  # bytes that are quantised already, with their kind
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        elif tensor is not None:
            data, stored = quantised(name, tensor, kind)
            writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        adders[type(value)](key, value)


def random_blocks(rows: int, columns: int, kind: Quantisation, seed: int = 0) -> tuple[np.ndarray, Quantisation]:
    """Random bytes of a quantisation, which the library can read but not make; all that they stand for is finite."""
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    while True:
        # Bytes below 60 keep the scales (float16, or an exponent), wherever they lie, small.
        blocks = rng.integers(0, 60, (rows, columns // per_block * size), np.uint8)
        if np.isfinite(gguf.quants.dequantize(blocks, kind)).all():
            return blocks, kind
