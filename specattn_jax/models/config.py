"""Frozen descriptions of models and of what one run does: plain data, hashable, static under jit."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from specattn_jax.errors import UserError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Attributes:
        kind: `linear` divides every frequency by `factor`; `llama3` divides only the low frequencies, with a smooth
            transition between two wavelengths (Llama 3.1); `yarn` likewise, between two channels, and scales the
            attention logits besides (Peng et al. 2023).
        factor: how much longer the context becomes.
        low_freq_factor: `llama3` only. Wavelengths above `original_context / low_freq_factor` are fully stretched.
        high_freq_factor: `llama3` only. Wavelengths below `original_context / high_freq_factor` are left alone.
        original_context: `llama3` and `yarn`. Context length before the stretch, in tokens.
        beta_fast: `yarn` only. Frequencies that turn more often than this in the original context are left alone.
        beta_slow: `yarn` only. Frequencies that turn less often than this are fully stretched.
        attention_factor: `yarn` only. Multiplies rotated queries and keys alike.
        truncate: `yarn` only. Whether the ends of the transition are rounded to whole channels.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of one decoder of the Llama family. Axis letters as in the glossary of `types.py`.

    Attributes:
        family: architecture; decides names in files and, for `llama` GGUF files, the row order of q and k.
        vocab_size: V, rows of the embedding (padded vocabularies included).
        embed_dim: D.
        num_layers: L.
        num_heads: N query heads.
        num_kv_heads: K; G = N / K query heads share one.
        head_dim: H.
        mlp_dim: F, width of the gated MLP.
        max_context: longest sequence the model was made for, in tokens (a sliding window counts as the limit).
        rope_theta: base of the rotary frequencies.
        rope_scaling: stretch of the rotary frequencies, or None.
        norm_eps: epsilon of every RMS norm.
        tie_embeddings: whether the output matrix is the embedding.
        qkv_bias: whether q, k and v have a bias (Qwen2).
        out_bias: whether the output projection of attention has one (Llama with `attention_bias`).
        qk_norm: whether q and k are RMS-normalised per head (Qwen3).
    """

    family: Family
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_context: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_context",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"Model configuration: {name} is {value!r}; expected a whole number of at least 1.")
        for name in ("rope_theta", "norm_eps"):
            number = getattr(self, name)
            if not isinstance(number, (int, float)) or not 0 < number < float("inf"):
                raise UserError(f"Model configuration: {name} is {number!r}; expected a positive number.")
        if self.family not in get_args(Family):
            raise UserError(f"Model configuration: family is {self.family!r}; expected one of {get_args(Family)}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"Model configuration: num_heads is {self.num_heads}, which is not a multiple of num_kv_heads, "
                f"{self.num_kv_heads}; each kv head must serve the same number of query heads."
            )
        if self.head_dim % 2:
            raise UserError(f"Model configuration: head_dim is {self.head_dim}; rotary embedding needs an even number.")

    @property
    def group_size(self) -> int:
        """G, query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    def cache_bytes(self, batch: int, slots: int, itemsize: int) -> int:
        """Bytes of the KV cache for `batch` sequences of `slots` entries."""
        return 2 * self.num_layers * batch * self.num_kv_heads * slots * self.head_dim * itemsize

    def activation_bytes(self, itemsize: int) -> int:
        """Bytes that a layer of a forward pass holds at once, for each token: the wider of its attention and its MLP.

        The residual stream and what is normalised, then q, k and v, rotated in float32, or the two inner halves of the
        MLP and their product.
        """
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = qkv * (2 * itemsize + 4) + self.num_heads * self.head_dim * itemsize
        return 3 * self.embed_dim * itemsize + max(attention, 3 * self.mlp_dim * itemsize)

    def parameter_count(self) -> int:
        """Number of weights, the tied output matrix counted once."""
        d, h = self.embed_dim, self.head_dim
        qkv = (self.num_heads + 2 * self.num_kv_heads) * h
        per_layer = d * qkv + self.num_heads * h * d + 3 * d * self.mlp_dim + 2 * d
        per_layer += qkv * self.qkv_bias + d * self.out_bias + 2 * h * self.qk_norm
        return self.vocab_size * d * (1 if self.tie_embeddings else 2) + self.num_layers * per_layer + d

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, the inverse of `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """Rebuilds a configuration from `to_json`'s dictionary."""
        scaling = data.get("rope_scaling")
        return cls(**{**data, "rope_scaling": RopeScaling(**scaling) if scaling else None})
