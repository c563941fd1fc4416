"""Texts for calibration, evaluation and the demo: the reader's own files or the books that are shipped."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib.resources
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from specattn_jax.errors import UserError
from specattn_jax.files import exists

_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
}


def shipped_books(split: str) -> list[Path]:
    """The public-domain books that come with the package: `train` for calibration and training, `valid` to evaluate."""
    root = importlib.resources.files("specattn_jax") / "data" / "books" / split
    return sorted(Path(str(entry)) for entry in root.iterdir() if entry.name.endswith(".txt.xz"))


def find_text(name: str) -> Path:
    """A file, or the shipped book of that name (`pride_and_prejudice`).

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if exists(path) and path.is_file():
        return path
    books = {book.name.removesuffix(".txt.xz"): book for split in ("train", "valid") for book in shipped_books(split)}
    if name in books:
        return books[name]
    raise UserError(f"text: {name} is neither a file nor a shipped book; the books are {', '.join(sorted(books))}.")


def read_text(path: Path) -> str:
    """A UTF-8 text file, plain or compressed with xz, gzip or bzip2.

    Raises:
        UserError: it does not exist, cannot be read, is empty, or is not UTF-8 (says where).
    """
    try:
        data = _UNPACK.get(path.suffix, bytes)(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"text: {path} does not exist.") from error
    except (OSError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise UserError(f"text: {path} cannot be read ({error}).") from error
    text = decode_text(data, f"text: {path}")
    if not text.strip():
        raise UserError(f"text: {path} is empty; expected some text.")
    return text


def decode_text(data: bytes, origin: str) -> str:
    """UTF-8 bytes as text. A byte-order mark at the beginning is no text.

    Args:
        data: the bytes.
        origin: what to call them in messages.

    Raises:
        UserError: they are not UTF-8 (says where, and what they look like), or surely meant as something else.
    """
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        other = " (it begins like UTF-16)" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        raise UserError(
            f"{origin} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} (line {line})"
            f"{other}; convert it to UTF-8."
        ) from error
    # Plain letters in UTF-16 or UTF-32 are valid UTF-8, of which every other byte is zero.
    if 4 * data.count(0) > len(data):
        raise UserError(
            f"{origin} is no text in UTF-8: {data.count(0):,} of its {len(data):,} bytes are zero, as in UTF-16; "
            "convert it to UTF-8."
        )
    return text


def without_final_newline(text: str) -> str:
    """The text without the line end that editors put at the end of a file: LF, CRLF or CR."""
    return text[:-2] if text.endswith("\r\n") else text[:-1] if text.endswith(("\n", "\r")) else text
