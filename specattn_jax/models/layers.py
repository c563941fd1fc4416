"""Building blocks of the decoder: RMS norm, rotary embedding, grouped-query attention projections, gated MLP.

Weights that are read together lie together: q, k and v of one kv group in one array (so that a mesh can split them
along K), the gate and up projections in another. Each says its axes beside its shape; `sharding.py` places it by them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from specattn_jax.models.config import ModelConfig, RopeScaling

_INIT = nnx.initializers.normal(stddev=0.02)


class Keys:
    """Random keys, the same as those of `nnx.Rngs`, which traces a model of many layers in quadratic time."""

    def __init__(self, key: PRNGKeyArray) -> None:
        self._key = key
        self._drawn = 0

    def draw(self) -> PRNGKeyArray:
        """Another key."""
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn - 1)


class Rotation(NamedTuple):
    """Cosine and sine of every rotary angle of one call."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotary_frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Angular frequency per pair of channels, float32 `[H / 2]`, with the model's stretch applied.

    Source: Su et al. 2021 (RoPE); the `llama3` stretch is the one published with Llama 3.1; `yarn` is Peng et al. 2023.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "yarn":
        first, last = _yarn_range(config, scaling)
        keep = 1.0 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / (last - first), 0.0, 1.0)
    else:
        turns = scaling.original_context * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * stretched


def _yarn_range(config: ModelConfig, scaling: RopeScaling) -> tuple[float, float]:
    """The channels between which the stretch sets in: there, a frequency turns `beta` times in the original context."""

    def channel(turns: float) -> float:
        wavelengths = scaling.original_context / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    # Apart by a little, where they meet.
    return first, last if first != last else last + 0.001


def rotation(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotation:
    """Rotary angles at the given positions, in float32, times yarn's factor where the model has one."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config)
    scale = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(x: Float[Array, "B T heads H"], by: Rotation) -> Float[Array, "B T heads H"]:
    """Rotates channel `i` against channel `i + H / 2` (the layout of Hugging Face checkpoints)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((width,), dtype), axes="width")
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises `x`; the result has its dtype."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse).astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    """Projections around grouped-query attention; what is attended is decided by the caller."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, keys: Keys) -> None:
        d, k, g, h = config.embed_dim, config.num_kv_heads, config.group_size, config.head_dim
        self.group_size = g
        # Per kv group: its G query heads, then its key, then its value.
        self.qkv = nnx.Param(_INIT(keys.draw(), (d, k, g + 2, h), dtype), axes="D K G+2 H")
        self.qkv_bias = nnx.Param(jnp.zeros((k, g + 2, h), dtype), axes="K G+2 H") if config.qkv_bias else None
        self.out = nnx.Param(_INIT(keys.draw(), (k, g, h, d), dtype), axes="K G H D")
        self.out_bias = nnx.Param(jnp.zeros((d,), dtype), axes="D") if config.out_bias else None
        self.q_norm = RMSNorm(h, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.norm_eps, dtype=dtype) if config.qk_norm else None

    def project(
        self, x: Float[Array, "B T D"], by: Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries and keys (normalised where the model does, and rotated) and values of the T tokens."""
        weight = self.qkv[...]
        d, k, per_group, h = weight.shape
        mixed = (x @ weight.reshape(d, -1)).reshape(*x.shape[:2], k, per_group, h)
        if self.qkv_bias is not None:
            mixed = mixed + self.qkv_bias[...]
        q = mixed[..., : self.group_size, :].reshape(*x.shape[:2], k * self.group_size, h)
        key, value = mixed[..., self.group_size, :], mixed[..., self.group_size + 1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, key = self.q_norm(q), self.k_norm(key)
        return rotate(q, by), rotate(key, by), value

    def merge(self, attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Output projection of the attended values."""
        weight = self.out[...]
        merged = attended.reshape(*attended.shape[:2], -1) @ weight.reshape(-1, weight.shape[-1])
        return merged if self.out_bias is None else merged + self.out_bias[...]


class MLP(nnx.Module):
    """SiLU-gated feed-forward."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, keys: Keys) -> None:
        d, f = config.embed_dim, config.mlp_dim
        self.gate_up = nnx.Param(_INIT(keys.draw(), (d, 2, f), dtype), axes="D 2 F")
        self.down = nnx.Param(_INIT(keys.draw(), (f, d), dtype), axes="F D")

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(silu(gate(x)) * up(x))`."""
        # Not as one matrix: a mesh that splits F could not tell which of its columns are where.
        mixed = jnp.einsum("btd,dif->btif", x, self.gate_up[...])
        return (jax.nn.silu(mixed[:, :, 0]) * mixed[:, :, 1]) @ self.down[...]


class Block(nnx.Module):
    """One pre-norm decoder layer, in two halves so that the caller can attend in between."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, keys: Keys) -> None:
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, keys=keys)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, keys=keys)

    def before(
        self, x: Float[Array, "B T D"], by: Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values of this layer."""
        return self.attention.project(self.attention_norm(x), by)

    def after(self, x: Float[Array, "B T D"], attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The residual stream after attention and MLP."""
        x = x + self.attention.merge(attended)
        return x + self.mlp(self.mlp_norm(x))
