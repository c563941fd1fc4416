"""The house stands as it was drawn: who may import whom, how long files are, and where modes are told by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import specattn_jax
from specattn_jax.runtime.request import AUTO, Mode

ROOT = Path(specattn_jax.__file__).parents[1]
LIBRARY, KERNELS = ROOT / "specattn_jax", ROOT / "kernels"
# The command tells the version, which the front door holds.
FRONT_DOOR = {"cli/app.py"}
# From the ground up: a room imports from lower floors alone, and rooms of one floor know nothing of each other.
FLOORS = (
    ("errors", "glossary", "timing"),
    ("files",),
    ("texts",),
    ("kinds",),
    ("models",),
    ("selection",),
    ("decoding", "reporting"),
    ("calibration",),
    ("loading",),
    ("examples", "planning"),
    ("runtime",),
    ("evaluation", "training"),
    ("bench", "notebook"),
    ("cli",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES = 500
# Where a request is read, and where people name a mode.
AMBIGUOUS = {AUTO, "self"}
MODES_BY_NAME = {"runtime/request.py", "cli"}


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if not {"build", ".venv"} & set(path.parts))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Every module that is imported, wherever and for whomever, with its line: inside functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            # What is imported may be a module itself.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_every_room_has_a_floor():
    rooms = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in files(LIBRARY)}
    assert rooms - {"__init__"} == set(FLOOR)


def test_no_module_imports_upward():
    upward = []
    for path in files(LIBRARY):
        inside = path.relative_to(LIBRARY)
        room = inside.parts[0].removesuffix(".py")
        # The front door knows every public name.
        if room == "__init__":
            continue
        package = ".".join(["specattn_jax", *inside.parts[:-1]])
        for line, name in imports(parse(path), package):
            first, *rest = name.split(".")
            if first != "specattn_jax":
                continue
            other = rest[0] if rest else ""
            if name == "specattn_jax" and inside.as_posix() in FRONT_DOOR:
                continue
            if other != room and FLOOR.get(other, len(FLOORS)) >= FLOOR[room]:
                upward.append(f"{inside}:{line} imports {name}")
    assert upward == []


def test_kernels_know_nothing_of_us():
    known = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(KERNELS)
        for line, name in imports(parse(path), "")
        if name.split(".")[0] in ("specattn_jax", "specattn_configs")
    ]
    assert known == []


@pytest.mark.parametrize("folder", [LIBRARY, KERNELS, ROOT / "scripts"], ids=lambda path: path.name)
def test_files_are_short(folder):
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files(folder)}
    assert lines
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_nothing_is_a_stub():
    stubs = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files(LIBRARY)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)
    ]
    assert stubs == []


def test_modes_are_told_by_name_only_where_requests_are_read():
    def names_a_mode(node: ast.AST) -> bool:
        if not isinstance(node, (ast.Compare, ast.MatchValue)):
            return False
        # A dtype may be `auto` too, and a draft `self`.
        names = set(get_args(Mode)) - AMBIGUOUS | (AMBIGUOUS if "mode" in ast.unparse(node) else set())
        return any(isinstance(one, ast.Constant) and one.value in names for one in ast.walk(node))

    found = []
    for path in files(LIBRARY):
        inside = path.relative_to(LIBRARY)
        if MODES_BY_NAME & {inside.as_posix(), inside.parts[0]}:
            continue
        found += [
            f"{inside}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)}"
            for node in ast.walk(parse(path))
            if names_a_mode(node)
        ]
    assert found == []
