"""Text as it arrives: what is new of each prompt, and how often it is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specattn_jax.loading.tokenizer import TextStream, Tokenizer

# How often text is shown. Every call costs the host some milliseconds, in which nothing is decoded.
_SHOWN_EVERY_S = 0.2


class Writer:
    """Tells the text of each prompt's new tokens as they arrive, up to the first stop text."""

    def __init__(
        self, tokenizer: Tokenizer, count: int, on_text: Callable[[int, str], None], stops: Sequence[str] = ()
    ) -> None:
        self._streams = [TextStream(tokenizer) for _ in range(count)]
        self._shown = [0] * count
        # What may become a stop text is not told before it is none.
        self._held = [""] * count
        self._on_text = on_text
        self._stops = tuple(stops)
        self.stopped = [False] * count

    def show(self, tokens: list[list[int]]) -> None:
        """Tells what is new in `tokens`, which are all new tokens so far."""
        for index, (stream, ids) in enumerate(zip(self._streams, tokens, strict=True)):
            self._tell(index, stream.push(ids[self._shown[index] :]))
            self._shown[index] = len(ids)

    def finish(self, tokens: list[list[int]]) -> None:
        """Tells what is left, unfinished characters included."""
        self.show(tokens)
        for index, stream in enumerate(self._streams):
            self._tell(index, stream.flush(), at_end=True)

    def _tell(self, index: int, text: str, *, at_end: bool = False) -> None:
        if self.stopped[index]:
            return
        text = self._held[index] + text
        ends = find_stop(text, self._stops)
        self.stopped[index] = ends is not None
        if ends is None:
            ends = len(text) if at_end else len(text) - _begun(text, self._stops)
        self._held[index] = text[ends:]
        if text[:ends]:
            self._on_text(index, text[:ends])


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop text begins that is complete first, the longest of several; None where there is none.

    Not where the first one begins: what was told when another one was complete cannot be taken back.
    """
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop text."""
    lengths = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return max(lengths, default=0)


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
