"""Hugging Face's config.json to our configuration, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from specattn_jax.errors import UserError
from specattn_jax.files import read_json
from specattn_jax.loading.hf_rope import longest_context, parse_rope, scaling_fields
from specattn_jax.models.config import Family, ModelConfig, RopeScaling

_ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Fields that change the computation in ways that we do not follow, with the values that leave it alone.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (None, 1, 1.0),
}


def read_hf_config(folder: Path) -> ModelConfig:
    """Reads `config.json`.

    Raises:
        UserError: it is missing or broken, or describes a model that we cannot compute.
    """
    return parse_hf_config(read_json(folder / "config.json"), str(folder / "config.json"))


def parse_hf_config(data: Mapping[str, Any], origin: str) -> ModelConfig:
    """The configuration that the fields of a `config.json` describe; what may be absent has transformers' default.

    Raises:
        UserError: the architecture or one of its variants is not supported, or a field is missing. Names `origin`.
    """
    family: Any = data.get("model_type")
    if family not in get_args(Family):
        raise UserError(f"{origin}: model_type is {family!r}; expected one of {', '.join(get_args(Family))}.")
    if data.get("quantization_config") is not None:
        raise UserError(
            f"{origin}: the weights are quantised (quantization_config); expected float32, bfloat16 or float16; "
            "use the unquantised model or a GGUF file."
        )
    for key, plain in _PLAIN.items():
        if data.get(key, plain[0]) not in plain:
            raise UserError(f"{origin}: {key} is {data[key]!r}; expected {plain[0]!r}; this variant is not supported.")
    embed_dim, heads = _required(data, "hidden_size", origin), _required(data, "num_attention_heads", origin)
    theta, scaling = parse_rope(data, origin)
    # The other families do not read this field: Mistral has no biases, Qwen2 always has those of q, k and v.
    biased = family in ("llama", "qwen3") and bool(data.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=_required(data, "vocab_size", origin),
        embed_dim=embed_dim,
        num_layers=_required(data, "num_hidden_layers", origin),
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or heads,
        head_dim=data.get("head_dim") or (128 if family == "qwen3" else embed_dim // heads),
        mlp_dim=_required(data, "intermediate_size", origin),
        max_context=_max_context(data, family, scaling, origin),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(data.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(data.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or biased,
        out_bias=biased,
        qk_norm=family == "qwen3",
    )


def hf_config(config: ModelConfig, dtype_name: str) -> dict[str, Any]:
    """The `config.json` of a model, in the spelling that transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    data: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else scaling_fields(scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.out_bias or (config.qkv_bias and config.family != "qwen2"),
        "dtype": dtype_name,
    }
    # Mistral's default is a window of 4096; ours already limits max_position_embeddings.
    return data | ({"sliding_window": None} if config.family == "mistral" else {})


def _required(data: Mapping[str, Any], key: str, origin: str) -> Any:
    if key not in data:
        raise UserError(f"{origin}: {key} is missing; expected the config.json of a complete model.")
    if not isinstance(data[key], int | float) or data[key] <= 0:
        raise UserError(f"{origin}: {key} is {data[key]!r}; expected a positive number.")
    return data[key]


def _max_context(data: Mapping[str, Any], family: Family, scaling: RopeScaling | None, origin: str) -> int:
    """The longest sequence over which dense attention computes the same as the model's sliding window."""
    longest = longest_context(_required(data, "max_position_embeddings", origin), scaling)
    slides = family == "mistral" or (family in ("qwen2", "qwen3") and data.get("use_sliding_window", False))
    window: int | None = data.get("sliding_window", 4096) if slides else None
    return longest if window is None else min(longest, window)
