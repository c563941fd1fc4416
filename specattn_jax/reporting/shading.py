"""Which words a selection let the target read, as HTML for notebooks."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from specattn_jax.reporting.display import Picture, tinted

_LEVELS = 12


@dataclasses.dataclass(frozen=True)
class SelectionRecord:
    """What every window of one generation read of the text before it.

    Attributes:
        pieces: the text of every token, prompt and new ones.
        past: entries in the target's cache at each window; the tokens before them could be read.
        readers: how many (layer, kv head) pairs read each token at each window.
        num_readers: layers times kv heads.
    """

    pieces: list[str]
    past: Int[np.ndarray, " windows"]
    readers: Int[np.ndarray, "windows S"]
    num_readers: int


def shade_window(record: SelectionRecord, window: int = -1, *, most_tokens: int = 400) -> Picture:
    """The text before a window, each word shaded by the share of layers and heads that read it.

    Args:
        record: of a generation.
        window: which window; negative numbers count from the last.
        most_tokens: how much of the text before the window is shown.

    Raises:
        IndexError: there is no such window.
    """
    past = int(record.past[window])
    first = max(0, past - most_tokens)
    shares = record.readers[window, first:past] / record.num_readers
    number = range(len(record.past))[window] + 1
    whole = record.readers[window, :past].mean() / record.num_readers if past else 0.0
    caption = (
        f"Window {number} of {len(record.past)}: {whole:.0%} of {past} cached tokens read, over all layers and heads"
        + (f"; the last {past - first} are shown" if first else "")
    )
    return Picture(_page(caption, record.pieces[first:past], shares))


def _page(caption: str, pieces: Sequence[str], shares: Float[np.ndarray, " n"]) -> str:
    """Caption, scale and shaded text."""
    scale = "".join(tinted(f" {level / 4:.0%} ", level / 4) for level in range(5))
    return (
        '<div style="max-width: 72ch; font-size: 0.95em">'
        f'<p style="margin: 0.2em 0">{html.escape(caption)} {scale}</p>'
        f'<p style="white-space: pre-wrap; line-height: 1.6; margin: 0.2em 0">{_shade(pieces, shares)}</p></div>'
    )


def _shade(pieces: Sequence[str], shares: Float[np.ndarray, " n"]) -> str:
    """The pieces in spans; neighbours of the same shade share one."""
    levels = np.round(np.asarray(shares) * _LEVELS).astype(int).tolist()
    groups = itertools.groupby(zip(levels, pieces, strict=True), key=lambda item: item[0])
    return "".join(tinted("".join(piece for _, piece in group), level / _LEVELS) for level, group in groups)
