"""Texts for calibration, evaluation and the demo: the reader's own files or the books that are shipped."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib.resources
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from specattn_jax.errors import UserError
from specattn_jax.files import exists

# The kind of texts of which nobody said one.
UNNAMED = ""
# Token ids of each text, or of each text of each kind.
Documents: TypeAlias = Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[int]]]
_Text = TypeVar("_Text")
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


def find_kinds(names: Sequence[str]) -> dict[str, list[Path]]:
    """Files by the kind of their text, as `--text` names them.

    Args:
        names: files, shipped books, and folders, each as it is or as `KIND=NAME`. Of a folder all files are taken; of
            one that holds nothing but folders, the files of these, whose names are kinds.

    Returns:
        By kind, in the order in which kinds are first named; the kind of what has no name is empty.

    Raises:
        UserError: there is no such text, a folder holds none, or only some of the texts are named.
    """
    found: dict[str, list[Path]] = {}
    for name in names:
        kind, separated, rest = name.partition("=")
        if not separated or exists(Path(name)):
            kind, rest = UNNAMED, name
        elif not kind or not rest:
            raise UserError(f"text: {name!r} is incomplete; expected KIND=PATH.")
        path = Path(rest)
        inside = _in_folder(path) if exists(path) and path.is_dir() else {UNNAMED: [find_text(rest)]}
        for part, files in inside.items():
            found.setdefault(kind or part, []).extend(files)
    if UNNAMED in found and len(found) > 1:
        named = ", ".join(filter(None, found))
        raise UserError(f"text: some are named ({named}) and some are not; name all as KIND=PATH, or none.")
    return found


def spread_parts(text: Sequence[int], tokens: int, count: int) -> list[list[int]]:
    """So many parts of a text that begin at evenly spaced places, the first one at its beginning; long ones overlap.

    Args:
        text: token ids.
        tokens: of each part.
        count: how many.
    """
    spread = (len(text) - tokens) // count
    return [list(text[at * spread :][:tokens]) for at in range(count)]


def by_kind(
    texts: Sequence[_Text] | Mapping[str, Sequence[_Text]],
) -> Mapping[str, Sequence[_Text]]:
    """Texts by their kind; those without one are of one kind."""
    return texts if isinstance(texts, Mapping) else {UNNAMED: texts}


def name_texts(paths: Mapping[str, Sequence[Path]]) -> list[str]:
    """What is noted of texts: the names of files, or how many there are of each kind."""
    if list(paths) == [UNNAMED]:
        return [path.name for path in paths[UNNAMED]]
    return [f"{kind}: {len(files)} texts" for kind, files in paths.items()]


def _in_folder(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder, or of the folders in it, by their names."""

    def files(place: Path) -> list[Path]:
        return sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith("."))

    if direct := files(folder):
        return {UNNAMED: direct}
    inside = {place.name: files(place) for place in sorted(folder.iterdir()) if place.is_dir()}
    if not any(inside.values()):
        raise UserError(f"text: {folder} is a folder without texts.")
    return {name: found for name, found in inside.items() if found}


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
