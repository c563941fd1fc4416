"""How quality and saving move with what is read and with the window, on one text: small enough for a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from specattn_jax.errors import UserError
from specattn_jax.evaluation.documents import cut_documents
from specattn_jax.evaluation.forced import Reading, read_documents, read_together
from specattn_jax.evaluation.pictures import trade_off
from specattn_jax.loading.pair import ModelPair
from specattn_jax.reporting.display import PngPicture, Table
from specattn_jax.runtime.request import choose_reading


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One setting and what it gave.

    Attributes:
        window: W, drafted tokens per window.
        p: nucleus mass that was set, or None.
        wanted: share of reads to save that was set, or None.
        kv_reduction: share of the target's cache reads saved.
        kl: mean KL(full || sparse) of the next-token distributions, in nats.
        top1: how often the likeliest token is the full target's.
        relative_increase: of the perplexity; below 0 it is better by luck.
    """

    window: int
    p: float | None
    wanted: float | None
    kv_reduction: float
    kl: float
    top1: float
    relative_increase: float


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The points of a sweep; in a notebook, a table.

    Attributes:
        points: window by window.
        tokens: tokens scored at each point.
    """

    points: list[SweepPoint]
    tokens: int

    @property
    def table(self) -> Table:
        """The points, for people."""
        return Table(
            ("window", "asked for", "cache reads saved", "KL", "top-1", "perplexity"),
            tuple(_cells(point) for point in self.points),
        )

    def plot(self) -> PngPicture:
        """KL and top-1 against the share of reads saved, one line per window."""
        lines = {
            f"window {window}": [point for point in self.points if point.window == window]
            for window in dict.fromkeys(point.window for point in self.points)
        }
        return PngPicture(
            trade_off(
                {
                    name: [
                        (point.kv_reduction, point.kl, point.top1, "" if point.p is None else _asked(point))
                        for point in points
                    ]
                    for name, points in lines.items()
                },
                f"{self.tokens} tokens, read in teacher-forced windows",
            )
        )

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def sweep(
    pair: ModelPair,
    text: str | Path | Sequence[int],
    *,
    p: Sequence[float] = (),
    kv_reduction: Sequence[float] = (),
    window: Sequence[int] = (5,),
    policy: str = "default",
    context: int = 512,
    prefill: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Reads a passage of known text through drafting, selection and verification with each setting.

    The passage is the middle of the text. For several texts, other methods and standard errors: `specattn perplexity`.

    Args:
        pair: target, draft, tokenizer and alignment.
        text: a text, a file with one, or token ids; at least `context` tokens.
        p: nucleus masses in every layer, in (0, 1], or
        kv_reduction: wanted shares of cache reads saved.
        window: drafted tokens per window; every window is read with every setting.
        policy: selection policy.
        context: tokens of the passage.
        prefill: share of it that is prefilled densely; the rest is scored.
        progress: told the windows done and in all.

    Raises:
        UserError: not one of `p` and `kv_reduction` is given, a number is out of range, the text is too short, or the
            pair has no alignment.

    Example:
        >>> from specattn_jax.examples import tiny_pair
        >>> from specattn_jax.texts import find_text
        >>> found = sweep(tiny_pair(), find_text("pride_and_prejudice"), p=[0.8, 0.99], context=128)
        >>> low, high = found.points
        >>> low.kv_reduction > high.kv_reduction and low.kl > high.kl
        True
    """
    if bool(p) == bool(kv_reduction):
        raise UserError("p and kv_reduction both say how much to read; give some values of one of them.")
    settings: list[dict[str, float]] = [{"p": value} for value in p] + [
        {"kv_reduction": value} for value in kv_reduction
    ]
    # Without a context: what is read together differs in arrays alone, so that the draft reads the policy's own share.
    selections = [
        choose_reading(pair, policy=policy, p=setting.get("p"), kv_reduction=setting.get("kv_reduction"))
        for setting in settings
    ]
    draft = pair.need_draft()
    documents = cut_documents([pair.encode(text)], context, 1)
    points, tokens = [], 0
    for done, size in enumerate(window):
        if progress is not None:
            progress(done, len(window))
        full = read_documents(pair.target, draft, None, documents, prefill_share=prefill, window=size)
        assert full.hidden is not None
        readings = read_together(
            pair.target, draft, selections, documents, reference=full.hidden, prefill_share=prefill, window=size
        )
        points += [_point(size, setting, one, full) for setting, one in zip(settings, readings, strict=True)]
        tokens = full.tokens
    return Sweep(points, tokens)


def _point(window: int, setting: dict[str, float], reading: Reading, full: Reading) -> SweepPoint:
    assert reading.kl is not None
    assert reading.top1 is not None
    return SweepPoint(
        window=window,
        p=setting.get("p"),
        wanted=setting.get("kv_reduction"),
        kv_reduction=reading.kv_reduction,
        kl=float(np.mean(reading.kl)),
        top1=float(np.mean(reading.top1)),
        relative_increase=reading.perplexity / full.perplexity - 1.0,
    )


def _asked(point: SweepPoint) -> str:
    return f"p = {point.p:g}" if point.wanted is None else f"{point.wanted:.0%} saved"


def _cells(point: SweepPoint) -> tuple[str, ...]:
    return (
        str(point.window),
        _asked(point),
        f"{point.kv_reduction:.1%}",
        f"{point.kl:.4f}",
        f"{point.top1:.1%}",
        f"{point.relative_increase:+.2%}",
    )
