"""Kinds of text, to calibrate, train and evaluate on: seeds for a target to go on with, and the sources of Python.

What is evaluated on (`valid`) is never trained on (`train`): no seed stands in both parts. Of Python's standard library
packages are for training and modules that stand alone for evaluation, of which the task `code_completion` asks too.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import sysconfig
import tomllib
import zlib
from pathlib import Path

from specattn_jax.texts import shipped_books

KINDS = ("prose", "dialogue", "code", "tables", "languages")
SPLITS = ("train", "valid")
_PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "html", "http", "importlib", "json",
    "logging", "multiprocessing", "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc",
    "zoneinfo",
)  # fmt: skip
_LEAST_BYTES = {"train": 2_000, "valid": 8_000}
# Modules that are copied for evaluation; the tasks choose among all.
_EVALUATED_MODULES = 16
# Of a text's quarter that repeats itself, compressing leaves less than this; of tables and code it leaves more.
_LEAST_COMPRESSED = 0.2
_PARTS = 4


def load_seeds(kind: str, split: str) -> list[str]:
    """Beginnings of texts of a kind, one to four lines each.

    Args:
        kind: one of `KINDS`.
        split: `train` or `valid`.
    """
    file = importlib.resources.files("specattn_jax") / "data" / "seeds" / f"{kind}.toml"
    seeds: list[str] = tomllib.loads(file.read_text(encoding="utf-8"))[split]
    return seeds


def python_sources(split: str) -> list[Path]:
    """Files of the running Python's standard library, in the order of their names; none where it has no sources.

    Args:
        split: `train` for packages, `valid` for modules that stand alone.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if split == "valid":
        found = [path for path in folder.glob("*.py") if path.name != "this.py"]
    else:
        found = [path for package in _PACKAGES for path in (folder / package).rglob("*.py")]
    return sorted(path for path in found if path.stat().st_size > _LEAST_BYTES[split])


def texts_at_hand(kind: str, split: str) -> dict[str, Path]:
    """Texts of a kind that need not be written first, by the names that copies of them get."""
    if kind == "prose":
        return {book.name: book for book in shipped_books(split)}
    if kind != "code":
        return {}
    sources = python_sources(split)
    if split == "valid":
        # A fixed choice, whatever modules a version of Python adds.
        sources = sorted(sources, key=lambda path: hashlib.sha256(path.name.encode()).digest())[:_EVALUATED_MODULES]
    folder = Path(sysconfig.get_path("stdlib"))
    return {"_".join(path.relative_to(folder).parts): path for path in sources}


def loops(text: str) -> bool:
    """Whether some quarter of a text repeats itself, as small models do that are left alone."""
    data = text.encode()
    size = max(1, -(-len(data) // _PARTS))
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return any(len(zlib.compress(part)) < _LEAST_COMPRESSED * len(part) for part in parts)
