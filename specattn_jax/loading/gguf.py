"""GGUF files: metadata to a configuration, quantised tensors to float32, llama.cpp's names to Hugging Face's."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np

from specattn_jax.config import Family, ModelConfig, RopeScaling
from specattn_jax.errors import UserError
from specattn_jax.loading.hf_rope import longest_context, yarn_attention_factor
from specattn_jax.loading.tensors import AnyTensor

# Mistral models call themselves "llama" in GGUF files.
_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Not a weight: it says how Llama 3.1 stretches its rotary frequencies.
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class GGUFSource:
    """An opened GGUF file.

    Attributes:
        path: the file.
        metadata: its key-value pairs.
        tensors: its tensors (`gguf.ReaderTensor`) under llama.cpp's names; their data stay in the file until read.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """The path, for messages."""
        return str(self.path)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Shape and variant of the model."""
        return _config(self)

    @functools.cached_property
    def _gguf_names(self) -> dict[str, str]:
        return {_hf_name(name): name for name in self.tensors if name != _ROPE_FACTORS}

    def names(self) -> AbstractSet[str]:
        """Hugging Face names of all tensors."""
        return self._gguf_names.keys()

    def get(self, name: str) -> AnyTensor:
        """One tensor in float32 and Hugging Face layout."""
        tensor = self.dequantised(self._gguf_names[name])
        if self.config.family == "llama" and ".q_proj." in name:
            return _unpermute(tensor, self.config.num_heads)
        if self.config.family == "llama" and ".k_proj." in name:
            return _unpermute(tensor, self.config.num_kv_heads)
        return tensor

    def dequantised(self, gguf_name: str) -> AnyTensor:
        """One tensor in float32, as it lies in the file.

        Raises:
            UserError: it is quantised in a way that we do not read.
        """
        from gguf.quants import dequantize

        tensor = self.tensors[gguf_name]
        if tensor.tensor_type.name not in _QUANTISATIONS:
            raise UserError(
                f"{self.path}: tensor {gguf_name} is quantised as {tensor.tensor_type.name}; expected one of "
                f"{', '.join(_QUANTISATIONS)}; choose another quantisation of this model."
            )
        result: AnyTensor = dequantize(tensor.data, tensor.tensor_type)
        return result


def open_gguf(path: Path) -> GGUFSource:
    """Reads names, shapes and metadata of a GGUF file, not its weights.

    Raises:
        UserError: the file is missing, not GGUF, truncated or corrupt.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a GGUF file.") from error
    if magic != b"GGUF":
        raise UserError(f"{path}: starts with {magic!r}; expected a GGUF file, which starts with b'GGUF'.")
    try:
        reader = reader_class()(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    # What the library raises on bytes that make no sense; our reader raises EOFError past the end.
    except (ValueError, KeyError, IndexError, EOFError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: is truncated or corrupt ({path.stat().st_size:,} bytes; {error}); download it again."
        ) from error
    return GGUFSource(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


@functools.cache
def reader_class() -> type:
    """`gguf.GGUFReader`, checked against reading past the end and three times faster."""
    from gguf import GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        data: Any

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if isinstance(self.data, np.memmap):
                # Slicing a plain array is much cheaper than slicing a memmap, and a vocabulary takes 200,000 slices.
                self.data = self.data.view(np.ndarray)
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > self.data.nbytes:
                raise EOFError(f"its contents say that it goes on to byte {end:,}")
            return super()._get(offset, dtype, count, override_order)

    return Reader


def _hf_name(name: str) -> str:
    """The Hugging Face name of a tensor; an unknown one is kept, for the loader to complain about."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        return name
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _unpermute(rows: AnyTensor, heads: int) -> AnyTensor:
    """Undoes llama.cpp's row order: it rotates neighbouring channels, Hugging Face channels half a head apart."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _config(source: GGUFSource) -> ModelConfig:
    """The configuration, from the metadata under the architecture's prefix."""
    arch = source.metadata.get("general.architecture")
    if arch not in _FAMILIES:
        raise UserError(
            f"{source.path}: architecture is {arch!r}; expected one of {', '.join(_FAMILIES)} "
            "(Mistral is stored as llama)."
        )

    def value(key: str, default: Any = None) -> Any:
        return source.metadata.get(f"{arch}.{key}", default)

    def required(key: str) -> Any:
        found = value(key)
        if found is None:
            raise UserError(f"{source.path}: metadata {arch}.{key} is missing; download or convert the file again.")
        if not isinstance(found, int | float) or found <= 0:
            raise UserError(f"{source.path}: metadata {arch}.{key} is {found!r}; expected a positive number.")
        return found

    if "token_embd.weight" not in source.tensors:
        raise UserError(f"{source.path}: tensor token_embd.weight is missing; expected a complete language model.")
    heads, embed_dim, context = (
        required(f"{key}") for key in ("attention.head_count", "embedding_length", "context_length")
    )
    head_dim = value("attention.key_length", embed_dim // heads)
    _check_variant(source, arch, head_dim)
    scaling = _rope_scaling(source, arch, head_dim)
    context = longest_context(context, scaling)
    return ModelConfig(
        family=_FAMILIES[arch],
        vocab_size=int(source.tensors["token_embd.weight"].shape[-1]),
        embed_dim=embed_dim,
        num_layers=required("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=required("feed_forward_length"),
        max_context=min(context, value("attention.sliding_window") or context),
        rope_theta=_tidy(value("rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        norm_eps=_tidy(required("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in source.tensors,
        qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
    )


def _tidy(value: float) -> float:
    """The decimal number that was meant: the file holds float32, in which 1e-5 reads 9.99999974e-06."""
    return float(f"{value:.7g}")


def _check_variant(source: GGUFSource, arch: str, head_dim: int) -> None:
    """Refuses members of a known architecture that compute something else."""
    if source.metadata.get(f"{arch}.expert_count", 0):
        raise UserError(f"{source.path}: is a mixture of experts; expected a dense {arch} model.")
    for key in ("rope.dimension_count", "attention.value_length"):
        found = source.metadata.get(f"{arch}.{key}", head_dim)
        if found != head_dim:
            raise UserError(
                f"{source.path}: metadata {arch}.{key} is {found}; expected the head width, {head_dim}; "
                "this variant of the architecture is not supported."
            )


def _rope_scaling(source: GGUFSource, arch: str, head_dim: int) -> RopeScaling | None:
    if _ROPE_FACTORS in source.tensors:
        return _llama3_scaling(source, arch, head_dim)
    kind = source.metadata.get(f"{arch}.rope.scaling.type", "none")
    # Files of 2023 name the linear factor alone.
    factor = source.metadata.get(f"{arch}.rope.scaling.factor", source.metadata.get(f"{arch}.rope.scale_linear"))
    if kind == "linear" or (kind == "none" and f"{arch}.rope.scale_linear" in source.metadata):
        if not factor:
            raise UserError(f"{source.path}: rope scaling is linear without a factor; convert the file again.")
        return RopeScaling("linear", _tidy(factor)) if factor != 1 else None
    if kind == "yarn":
        return _yarn_scaling(source, arch)
    if kind != "none":
        raise UserError(f"{source.path}: rope scaling is {kind!r}; expected none, linear, yarn or Llama 3.1's.")
    return None


def _yarn_scaling(source: GGUFSource, arch: str) -> RopeScaling:
    prefix = f"{arch}.rope.scaling."
    said = {key.removeprefix(prefix): value for key, value in source.metadata.items() if key.startswith(prefix)}
    known = {"type", "finetuned", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"}
    if unknown := sorted(said.keys() - known):
        raise UserError(f"{source.path}: metadata {prefix}{unknown[0]} is not supported; expected plain yarn scaling.")
    factor, original = said.get("factor"), said.get("original_context_length")
    if not factor or not original:
        raise UserError(f"{source.path}: rope scaling is yarn without factor or original context; convert it again.")
    return RopeScaling(
        "yarn",
        _tidy(factor),
        original_context=int(original),
        beta_fast=_tidy(said.get("yarn_beta_fast", 32.0)),
        beta_slow=_tidy(said.get("yarn_beta_slow", 1.0)),
        attention_factor=yarn_attention_factor(_tidy(factor)),
    )


def _llama3_scaling(source: GGUFSource, arch: str, head_dim: int) -> RopeScaling | None:
    """Llama 3.1's stretch, which the file holds as one divisor per frequency.

    Every published model uses low and high frequency factors 1 and 4 over 8,192 tokens; only the stretch differs, and
    the lowest frequency has all of it. Divisors of any other form are refused rather than approximated.
    """
    divisors = source.dequantised(_ROPE_FACTORS)
    factor = _tidy(float(divisors.max()))
    if factor == 1:
        return None
    scaling = RopeScaling("llama3", factor)
    theta = _tidy(source.metadata.get(f"{arch}.rope.freq_base", 10000.0))
    frequencies = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
    turns = scaling.original_context * frequencies / (2 * np.pi)
    keep = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    if divisors.shape != keep.shape or not np.allclose(1 / divisors, keep + (1 - keep) / factor, rtol=1e-3):
        raise UserError(f"{source.path}: tensor {_ROPE_FACTORS} does not hold Llama 3.1's rope scaling; not supported.")
    return scaling
