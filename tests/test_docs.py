"""The documentation is built without a warning, names what is public, and loads nothing from other hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import specattn_kernels

import specattn_jax

ROOT = Path(__file__).parents[1]
# What a page loads by itself; a link that a reader may follow is another thing.
LOADED = re.compile(
    r"<(?:script|img|source|iframe)[^>]+(?:src|srcset)=\"([^\"]+)|<link[^>]+href=\"([^\"]+)|url\(([^)]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "-d", folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("package", [specattn_jax, specattn_kernels], ids=lambda package: package.__name__)
def test_public_names_are_in_the_reference(site, package):
    page = (site / "reference" / f"{package.__name__}.html").read_text(encoding="utf-8")
    shown = set(re.findall(rf"<h\d id=\"{package.__name__}\.(\w+)\"", page))
    documented = {name for name in package.__all__ if callable(getattr(package, name)) and name[0] != "_"}
    assert {name for name in documented if getattr(package, name).__doc__} - shown <= {"Implementation", "Scores"}


def test_the_first_page_is_the_readme(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="docs/' not in page
    assert 'src="method_light.svg"' in page
    assert (site / "method_light.svg").is_file()


def test_nothing_is_loaded_from_other_hosts(site):
    for path in site.glob("**/*.html"):
        for groups in LOADED.findall(path.read_text(encoding="utf-8")):
            target = "".join(groups).split("#")[0].split("?")[0].strip("'\"")
            if not target.startswith("data:") and path.name != "404.html":
                assert not re.match(r"(?:\w+:)?//", target), (path, target)
                assert (path.parent / target).exists(), (path, target)
