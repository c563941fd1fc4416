"""Files and folders that appear complete or not at all, and JSON files with clear errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from specattn_jax.errors import UserError, is_out_of_memory

# Metadata, and the rounding of files to blocks.
_DISK_OVERHEAD = 1.1
LFS_POINTER = "is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder, or download the file."


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; there is none of an impossible name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_taken(out: Path) -> bool:
    """Whether there is something that writing `out` as a new folder would overwrite."""
    return exists(out) and (out.is_file() or any(out.iterdir()))


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in place of a large one that it has not fetched."""
    mark = b"version https://git-lfs"
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def first_line(reason: object) -> str:
    """What went wrong, without the stack of sources that some libraries append, to stand inside a sentence."""
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0].rstrip(".")


def check_disk(out: Path, needed: int, remedy: str = "choose another folder") -> None:
    """Refuses to write what the disk has no room for, before a library reports it in its own way or half-way through.

    Args:
        out: what will be written; it need not exist.
        needed: bytes.
        remedy: what else than freeing some room would help.

    Raises:
        UserError: there is not enough room.
    """
    place = next((parent for parent in [out, *out.absolute().parents] if exists(parent)), Path("/"))
    free = shutil.disk_usage(place).free
    if free < needed * _DISK_OVERHEAD:
        raise UserError(
            f"{out}: needs {needed * _DISK_OVERHEAD / 2**20:.1f} MiB, but the disk has {free / 2**20:.1f} MiB left; "
            f"free some room or {remedy}."
        )


@contextlib.contextmanager
def atomic_folder(out: Path, needed: int = 0) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends well and vanishes when it does not.

    Args:
        out: the folder.
        needed: bytes that will be written, as far as they are known.

    Raises:
        UserError: `out` exists already and is not an empty folder, or cannot be made, or the disk has no room.
    """
    if is_taken(out):
        raise UserError(f"{out}: exists already; expected a new or empty folder; choose another one or remove it.")
    out = out.absolute()
    check_disk(out, needed)
    work = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        work.mkdir(parents=True)
        yield work
        work.rename(out)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: cannot be written ({reason}); choose another folder.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """A file to write, which becomes `out` (replacing it) when the block ends well and vanishes when it does not.

    Raises:
        UserError: it cannot be written.
    """
    work = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield work
        work.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); choose another folder.") from error
    finally:
        with contextlib.suppress(OSError):  # such as where the parent is a file
            work.unlink(missing_ok=True)


@contextlib.contextmanager
def sensible(origin: object, advice: str) -> Iterator[None]:
    """Around reading a file: whatever libraries raise on contents that make no sense becomes one sentence.

    Raises:
        UserError: naming `origin`. Errors for people pass as they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged contents can fail anywhere, in any way
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise UserError(f"{origin}: is damaged ({reason}); {advice}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it is missing, unreadable or something else.
    """
    try:
        # Some editors put a byte-order mark before it.
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a complete model folder.") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); download it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__} data; expected a JSON object; download it again.")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes an object as readable JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
