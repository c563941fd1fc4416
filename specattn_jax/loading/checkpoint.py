"""Our own folder: weights by Orbax in our layout, with configuration and tokenizer, so that it is a complete model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import DTypeLike
from specattn_kernels import Split

from specattn_jax.errors import UserError, is_out_of_memory
from specattn_jax.files import atomic_folder, first_line, read_json, sha256, write_json
from specattn_jax.loading.memory import weight_bytes
from specattn_jax.loading.tensors import all_finite, array_path
from specattn_jax.loading.tokenizer import Tokenizer
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.sharding import weight_shardings
from specattn_jax.models.transformer import LanguageModel, abstract_model

MARKER = "specattn_model.json"
_FORMAT = 1
_WEIGHTS = "weights"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written by `save_checkpoint`."""
    return (folder / MARKER).is_file()


def read_config(folder: Path) -> ModelConfig:
    """The configuration in the marker file.

    Raises:
        UserError: the file is broken or of another version.
    """
    data = read_json(folder / MARKER)
    if data.get("format") != _FORMAT:
        raise UserError(
            f"{folder / MARKER}: format is {data.get('format')!r}; expected {_FORMAT}; use the version of specattn "
            "that wrote it, or convert the model again."
        )
    try:
        return ModelConfig.from_json(data["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MARKER}: has no valid configuration ({error}); convert the model again.") from error


def save_checkpoint(model: LanguageModel, tokenizer: Tokenizer, out_dir: Path) -> None:
    """Writes a folder that is a complete model reference.

    Args:
        model: the model; its weights are written in the dtype that they have.
        tokenizer: its tokenizer.
        out_dir: a new or empty folder. It appears complete or not at all.

    Raises:
        UserError: the folder is not empty or cannot be written, or a weight is not finite.
    """
    import orbax.checkpoint as ocp

    _check_finite(model, str(out_dir))
    with atomic_folder(out_dir, needed=weight_bytes(model.config, model.dtype)) as work:
        tokenizer.save(work)
        try:
            with ocp.StandardCheckpointer() as writer:
                writer.save(work / _WEIGHTS, _named(model.params))
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds where a disk is full
            raise UserError(
                f"{out_dir}: cannot be written ({first_line(error)[:200]}); free some room or choose another folder."
            ) from error
        marker = {"format": _FORMAT, "config": model.config.to_json(), "files": _digests(work)}
        write_json(work / MARKER, marker)


def load_checkpoint(folder: Path, dtype: DTypeLike, split: Split | None = None) -> LanguageModel:
    """Reads a folder written by `save_checkpoint`.

    Args:
        folder: the folder.
        dtype: weights are cast to it while they are read.
        split: how they are split over a mesh; each device reads its parts.

    Returns:
        The model, without a split on the default device.

    Raises:
        UserError: the folder is incomplete, damaged or of another version.
    """
    import orbax.checkpoint as ocp

    empty = abstract_model(read_config(folder), dtype)
    _check_files(folder)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    lies = {} if split is None else _named(weight_shardings(empty, split))
    wanted = {name: leaf.update(sharding=lies.get(name, here)) for name, leaf in _named(empty.params).items()}
    try:
        with ocp.StandardCheckpointer() as reader:
            weights = reader.restore((folder / _WEIGHTS).absolute(), wanted)
    except Exception as error:  # Orbax and TensorStore raise errors of many kinds for damaged files
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder}: weights cannot be read ({first_line(error)}); convert the model again.") from error
    params = jax.tree_util.tree_map_with_path(lambda path, _: weights[_name(path)], empty.params)
    model = dataclasses.replace(empty, params=params, split=split)
    _check_finite(model, str(folder))
    return model


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights."""
    files = sorted(path for path in (folder / _WEIGHTS).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _check_files(folder: Path) -> None:
    """Compares the files with the marker's list. Left to itself, Orbax reports a damaged one in dozens of lines."""
    expected, found = read_json(folder / MARKER).get("files"), _digests(folder)
    if not isinstance(expected, dict):
        raise UserError(f"{folder / MARKER}: files is {expected!r}; expected a list of files; convert the model again.")
    for name, digest in expected.items():
        if found.get(name) != digest:
            state = "is damaged (its SHA-256 is another)" if name in found else "is missing"
            raise UserError(f"{folder / name}: {state}; copy or convert the model again.")


def _check_finite(model: LanguageModel, doing: str) -> None:
    """Refuses weights that are no numbers.

    Raises:
        UserError: names the first such tensor.
    """
    for name, leaf in _named(model.params).items():
        if not all_finite(np.asarray(leaf)):
            raise UserError(f"{doing}: tensor {name} contains NaN or infinity; use or make a sound model.")


def _name(path: tuple[object, ...]) -> str:
    return ".".join(str(part) for part in array_path(path))


def _named(params: object) -> dict[str, Any]:
    """Weights by their dotted path: a flat dictionary does not depend on how Flax nests its state."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
