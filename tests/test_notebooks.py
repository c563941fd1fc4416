"""The notebooks run from the first cell to the last in a fresh kernel, and hold nothing but calls."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from specattn_jax.notebook.compare import COMPARED

FOLDER = Path(__file__).parents[1] / "scripts" / "notebooks"
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
MOST_LINES = 15
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.While, ast.Try)
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_cells(name: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Executes a notebook in a new kernel of this Python, in an empty folder, as somebody who installed the package."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = read(name)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return notebook


def shown(notebook: Any, kind: str) -> list[str]:
    """What cells show in a format, in order; `stderr` is what they complain about."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    if kind == "stderr":
        return [output.text for output in outputs if output.get("name") == "stderr"]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2_files")
def test_quickstart(tmp_path, monkeypatch):
    notebook = run("quickstart", tmp_path, monkeypatch)
    comparison, first, last, table = shown(notebook, "text/html")
    for mode in COMPARED:
        assert f"<b>{mode}</b>" in comparison
        assert re.search(rf"{mode}</td>", comparison)
    assert "Window 1 of " in first
    assert re.search(r"Window (\d+) of \1:", last)
    assert table.count("<tr>") == 9
    assert len(shown(notebook, "image/png")) == 1


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2_files")
def test_tpu(tmp_path, monkeypatch):
    notebook = run("tpu", tmp_path, monkeypatch)
    device, kernels, times, results = shown(notebook, "text/html")
    assert "cpu" in device
    assert kernels.count("faster on a CPU") == 6
    assert times.count("<tr>") == 3
    assert results.count("specattn</td>") == 4
    (benchmark,) = shown(notebook, "text/markdown")
    assert "sparse_decode_attention" in benchmark
    assert "failed" not in benchmark


@pytest.mark.slow
def test_your_own_models(tmp_path, monkeypatch):
    notebook = run("your_own_models", tmp_path, monkeypatch)
    assert len(shown(notebook, "image/png")) == 3
    (table,) = shown(notebook, "text/html")
    assert "p = 0.95" in table
    complaints = "".join(shown(notebook, "stderr"))
    assert "cache reads saved" in complaints
    assert "Error" not in complaints


def test_these_are_all():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert NOTEBOOKS.keys() == {"quickstart", "tpu", "your_own_models"} <= tested


@each_notebook
def test_is_valid_and_stripped(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() <= {"kernelspec", "language_info"}
    for cell in code_cells(name):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert not cell.metadata


@each_notebook
def test_installs_first(name):
    source = code_cells(name)[0].source
    assert "%pip install" in source
    assert 'find_spec("specattn_jax") is None' in source


@each_notebook
def test_cells_are_short_and_hold_no_logic(name):
    for cell in code_cells(name):
        lines = cell.source.splitlines()
        assert len(lines) <= MOST_LINES, cell.source
        assert max(map(len, lines)) <= 120
        if lines[0] == "%%bash":
            assert not re.search(r"\b(if|for|while)\b", cell.source)
            continue
        code = "\n".join(re.sub(r"^(\s*)%.*", r"\1pass", line) for line in lines)
        assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, LOGIC)], cell.source


@each_notebook
def test_links_lead_somewhere(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (FOLDER / target).is_file(), target
