"""One prompt continued in several modes, side by side."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from specattn_jax.errors import UserError
from specattn_jax.loading.pair import ModelPair
from specattn_jax.reporting.display import Table, columns, tinted
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import Mode
from specattn_jax.runtime.results import Generation, Generations

COMPARED: tuple[Mode, ...] = ("autoregressive", "speculative", "specattn")
_DIFFERENT = 0.4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What each mode wrote, and what it cost; in a notebook, columns and a table.

    In the columns, a text is tinted from where it leaves the first mode's text.

    Attributes:
        texts: the text so far, by mode.
        runs: the modes that are finished.
    """

    texts: Mapping[Mode, str]
    runs: Mapping[Mode, Generations] = dataclasses.field(repr=False)

    def __getitem__(self, mode: Mode) -> Generation:
        """What a finished mode gave."""
        return self.runs[mode].results[0]

    @property
    def table(self) -> Table:
        """The numbers of the modes that are finished."""
        return Table(
            ("mode", "tokens/s", "drafts accepted per window", "cache reads saved", "target passes", "prefill",
             "decode", "compile"),
            tuple(_cells(mode, run) for mode, run in self.runs.items()),
        )  # fmt: skip

    def _repr_html_(self) -> str:
        shown = {mode: text.lstrip() for mode, text in self.texts.items()}
        first = next(iter(shown.values()), "")
        parts = [(mode, _marked(text, first)) for mode, text in shown.items()]
        return columns(parts) + (self.table._repr_html_() if self.runs else "")


def compare(
    pair: ModelPair,
    prompt: str | Sequence[int],
    *,
    modes: Sequence[Mode] = COMPARED,
    p: float | None = None,
    kv_reduction: float | None = None,
    on_update: Callable[[Comparison], object] | None = None,
    **options: Any,
) -> Comparison:
    """Continues a prompt in one mode after the other.

    Args:
        pair: target, draft, tokenizer and alignment, from `load_pair`.
        prompt: text or token ids.
        modes: in which order; the texts are compared with the first one's.
        p: nucleus mass in every layer, for mode `specattn`, or
        kv_reduction: wanted share of its cache reads saved.
        on_update: receives everything so far whenever text arrives, e.g. the `update` of a notebook's display handle.
        options: of `generate`, the same for all modes.

    Raises:
        UserError: as `generate`; `modes` is empty.

    Example:
        >>> from specattn_jax.examples import tiny_pair
        >>> both = compare(
        ...     tiny_pair(), "Call me Ishmael.", modes=("autoregressive", "speculative"), max_new_tokens=12
        ... )
        >>> both["autoregressive"].text == both["speculative"].text
        True
        >>> both["autoregressive"].windows > both["speculative"].windows
        True
    """
    if not modes:
        raise UserError(f"modes is empty; expected some of {', '.join(get_args(Mode))}.")
    texts: dict[Mode, str] = {}
    runs: dict[Mode, Generations] = {}

    def tell() -> None:
        if on_update is not None:
            on_update(Comparison(dict(texts), dict(runs)))

    for mode in modes:
        texts[mode] = ""

        def add(_: int, text: str, mode: Mode = mode) -> None:
            texts[mode] += text
            tell()

        runs[mode] = generate(pair, [prompt], mode=mode, p=p, kv_reduction=kv_reduction, on_text=add, **options)
        tell()
    return Comparison(texts, runs)


def _marked(text: str, first: str) -> str:
    """HTML of a text, tinted from where it leaves the first one."""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, first, strict=False)))
    return html.escape(text[:same]) + (tinted(text[same:], _DIFFERENT) if same < len(text) else "")


def _cells(mode: Mode, run: Generations) -> tuple[str, ...]:
    result, timing = run.results[0], run.timing
    return (
        mode,
        f"{run.tokens_per_s:.1f}",
        "" if result.window is None else f"{result.accepted_per_window:.2f}",
        f"{result.kv_reduction:.1%}",
        str(result.windows),
        *(f"{seconds:.1f} s" for seconds in (timing.prefill_s, timing.decode_s, timing.compile_s)),
    )
