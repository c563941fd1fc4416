"""The tokenizer of a Hugging Face folder (also of our own folders, which keep theirs in the same files)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from specattn_jax.errors import UserError
from specattn_jax.files import read_json
from specattn_jax.loading.tokenizer import ROLES, Tokenizer, import_transformers, make_tokenizer


def hf_tokenizer(folder: Path) -> Tokenizer:
    """Reads `tokenizer.json` with what belongs to it, or lets transformers convert an older tokenizer.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.
    """
    settings = _optional(folder / "tokenizer_config.json")
    named = _optional(folder / "special_tokens_map.json") | settings
    roles = {role: _content(named.get(role)) for role in ROLES}
    return make_tokenizer(_backend(folder), roles, _end_ids(folder), _template(folder, settings))


def _backend(folder: Path) -> Backend:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _converted(folder)
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{file}: is not a readable tokenizer ({error}); download it again.") from error


def _converted(folder: Path) -> Backend:
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise UserError(f"{folder}: has no tokenizer.json; expected a model folder with its tokenizer.")
    try:
        backend: Backend = (
            import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        )
        return backend
    except Exception as error:  # depends on the tokenizer's class and on what is installed
        raise UserError(
            f"{folder}: has no tokenizer.json, and transformers cannot make one from its other files "
            f"({str(error).strip().splitlines()[0]}); download tokenizer.json too."
        ) from error


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _content(token: object) -> str | None:
    """A special token is written as a string or as an object around it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _end_ids(folder: Path) -> list[int]:
    """The ids that end a generation, as the files for generation and for the model say: one, several or none."""
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = _optional(folder / name).get("eos_token_id")
        ends += found if isinstance(found, list) else [] if found is None else [found]
    return ends


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: a file of its own (newer), or a field, which may hold several by name."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
