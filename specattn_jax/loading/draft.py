"""Draft folders: a shallow model stored without the embedding and output matrix, which it borrows from its target.

A folder holds `specattn_draft.json` (configuration, the target's reference, a fingerprint of its embedding) and
`draft.safetensors`, the other weights under Hugging Face names. As "int8", matrices are int8 with one float32 scale per
output channel (`<name>.scale`) and everything else is float32; as "bfloat16", everything is bfloat16.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int8, Shaped
from safetensors.numpy import save_file

from specattn_jax.errors import UserError
from specattn_jax.files import atomic_folder, exists, read_json, write_json
from specattn_jax.loading.hf import HFSource, tensor_names
from specattn_jax.loading.presets import preset_names
from specattn_jax.loading.tensors import AnyTensor, array_path, hf_tensors
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.transformer import LanguageModel, abstract_model

MARKER = "specattn_draft.json"
Storage = Literal["int8", "bfloat16"]

_FORMAT = 1
_WEIGHTS = "draft.safetensors"
_SCALE = ".scale"
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_SAMPLED_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class DraftInfo:
    """What `specattn_draft.json` says.

    Attributes:
        config: shape and variant of the draft.
        target: reference of the model whose embedding and output matrix it shares.
        embedding_sha256: `embedding_fingerprint` of that embedding.
        storage: how its own weights are stored.
        notes: where it comes from, for people.
    """

    config: ModelConfig
    target: str
    embedding_sha256: str
    storage: Storage
    notes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class DraftSource:
    """An opened draft folder; its tensors are its own, dequantised, and the target's.

    Attributes:
        info: what the folder says about itself.
        stored: the tensors in the folder.
        shared: reads the target's embedding or output matrix, by its Hugging Face name.
    """

    info: DraftInfo
    stored: HFSource
    shared: Callable[[str], AnyTensor]

    @property
    def origin(self) -> str:
        """The path, for messages."""
        return self.stored.origin

    @property
    def config(self) -> ModelConfig:
        """Shape and variant of the draft."""
        return self.info.config

    def names(self) -> AbstractSet[str]:
        """Hugging Face names of all tensors, the shared ones included."""
        own = {name for name in self.stored.names() if not name.endswith(_SCALE)}
        return own | ({_EMBEDDING} if self.config.tie_embeddings else {_EMBEDDING, _OUTPUT})

    def get(self, name: str) -> AnyTensor:
        """One tensor: the target's, or the draft's own, in float32 where it was stored as int8.

        Raises:
            UserError: it cannot be read, or the target's embedding is not the one that the draft was trained with.
        """
        if name not in (_EMBEDDING, _OUTPUT):
            stored = self.stored.get(name)
            return self._dequantised(name, stored) if stored.dtype == np.int8 else stored
        tensor = self.shared(name)
        if name == _EMBEDDING and embedding_fingerprint(tensor) != self.info.embedding_sha256:
            raise UserError(
                f"{self.origin}: the embedding of {self.info.target!r} is not the one that this draft was trained "
                "with; give the draft its own target, or train a draft for this one with `specattn train-draft`."
            )
        return tensor

    def _dequantised(self, name: str, stored: AnyTensor) -> AnyTensor:
        scale = self.stored.get(name + _SCALE) if name + _SCALE in self.stored.names() else None
        if scale is None or stored.ndim != 2 or scale.shape != stored.shape[:1]:
            state = "is missing" if scale is None else f"has shape {list(scale.shape)}"
            raise UserError(
                f"{self.origin}: tensor {name}{_SCALE} {state}; expected one scale per output channel of a matrix of "
                f"shape {list(stored.shape)}; copy or train the draft again."
            )
        dequantised: AnyTensor = stored.astype(np.float32) * scale.astype(np.float32)[:, None]
        return dequantised


def is_draft(folder: Path) -> bool:
    """Whether a folder was written by `save_draft`."""
    return exists(folder / MARKER)


def read_draft(folder: Path) -> DraftInfo:
    """What a draft folder says about itself.

    Raises:
        UserError: the file is broken or of another version.
    """
    file = folder / MARKER
    data = read_json(file)
    if data.get("format") != _FORMAT:
        raise UserError(
            f"{file}: format is {data.get('format')!r}; expected {_FORMAT}; use the version of specattn that wrote it, "
            "or train the draft again."
        )
    for key, kind in {"config": dict, "target": str, "embedding_sha256": str, "notes": dict}.items():
        if not isinstance(data.get(key), kind):
            raise UserError(f"{file}: {key} is {data.get(key)!r}; expected a {kind.__name__}; copy the draft again.")
    if data.get("storage") not in get_args(Storage):
        raise UserError(f"{file}: storage is {data.get('storage')!r}; expected one of {', '.join(get_args(Storage))}.")
    try:
        config = ModelConfig.from_json(data["config"])
    except (TypeError, UserError) as error:
        raise UserError(f"{file}: has no valid configuration ({error}); copy the draft again.") from error
    return DraftInfo(config, data["target"], data["embedding_sha256"], data["storage"], data["notes"])


def open_draft(folder: Path, info: DraftInfo, target: ModelConfig, shared: Callable[[str], AnyTensor]) -> DraftSource:
    """Opens a draft folder beside its target, of which it takes the configuration and a reader of shared tensors.

    Raises:
        UserError: weights are missing or truncated, or the target's embedding and output matrix do not fit the draft.
    """
    for field in ("vocab_size", "embed_dim", "tie_embeddings"):
        ours, theirs = getattr(info.config, field), getattr(target, field)
        if ours != theirs:
            raise UserError(
                f"{folder}: shares the embedding of {info.target!r}, but {field} is {ours} for the draft and {theirs} "
                "for that model; it was trained for another target."
            )
    file = folder / _WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: is missing; expected a complete draft folder; copy or train the draft again.")
    return DraftSource(info, HFSource(folder, info.config, dict.fromkeys(tensor_names(file), file)), shared)


def save_draft(
    model: LanguageModel,
    folder: Path,
    *,
    target: str,
    embedding: Shaped[np.ndarray, "V D"],
    storage: Storage,
    notes: Mapping[str, Any],
) -> None:
    """Writes a draft folder: a complete model reference wherever its target can be had.

    Args:
        model: the draft, with its target's embedding (and output matrix, where that is not the embedding).
        folder: a new or empty folder. It appears complete or not at all.
        target: reference of the target, as for `resolve`; a local path is recorded as an absolute one.
        embedding: the target's embedding.
        storage: how to store the draft's own weights.
        notes: where the draft comes from, for people; plain JSON data.

    Raises:
        UserError: the folder is not empty or cannot be written, or a weight is not finite.
        ValueError: the draft's embedding is not the target's, so that it would be lost.
    """
    fingerprint, own = embedding_fingerprint(embedding), np.asarray(model.module().embedding[...])
    if embedding_fingerprint(own) != fingerprint:
        raise ValueError("model: its embedding is not the target's; a draft folder stores none of its own.")
    tensors: dict[str, AnyTensor] = {}
    for name, tensor in hf_tensors(model):
        if name not in (_EMBEDDING, _OUTPUT):
            tensors |= _stored(name, tensor.astype(np.float32), storage)
    path = Path(target).expanduser()
    recorded = str(path.absolute()) if target not in preset_names() and path.exists() else target
    info = DraftInfo(model.config, recorded, fingerprint, storage, notes)
    with atomic_folder(folder) as work:
        save_file(tensors, work / _WEIGHTS)
        write_json(work / MARKER, {"format": _FORMAT, **dataclasses.asdict(info)})


def share_embedding(draft: LanguageModel, target: LanguageModel) -> LanguageModel:
    """The draft with the target's arrays in place of an embedding and output matrix that equal them.

    Arrays that differ are left alone, so this is right for any pair; the draft's own copies are freed with `draft`.
    """
    theirs = {array_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target.params)}

    def pick(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        other = theirs.get(array_path(path)) if array_path(path) in (("embedding",), ("output",)) else None
        if other is None or (other.shape, other.dtype) != (leaf.shape, leaf.dtype):
            return leaf
        return other if bool(jnp.array_equal(leaf, other)) else leaf

    return dataclasses.replace(draft, params=jax.tree_util.tree_map_with_path(pick, draft.params))


def limit_vocabulary(draft: LanguageModel, size: int) -> LanguageModel:
    """The draft without the ids from `size` on, which its target does not know: it can neither propose nor weigh them.

    The same model where its vocabulary is not larger.
    """
    if draft.config.vocab_size <= size:
        return draft
    smaller = abstract_model(dataclasses.replace(draft.config, vocab_size=size), draft.dtype)

    def cut(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        return leaf[:size] if array_path(path) in (("embedding",), ("output",)) else leaf

    return dataclasses.replace(smaller, params=jax.tree_util.tree_map_with_path(cut, draft.params))


def embedding_fingerprint(embedding: AnyTensor) -> str:
    """SHA-256 of an embedding's shape and of up to 1024 rows, evenly spread from first to last, as bfloat16.

    The rounding makes it the same whether the target was loaded in float32 or in bfloat16.
    """
    count = embedding.shape[0] if embedding.ndim else 0
    rows = np.linspace(0, max(count - 1, 0), min(count, _SAMPLED_ROWS)).astype(np.int64)
    sample = embedding[rows].astype(np.float32).astype(ml_dtypes.bfloat16) if count else embedding
    return hashlib.sha256(repr(tuple(embedding.shape)).encode() + sample.tobytes()).hexdigest()


def quantise(weight: Float[np.ndarray, "out in_"]) -> tuple[Int8[np.ndarray, "out in_"], Float32[np.ndarray, " out"]]:
    """Symmetric int8 per output channel: `weight` is `quantised * scale[:, None]` within half a scale."""
    scale = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale


def _stored(name: str, tensor: AnyTensor, storage: Storage) -> dict[str, AnyTensor]:
    """What is written for one tensor."""
    if not np.isfinite(tensor).all():
        raise UserError(f"draft: {name} contains NaN or infinity (training diverged); resume from a good checkpoint.")
    if storage == "bfloat16":
        return {name: tensor.astype(ml_dtypes.bfloat16)}
    if tensor.ndim != 2:
        return {name: tensor}
    quantised, scale = quantise(tensor)
    return {name: quantised, name + _SCALE: scale}
