"""Hugging Face folders: config.json with safetensors, one file or shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specattn_jax.errors import UserError
from specattn_jax.files import LFS_POINTER, atomic_folder, is_lfs_pointer, read_json, write_json
from specattn_jax.loading.hf_config import hf_config, read_hf_config
from specattn_jax.loading.memory import weight_bytes
from specattn_jax.loading.tensors import AnyTensor, hf_tensors
from specattn_jax.loading.tokenizer import Tokenizer
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import LanguageModel

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 4 << 30
_COMPARED_ROWS = 8192
_FIRST_OUT_BIAS = "model.layers.0.self_attn.o_proj.bias"
_PREFIX, _EMBEDDING, _OUTPUT = "model.", "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class HFSource:
    """An opened Hugging Face folder.

    Attributes:
        path: the folder.
        config: shape and variant of the model.
        files: which file holds each tensor.
        missing_prefix: what the names in the files lack ("model.", where transformers' model without its head was
            saved).
    """

    path: Path
    config: ModelConfig
    files: Mapping[str, Path]
    missing_prefix: str = ""

    @property
    def origin(self) -> str:
        """The path, for messages."""
        return str(self.path)

    def names(self) -> AbstractSet[str]:
        """Names of all tensors."""
        return self.files.keys()

    def get(self, name: str) -> AnyTensor:
        """One tensor, in the dtype of the file."""
        file = self.files[name]
        try:
            with safe_open(file, framework="numpy") as opened:
                tensor: AnyTensor = opened.get_tensor(name.removeprefix(self.missing_prefix))
                return tensor
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: tensor {name} cannot be read ({error}); download the file again.") from error


def open_hf(folder: Path) -> HFSource:
    """Reads the configuration of a folder and the names of its tensors, not the weights.

    Raises:
        UserError: the configuration is not supported; weights are missing, truncated or in another format.
    """
    config = read_hf_config(folder)
    files = _tensor_files(folder)
    prefix = "" if any(name.startswith(_PREFIX) for name in files) else _PREFIX
    if prefix + _EMBEDDING.removeprefix(_PREFIX) in files:
        prefix = ""
    source = HFSource(folder, config, {prefix + name: file for name, file in files.items()}, prefix)
    return dataclasses.replace(source, config=_as_stored(source))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor. Where both stand there, transformers takes the single file, not the index."""
    if (folder / _SINGLE).is_file():
        return dict.fromkeys(tensor_names(folder / _SINGLE), folder / _SINGLE)
    if (folder / _INDEX).is_file():
        return _sharded(folder)
    if any(folder.glob("pytorch_model*.bin*")):
        raise UserError(
            f"{folder}: has its weights in pytorch_model.bin; expected safetensors; load and save it once with "
            "transformers (save_pretrained), or download the safetensors revision."
        )
    raise UserError(f"{folder}: has no {_SINGLE} and no {_INDEX}; expected a Hugging Face folder with its weights.")


def _sharded(folder: Path) -> dict[str, Path]:
    """Where each tensor is; every shard that the index names is opened once to see that it is there and whole.

    What counts is what the shards hold: an index may name a tied output matrix that was not written.
    """
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(
            f"{folder / _INDEX}: has no weight_map; expected the index of a sharded model; download it again."
        )
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise UserError(
            f"{folder}: {absent[0]} is missing ({len(absent)} of {len(shards)} shards are); download the model again."
        )
    return {name: folder / shard for shard in shards for name in tensor_names(folder / shard)}


def _as_stored(source: HFSource) -> ModelConfig:
    """The configuration with what the file decides.

    As in transformers, an output matrix of its own goes before a tie, and a bias that nobody wrote is none.

    Raises:
        UserError: a tensor is of a type that nobody computes with as it is.
    """
    types = _stored_types(source)
    for name, kind in types.items():
        if kind.startswith("F8"):
            raise UserError(
                f"{source.files[name]}: tensor {name} is stored as {kind} (fp8), which is not supported; use the "
                "bfloat16 model or a GGUF file."
            )
    config = source.config
    if config.tie_embeddings and _OUTPUT in source.files and not _equal(source, _EMBEDDING, _OUTPUT):
        config = dataclasses.replace(config, tie_embeddings=False)
    if config.out_bias and _FIRST_OUT_BIAS not in source.files:
        config = dataclasses.replace(config, out_bias=False)
    return config


def _stored_types(source: HFSource) -> dict[str, str]:
    """The type of every tensor, as safetensors calls it, from the headers of the files."""
    types = {}
    for file in set(source.files.values()):
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                types[source.missing_prefix + name] = str(opened.get_slice(name).get_dtype())
    return types


def _equal(source: HFSource, one: str, other: str) -> bool:
    """Whether two tensors of a folder are the same, read piece by piece."""
    if one not in source.files:
        return False
    with safe_open(source.files[one], "numpy") as first, safe_open(source.files[other], "numpy") as second:
        a = first.get_slice(one.removeprefix(source.missing_prefix))
        b = second.get_slice(other.removeprefix(source.missing_prefix))
        if (a.get_shape(), a.get_dtype()) != (b.get_shape(), b.get_dtype()):
            return False
        rows = a.get_shape()[0]
        return all(
            np.array_equal(a[start : min(start + _COMPARED_ROWS, rows)], b[start : min(start + _COMPARED_ROWS, rows)])
            for start in range(0, rows, _COMPARED_ROWS)
        )


def tensor_names(file: Path) -> set[str]:
    """Names of the tensors in a safetensors file.

    Raises:
        UserError: it is truncated or something else.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(file):
            raise UserError(f"{file}: {LFS_POINTER}") from error
        raise UserError(
            f"{file}: is truncated or no safetensors file ({file.stat().st_size:,} bytes; {error}); download it again."
        ) from error


def save_hf(model: LanguageModel, tokenizer: Tokenizer, out_dir: Path, *, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes a folder that transformers loads with `AutoModelForCausalLM` and `AutoTokenizer`.

    Args:
        model: the model; its weights are written in the dtype that they have.
        tokenizer: its tokenizer.
        out_dir: a new or empty folder. It appears complete or not at all.
        shard_bytes: largest size of one file of weights.

    Raises:
        UserError: the folder is not empty or cannot be written.
    """
    with atomic_folder(out_dir, needed=weight_bytes(model.config, model.dtype)) as work:
        write_json(work / "config.json", hf_config(model.config, model.dtype.name))
        tokenizer.save(work)
        _write_weights(model, work, shard_bytes)


def _write_weights(model: LanguageModel, folder: Path, shard_bytes: int) -> None:
    """Writes shards as they fill up, so that the weights are never in host memory twice."""
    shards: list[list[str]] = []
    waiting: dict[str, AnyTensor] = {}
    total = 0

    def flush() -> None:
        # transformers asks for this metadata; "pt" says that matrices are [out, in].
        save_file(waiting, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in hf_tensors(model):
        if waiting and sum(held.nbytes for held in waiting.values()) + tensor.nbytes > shard_bytes:
            flush()
        waiting[name] = np.asarray(tensor)
        total += tensor.nbytes
    flush()
    _name_shards(folder, shards, total)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
