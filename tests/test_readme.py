"""What the README shows is there, and is what the scripts draw."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", README)
    local = [one or other for one, other in targets if not (one or other).startswith("http")]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


def test_links_within_the_page_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(#([^)]+)\)", README):
        assert target in anchors, target


def test_the_figure_is_what_its_script_draws(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "draw_method.py", "--out", tmp_path], check=True)
    for theme in ("light", "dark"):
        name = f"method_{theme}.svg"
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8")
