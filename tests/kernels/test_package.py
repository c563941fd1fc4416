"""The kernels as a distribution of their own: the example of its README runs, and both distributions ship the same."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"


def test_the_example_of_the_readme_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, "kernels/README.md", "exec"), {})
    read, error = map(float, re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert 1 < read < 60
    assert error < 10


@pytest.mark.parametrize(("folder", "package"), [(ROOT, "specattn_jax"), (KERNELS, "specattn_kernels")])
def test_all_rooms_are_packaged(folder, package):
    tool = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {
        ".".join(file.parent.relative_to(KERNELS).parts)
        for file in (KERNELS / "specattn_kernels").rglob("*.py")
        if "__pycache__" not in file.parts
    }
    assert rooms <= set(tool["packages"])
    assert tool["package-data"]["specattn_kernels"] == ["py.typed"]
    assert tool["dynamic"]["version"] == {"attr": f"{package}.__version__"}


def test_it_imports_nothing_of_ours():
    for file in (KERNELS / "specattn_kernels").rglob("*.py"):
        assert "specattn_jax" not in file.read_text(encoding="utf-8")
    assert not (KERNELS / "__init__.py").exists()
