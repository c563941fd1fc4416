"""GGUF files: metadata to a configuration, quantised tensors to float32, llama.cpp's names to Hugging Face's."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from importlib.metadata import version as metadata_version
from pathlib import Path
from typing import Any

import numpy as np

from specattn_jax.errors import UserError
from specattn_jax.files import LFS_POINTER, is_lfs_pointer
from specattn_jax.loading.hf_rope import longest_context, yarn_attention_factor
from specattn_jax.loading.tensors import AnyTensor
from specattn_jax.models.config import Family, ModelConfig, RopeScaling

# Mistral models call themselves "llama" in GGUF files.
_FAMILIES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_MAGIC = b"GGUF"
# Models in several files are called so (gguf-split of llama.cpp).
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)?", re.IGNORECASE | re.DOTALL)

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
        path: the file, or the first of several.
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
        """One tensor in float32, as it lies in the file."""
        from gguf.quants import dequantize

        tensor = self.tensors[gguf_name]
        result: AnyTensor = dequantize(tensor.data, tensor.tensor_type)
        return result


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever it is called."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def gguf_in(folder: Path) -> Path | None:
    """The GGUF model that a folder holds, None where it holds none; of a model in several files, the first.

    Raises:
        UserError: it holds several.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf" and is_gguf(path))
    models = {(match[1] if (match := _SHARD.fullmatch(path.name)) else path.name): path for path in reversed(files)}
    if len(models) > 1:
        names = ", ".join(sorted(path.name for path in models.values()))
        raise UserError(f"{folder}: holds {len(models)} GGUF models ({names}); give the path of one of them.")
    return next(iter(models.values()), None)


def open_gguf(path: Path) -> GGUFSource:
    """Reads names, shapes and metadata of a GGUF file, not its weights; of a model in several files, of all of them.

    Args:
        path: the file, or any of several (`…-00002-of-00003.gguf`), which must lie beside each other.

    Raises:
        UserError: a file is missing, not GGUF, truncated or corrupt, or has a tensor of a type that the `gguf` library
            cannot dequantise.
    """
    paths = _shards(path)
    readers = [_open_file(each) for each in paths]
    metadata = {name: _contents(field, paths[0]) for name, field in readers[0].fields.items()}
    found = [tensor for reader in readers for tensor in reader.tensors]
    expected = metadata.get("split.tensors.count", len(found))
    if metadata.get("split.count", 1) not in (0, len(paths)) or expected != len(found):
        raise UserError(
            f"{path}: is one of {metadata.get('split.count')} files that hold {expected} tensors together, but "
            f"{len(found)} are here; expected all of them side by side, called ...-00001-of-0000N.gguf and so on."
        )
    _check_types(paths[0], found)
    return GGUFSource(paths[0], metadata, {tensor.name: tensor for tensor in found})


def _shards(path: Path) -> list[Path]:
    """All files of the model that a file belongs to, in order."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count, suffix = int(match[3]), match[4] or ""
    paths = [path.with_name(f"{match[1]}-{index:05}-of-{match[3]}{suffix}") for index in range(1, count + 1)]
    absent = [each.name for each in paths if not each.is_file()]
    if absent:
        raise UserError(
            f"{path}: is one of {count} files, but {absent[0]} is not beside it ({len(absent)} missing); expected all."
        )
    return paths


def _open_file(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a GGUF file.") from error
    if magic != _MAGIC and is_lfs_pointer(path):
        raise UserError(f"{path}: {LFS_POINTER}")
    if magic != _MAGIC:
        raise UserError(f"{path}: starts with {magic!r}; expected a GGUF file, which starts with {_MAGIC!r}.")
    try:
        return reader_class()(path)
    # What the library raises on bytes that make no sense; our reader raises EOFError past the end.
    except (ValueError, KeyError, IndexError, EOFError, OverflowError, UnicodeDecodeError) as error:
        raise _corrupt(path, error) from error


def _contents(field: Any, path: Path) -> Any:
    try:
        return field.contents()
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: is truncated or corrupt ({path.stat().st_size:,} bytes; {error}); download it again.")


def _check_types(path: Path, tensors: Iterable[Any]) -> None:
    """Refuses what the library cannot dequantise. It has no list to ask, so that one block of zeros is tried."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    first = {tensor.tensor_type: tensor.name for tensor in reversed(list(tensors))}
    for kind, name in first.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise _unreadable(path, name, kind.name) from error


def _unreadable(path: Path, tensor: str, kind: str) -> UserError:
    import gguf

    return UserError(
        f"{path}: tensor {tensor} is of type {kind}, which the installed gguf library "
        f"({metadata_version(gguf.__name__)}) does not dequantise; choose another quantisation of this model."
    )


@functools.cache
def reader_class() -> type:
    """`gguf.GGUFReader`, checked against reading past the end and unknown types, and three times faster."""
    from gguf import GGMLQuantizationType, GGUFReader

    class Reader(GGUFReader):  # type: ignore[misc]
        data: Any

        def __init__(self, path: Path, *options: Any) -> None:
            self.origin = path
            super().__init__(path, *options)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if isinstance(self.data, np.memmap):
                # Slicing a plain array is much cheaper than slicing a memmap, and a vocabulary takes 200,000 slices.
                self.data = self.data.view(np.ndarray)
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > self.data.nbytes:
                raise EOFError(f"its contents say that it goes on to byte {end:,}")
            return super()._get(offset, dtype, count, override_order)

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            known = {kind.value for kind in GGMLQuantizationType}
            for field in fields:
                kind = int(field.parts[4][0])
                if kind not in known:
                    raise _unreadable(self.origin, field.name, f"number {kind}")
            super()._build_tensors(start_offs, fields)

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
        qkv_bias=arch == "qwen2" or all(f"blk.0.attn_{letter}.bias" in source.tensors for letter in "qkv"),
        out_bias="blk.0.attn_output.bias" in source.tensors,
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
