"""The tokenizer of a Hugging Face folder (also of our own folders, which keep theirs in the same files)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from specattn_jax.errors import UserError
from specattn_jax.files import first_line, read_json
from specattn_jax.loading.tokenizer import Tokenizer, import_transformers, make_tokenizer

# Where a vocabulary may stand. Without any of them, transformers makes up an empty one for some classes.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def hf_tokenizer(folder: Path) -> Tokenizer:
    """Reads a tokenizer as transformers does, with all that the folder says about it in whichever file.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.
    """
    theirs = _auto_tokenizer(folder)
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{folder}: its tokenizer is a {type(theirs).__name__}, which has no form for the tokenizers library; "
            "download tokenizer.json too."
        )
    # Asked one by one, transformers complains about those that are not set.
    return make_tokenizer(backend, theirs.special_tokens_map, _end_ids(folder), theirs.chat_template, wrapped=theirs)


def _auto_tokenizer(folder: Path) -> Any:
    found = [name for name in _VOCABULARIES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: has no tokenizer.json; expected a model folder with its tokenizer.")
    if found == ["tokenizer.model"] and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder}: has its tokenizer in tokenizer.model alone, which the sentencepiece package reads; install it "
            "(pip install sentencepiece), or download tokenizer.json too."
        )
    try:
        return import_transformers().AutoTokenizer.from_pretrained(
            folder, config=_model_kind(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # depends on the tokenizer's class and on what is damaged
        raise UserError(
            f"{folder / found[0]}: is not a readable tokenizer ({first_line(error)}); download it and the files beside "
            "it again."
        ) from error


def _model_kind(folder: Path) -> Any:
    """What the choice of a tokenizer's class depends on, of transformers' configuration; None where there is no such.

    Other fields are not our business here, and transformers refuses or complains about some that do no harm.
    """
    file = folder / "config.json"
    data = read_json(file) if file.is_file() else {}
    try:
        config = import_transformers().AutoConfig.for_model(data.get("model_type"))
    except ValueError:
        return None
    for field in ("tokenizer_class", "_name_or_path"):
        if isinstance(data.get(field), str):
            setattr(config, field, data[field])
    return config


def _end_ids(folder: Path) -> list[int]:
    """The ids that end a generation, as the files for generation and for the model say: one, several or none.

    Raises:
        UserError: a file names something else.
    """
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        found = read_json(file).get("eos_token_id") if file.is_file() else None
        listed = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in listed):
            raise UserError(f"{file}: eos_token_id is {found!r}; expected a token id or a list of token ids.")
        # Some files say -1 where there is none.
        ends += [token for token in listed if token >= 0]
    return ends
