"""A target, its draft, their tokenizer and their alignment: what every command works on."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from specattn_jax.calibration.calibrate import calibrate, save_calibration
from specattn_jax.calibration.passages import CalibrationSettings
from specattn_jax.errors import UserError
from specattn_jax.loading.draft import limit_vocabulary, share_embedding
from specattn_jax.loading.memory import check_memory
from specattn_jax.loading.presets import get_preset, preset_names
from specattn_jax.loading.resolve import draft_reference, load_model, resolve
from specattn_jax.loading.tensors import Progress
from specattn_jax.loading.tokenizer import Tokenizer, check_compatible
from specattn_jax.models.sharding import device_weight_bytes, make_mesh, place, split_draft, split_target
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.selection.alignment import Alignment, join_alignments, load_alignment
from specattn_jax.selection.policy import load_policy
from specattn_jax.texts import by_kind, read_text

# Stands in a draft's place where the target is alone.
NO_DRAFT = "none"
DTYPES = ("auto", "float32", "bfloat16")
Text: TypeAlias = str | Path | Sequence[int]


@dataclasses.dataclass(frozen=True)
class ModelPair:
    """Two models that speak one vocabulary.

    Attributes:
        target_name: how the target was asked for.
        draft_name: how the draft was asked for.
        target: the model whose output is wanted.
        draft: the model that proposes tokens; the target itself in a diagnosis; None where there is none.
        tokenizer: shared by both.
        alignment: how the draft's attention predicts the target's; None where none was made yet.
    """

    target_name: str
    draft_name: str
    target: LanguageModel
    draft: LanguageModel | None
    tokenizer: Tokenizer
    alignment: Alignment | None

    @property
    def name(self) -> str:
        """Both names, to say which pair is meant."""
        return f"{self.target_name} + {self.draft_name}"

    def need_draft(self) -> LanguageModel:
        """The draft, for what cannot do without one.

        Raises:
            UserError: there is none.
        """
        if self.draft is None:
            raise UserError(
                f"draft is {NO_DRAFT!r}, but this needs one beside {self.target_name}; name a draft model, or 'self'."
            )
        return self.draft

    def calibrate(
        self,
        documents: Sequence[Text] | Mapping[str, Sequence[Text]],
        *,
        out: Path | None = None,
        policy: str = "default",
        settings: CalibrationSettings | Sequence[CalibrationSettings] | None = None,
        provenance: Mapping[str, object] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> ModelPair:
        """The same pair with an alignment fitted on text; see `calibration.calibrate`.

        Args:
            documents: texts, files with texts, or token ids; at least one as long as the settings' context. Given by
                kind, all kinds are read equally.
            out: folder to write the alignment and its heat-map to; `load_pair` takes it as `alignment`.
            policy: the policy preset for which budgets are fitted.
            settings: what to read of the documents. Several are of different lengths: caches in between get what lies
                between.
            provenance: noted in the artifact besides, or instead of, the names of the models and files.
            progress: told the stage, steps done and steps in all.

        Raises:
            UserError: the documents are too short, a file cannot be read, or `out` is taken or cannot be written.

        Example:
            >>> from specattn_jax.calibration.passages import CalibrationSettings
            >>> from specattn_jax.examples import tiny_pair
            >>> from specattn_jax.texts import find_text
            >>> settings = CalibrationSettings(context=128, passages=2, windows=4)  # for real models leave this out
            >>> pair = tiny_pair().calibrate([find_text("northanger_abbey")], settings=settings)
            >>> pair.alignment.weights.shape  # 4 target layers of 2 kv heads, and as many draft heads
            (8, 8)
        """
        kinds = by_kind(documents)
        names = [document.name for texts in kinds.values() for document in texts if isinstance(document, Path)]
        notes = {"target": self.target_name, "draft": self.draft_name, "texts": names, **(provenance or {})}
        encoded = {kind: [self.encode(document) for document in texts] for kind, texts in kinds.items()}
        every = settings if isinstance(settings, Sequence) else [settings]
        fitted = [
            calibrate(
                self.target,
                self.need_draft(),
                encoded,
                load_policy(policy),
                settings=one,
                provenance=notes,
                progress=progress,
            )
            for one in every
        ]
        alignment = join_alignments([one for one, _ in fitted])
        if out is not None:
            # The picture is that of the first.
            save_calibration(Path(out), alignment, fitted[0][1])
        return dataclasses.replace(self, alignment=alignment)

    def encode(self, document: str | Path | Sequence[int]) -> Sequence[int]:
        """Token ids of a text, or of a file with one, without a begin token; ids stay as they are.

        Raises:
            UserError: the file cannot be read.

        Example:
            >>> from specattn_jax.examples import tiny_pair
            >>> tiny_pair().encode("Call me")
            [34, 64, 75, 75, 220, 76, 68]
        """
        text = read_text(document) if isinstance(document, Path) else document
        return self.tokenizer.encode(text, add_special=False) if isinstance(text, str) else text


def choose_dtype(name: str) -> jnp.dtype:
    """Dtype of weights and caches: `auto` is bfloat16 on an accelerator and float32 on a CPU.

    Raises:
        UserError: the name is unknown.
    """
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}.")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_pair(
    target: str = "smollm2",
    draft: str = "default",
    *,
    alignment: str | Path | None = "default",
    dtype: str = "auto",
    mesh: str | Mesh | None = None,
    progress: Progress | None = None,
) -> ModelPair:
    """Loads a model pair.

    Args:
        target: a preset, a local Hugging Face folder, a `.gguf` file, an Orbax folder, or a hub id.
        draft: likewise; `default` is the preset's own draft, `none` loads the target alone, `self` drafts with the
            target's weights (a diagnosis).
        alignment: folder made by `specattn calibrate`; `default` is the one shipped with a preset, or none.
        dtype: `auto`, `float32` or `bfloat16`.
        mesh: devices that share the work, such as "data=2,heads=4" or a `jax.sharding.Mesh` with these axes; each gets
            its part of the weights while they are read. Without it the first device does everything.
        progress: told about downloads and loading.

    Raises:
        UserError: a reference cannot be resolved or loaded, the two tokenizers differ, or the mesh does not fit.

    Example:
        >>> pair = load_pair("smollm2")  # the first time it downloads the target
        >>> pair.target.config.num_layers, pair.draft.config.num_layers, pair.alignment is not None
        (30, 7, True)
    """
    kind = choose_dtype(dtype)
    target_files = resolve(target, progress)
    unknown = split = draft_split = None
    if mesh is not None:
        mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
        split = split_target(mesh, target_files.config, target)
    if draft == NO_DRAFT:
        if alignment not in (None, "default"):
            raise UserError(f"alignment is {alignment}, but draft is {NO_DRAFT!r}; leave one of them out.")
        model, tokenizer = load_model(target_files, dtype=kind, progress=progress, split=split)
        return ModelPair(target, draft, model, None, tokenizer, None)
    draft_files = resolve(draft_reference(draft, target), progress)
    shared = draft_files.path == target_files.path
    if split is not None:
        draft_split = split if shared else split_draft(split.mesh, draft_files.config, kind.itemsize)
    if not shared:
        if draft_files.target is None or draft_files.target.path != target_files.path:
            unknown = check_compatible(draft_files.tokenizer(), target_files.tokenizer())
        check_memory(
            {
                "target weights": device_weight_bytes(target_files.config, kind, split),
                "draft weights": device_weight_bytes(draft_files.config, kind, draft_split),
            }
        )
    target_model, tokenizer = load_model(target_files, dtype=kind, progress=progress, split=split)
    draft_model = target_model
    if not shared:
        draft_model = load_model(draft_files, dtype=kind, progress=progress, split=draft_split)[0]
        draft_model = place(share_embedding(draft_model, target_model), draft_split)
    if unknown is not None:
        draft_model = place(limit_vocabulary(draft_model, unknown), draft_split)
    folder = shipped_alignment(target, shared) if alignment == "default" else alignment
    loaded = None if folder is None else load_alignment(Path(folder))
    if loaded is not None:
        check_alignment(loaded, target_model, draft_model)
    return ModelPair(target, draft, target_model, draft_model, tokenizer, loaded)


def shipped_alignment(target: str, shared: bool) -> Path | None:
    """Folder of the alignment shipped for a preset with its own draft, or with itself (`<name>-self`), if any."""
    if target not in preset_names():
        return None
    name = f"{target}-self" if shared else get_preset(target).alignment
    folder = Path(str(importlib.resources.files("specattn_jax"))) / "data" / "alignments" / str(name)
    return folder if folder.is_dir() else None


def check_alignment(alignment: Alignment, target: LanguageModel, draft: LanguageModel) -> None:
    """Refuses an alignment made for models of another shape.

    Raises:
        UserError: number of layers, kv heads or sources differ.
    """
    per_layer = {"head": draft.config.num_heads, "kv_head": draft.config.num_kv_heads, "layer": 1}
    rows = target.config.num_layers * target.config.num_kv_heads
    wanted = (rows, draft.config.num_layers * per_layer[alignment.granularity])
    mapped = len(alignment.layer_map) == target.config.num_layers and max(alignment.layer_map) < draft.config.num_layers
    if alignment.weights.shape != wanted or not mapped:
        raise UserError(
            f"alignment: it maps {alignment.weights.shape[1]} draft sources to {alignment.weights.shape[0]} target kv "
            f"heads, but this pair has {wanted[1]} and {wanted[0]}; calibrate this pair with `specattn calibrate`."
        )
