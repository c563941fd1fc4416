"""What notebooks show by themselves: HTML in the page's own text colour, for light and dark pages, and PNGs."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from specattn_jax.files import atomic_file

# Under text of any colour: orange is readable on light and on dark pages up to this opacity.
_TINT = "230, 120, 0"
_MOST_OPAQUE = 0.6
_LINE = "1px solid rgba(128, 128, 128, 0.45)"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A piece of HTML that notebooks show.

    Attributes:
        html: self-contained.
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html


@dataclasses.dataclass(frozen=True)
class PngPicture:
    """A PNG that notebooks show.

    Attributes:
        png: the bytes of the file.
    """

    png: bytes = dataclasses.field(repr=False)

    def save(self, path: str | Path) -> None:
        """Writes the file.

        Raises:
            UserError: it cannot be written.
        """
        with atomic_file(Path(path)) as work:
            work.write_bytes(self.png)

    def _repr_png_(self) -> bytes:
        return self.png


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that notebooks show; printed, it is Markdown.

    Attributes:
        header: names of the columns.
        rows: one text per column each.

    Example:
        >>> print(Table.of([{"window": 5, "saved": 0.7512}, {"window": 8, "saved": 0.7481}]))
        | window | saved |
        | --- | --- |
        | 5 | 0.751 |
        | 8 | 0.748 |
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, object]]) -> Table:
        """From records with the same names; numbers get three digits.

        Args:
            records: at least one.
        """
        names = tuple(records[0])
        return cls(names, tuple(tuple(_text(record[name]) for name in names) for record in records))

    def __str__(self) -> str:
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, ["---"] * len(self.header), *self.rows))

    def _repr_html_(self) -> str:
        lines = [_line("th", self.header), *(_line("td", row) for row in self.rows)]
        return f'<table style="border-collapse: collapse; margin: 0.4em 0">{"".join(lines)}</table>'


def tinted(text: str, share: float) -> str:
    """HTML of a text under a tint, between none (0) and the strongest (1)."""
    return f'<span style="background: rgba({_TINT}, {share * _MOST_OPAQUE:.2f})">{html.escape(text)}</span>'


def columns(parts: Sequence[tuple[str, str]]) -> str:
    """HTML of titled texts side by side, below one another where the page is narrow.

    Args:
        parts: title, and the text as HTML.
    """
    boxes = "".join(
        f'<div style="flex: 1 1 16em; min-width: 0; border: {_LINE}; border-radius: 6px; padding: 0.5em 0.8em">'
        f"<b>{html.escape(title)}</b>"
        f'<div style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5">{body}</div></div>'
        for title, body in parts
    )
    return f'<div style="display: flex; flex-wrap: wrap; gap: 0.8em">{boxes}</div>'


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _line(kind: str, cells: Sequence[str]) -> str:
    style = f"text-align: left; padding: 0.2em 0.8em; border-bottom: {_LINE}; background: none"
    return "<tr>" + "".join(f'<{kind} style="{style}">{html.escape(cell)}</{kind}>' for cell in cells) + "</tr>"
