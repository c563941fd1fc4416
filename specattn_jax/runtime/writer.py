"""Text as it arrives: what is new of each prompt, and how often it is shown."""

from __future__ import annotations

from collections.abc import Callable

from specattn_jax.loading.tokenizer import TextStream, Tokenizer

# How often text is shown. Every call costs the host some milliseconds, in which nothing is decoded.
_SHOWN_EVERY_S = 0.2


class Writer:
    """Tells the text of each prompt's new tokens as they arrive."""

    def __init__(self, tokenizer: Tokenizer, count: int, on_text: Callable[[int, str], None]) -> None:
        self._streams = [TextStream(tokenizer) for _ in range(count)]
        self._shown = [0] * count
        self._on_text = on_text

    def show(self, tokens: list[list[int]]) -> None:
        """Tells what is new in `tokens`, which are all new tokens so far."""
        for index, (stream, ids) in enumerate(zip(self._streams, tokens, strict=True)):
            self._tell(index, stream.push(ids[self._shown[index] :]))
            self._shown[index] = len(ids)

    def finish(self, tokens: list[list[int]]) -> None:
        """Tells what is left, unfinished characters included."""
        self.show(tokens)
        for index, stream in enumerate(self._streams):
            self._tell(index, stream.flush())

    def _tell(self, index: int, text: str) -> None:
        if text:
            self._on_text(index, text)


class Pace:
    """How many windows the next call takes while text is shown: as many as fit between two looks at it."""

    def __init__(self, windows: int | None = None) -> None:
        """With a fixed number of windows, or one that begins with one window and at most doubles from call to call."""
        self._fixed = windows is not None
        self.windows = windows or 1

    def took(self, windows: int, seconds: float) -> None:
        """Learns how long a call took; the first of a program may be slow, and the last may end early."""
        if not self._fixed:
            fitting = int(windows * _SHOWN_EVERY_S / max(seconds, 1e-9))
            self.windows = max(1, min(fitting, 2 * self.windows))
