"""Clears what notebooks were left with: outputs, counts, metadata of cells. Status 1 where something was to be cleared.

python scripts/strip_notebooks.py [NOTEBOOK ...]     all of scripts/notebooks without one
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

KEPT = ("kernelspec", "language_info")


def strip(path: Path) -> bool:
    """Clears one notebook; whether there was something to clear."""
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    notebook.metadata = {name: value for name, value in notebook.metadata.items() if name in KEPT}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    after = nbformat.writes(notebook) + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


def main() -> None:
    """Clears the notebooks named, or all."""
    paths = [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).parent.glob("notebooks/*.ipynb"))
    changed = [path for path in paths if strip(path)]
    for path in changed:
        print(f"cleared {path}")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
