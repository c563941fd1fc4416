"""A hook of MkDocs: files of the repository outside `docs/` that a page links to become part of the site.

So the same relative links work in the repository and on the site. The README is the site's first page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = "README.md", "docs/"
# A Markdown link, or an attribute of an HTML picture; the second group is a path without its anchor.
_LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\"#:\s]+)")


def linked_files(page: str, text: str) -> set[str]:
    """Files of the repository that a page links to; both are paths from its root."""
    targets = (_resolve(page, match[2]) for match in _LINK.finditer(text))
    return {target for target in targets if (ROOT / target).is_file()}


def relink(page: str, text: str) -> str:
    """The text of a page with its links as they are on the site."""

    def moved(match: re.Match[str]) -> str:
        target = _resolve(page, match[2])
        if not (ROOT / target).is_file():
            return match[0]
        return match[1] + os.path.relpath(_site_path(target), os.path.dirname(_site_path(page)) or ".")

    return _LINK.sub(moved, text)


def _resolve(page: str, target: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(page), target))


def _site_path(path: str) -> str:
    return "index.md" if path == README else path.removeprefix(DOCS)


def _repository_path(page: str) -> str:
    """The inverse of `_site_path`."""
    if page == "index.md":
        return README
    return DOCS + page if (ROOT / DOCS / page).is_file() else page


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the README and everything outside `docs/` that pages link to, directly or through each other."""
    waiting = [README, *(_repository_path(file.src_uri) for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        if not page.startswith(DOCS):
            files.append(File.generated(config, _site_path(page), abs_src_path=str(ROOT / page)))
        if page.endswith(".md"):
            new = linked_files(page, (ROOT / page).read_text(encoding="utf-8")) - seen
            waiting += new
            seen |= new
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrites a page's links."""
    return relink(_repository_path(page.file.src_uri), markdown)
