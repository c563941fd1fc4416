"""Draws the figure of the method in the README, for light and for dark pages: `python scripts/draw_method.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SLOTS, STEPS, HEADS = 52, 5, 4
MASS = 0.84
CELL, GAP = 9.0, 1.0
LEFT, WIDTH, HEIGHT = 236.0, 960, 372
TOKENS = LEFT + SLOTS * (CELL + GAP) + 14
TOKEN = 30.0


class Theme(NamedTuple):
    """Colours of one kind of page."""

    page: str
    text: str
    quiet: str
    line: str
    draft: str
    target: str
    good: str
    bad: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#bc4c00", "#0969da", "#1a7f37", "#cf222e"),
    "dark": Theme("#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#f0883e", "#4493f8", "#3fb950", "#f85149"),
}


def attention(rng: np.random.Generator) -> Float[np.ndarray, "heads steps slots"]:
    """Made-up attention with what real attention has: a first token, neighbours, places that several steps want."""
    slots = np.arange(SLOTS)
    weights = 0.004 * rng.random((HEADS, STEPS, SLOTS)) + 0.1 * (slots == 0) + 0.1 * np.exp(slots - SLOTS + 1.0)
    for head in range(HEADS):
        places = rng.choice(np.arange(3, SLOTS - 4), 6, replace=False)
        for step in range(STEPS):
            wanted = rng.choice(places, 3, replace=False)
            near = np.exp(-np.abs(slots - wanted[:, None]) / 0.4)
            weights[head, step] += (rng.uniform(0.08, 0.2, (3, 1)) * near).sum(axis=0)
    normalised: Float[np.ndarray, "heads steps slots"] = weights / weights.sum(axis=-1, keepdims=True)
    return normalised


def nucleus(scores: Float[np.ndarray, "*batch slots"]) -> Bool[np.ndarray, "*batch slots"]:
    """The fewest slots that hold the mass."""
    order = np.argsort(-scores, axis=-1)
    shares = np.take_along_axis(scores, order, axis=-1) / scores.sum(axis=-1, keepdims=True)
    chosen = np.cumsum(shares, axis=-1) - shares < MASS
    return np.take_along_axis(chosen, np.argsort(order, axis=-1), axis=-1)


def text(x: float, y: float, words: str, colour: str, size: int = 14, weight: int = 400, anchor: str = "start") -> str:
    """A line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{words}</text>'
    )


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0, line: str = "none") -> str:
    """A rectangle, filled and outlined."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5" fill="{colour}" '
        f'fill-opacity="{opacity:.2f}" stroke="{line}"/>'
    )


def slot(index: int) -> float:
    """Where a slot of the cache begins."""
    return LEFT + index * (CELL + GAP)


def band(y: float, title: str, lines: tuple[str, ...], colour: str, theme: Theme) -> list[str]:
    """What stands beside one step."""
    words = [text(20, y, title, colour, 16, 600)]
    return words + [text(20, y + 21 + 18 * index, line, theme.quiet, 13) for index, line in enumerate(lines)]


def tokens(y: float, marks: tuple[str, ...], colours: tuple[str, ...], theme: Theme) -> list[str]:
    """The drafted tokens, each with a mark below."""
    parts = []
    for index, (mark, colour) in enumerate(zip(marks, colours, strict=True)):
        x = TOKENS + index * (TOKEN + 4)
        parts.append(box(x, y, TOKEN, 24, colour, 0.18, colour))
        parts.append(text(x + TOKEN / 2, y + 17, f"t{index + 1}", theme.text, 13, 500, "middle"))
        parts.append(text(x + TOKEN / 2, y + 42, mark, colour, 14, 600, "middle"))
    return parts


def drafting(attended: Float[np.ndarray, "steps slots"], theme: Theme) -> list[str]:
    """Step 1: where the draft looked."""
    about = ("five tokens, one by one;", "its attention at each step", "says where it looked")
    parts = band(42, "1  The draft writes", about, theme.draft, theme)
    for step, index in np.ndindex(STEPS, SLOTS):
        share = 0.06 + 0.94 * min(1.0, 2 * attended[step, index] / attended.max())
        parts.append(box(slot(index), 30 + step * (CELL + GAP + 3), CELL, CELL + 2, theme.draft, share))
    return parts + tokens(44, ("",) * STEPS, (theme.draft,) * STEPS, theme)


def predicting(predicted: Float[np.ndarray, " slots"], chosen: Bool[np.ndarray, " slots"], theme: Theme) -> list[str]:
    """Step 2: what that says of one kv head of the target."""
    about = ("of the target's attention:", "a calibrated mixture for each", "kv head, maximum over steps")
    parts = band(150, "2  A prediction", about, theme.text, theme)
    for index, score in enumerate(predicted):
        tall = max(1.5, 72 * score / predicted.max())
        colour, opacity = (theme.target, 1.0) if chosen[index] else (theme.quiet, 0.5)
        parts.append(box(slot(index), 204 - tall, CELL, tall, colour, opacity))
    lines = ((166, "the fewest entries"), (184, "that hold the mass p"))
    return parts + [text(TOKENS, y, line, theme.quiet, 13) for y, line in lines]


def verifying(chosen: Bool[np.ndarray, "heads slots"], theme: Theme) -> list[str]:
    """Step 3: what the target reads, and its verdict."""
    about = ("all five in one pass and", "reads these entries alone,", "others for each kv head")
    parts = band(262, "3  The target verifies", about, theme.target, theme)
    for head, index in np.ndindex(HEADS, SLOTS):
        fill, line = (theme.target, theme.target) if chosen[head, index] else (theme.page, theme.line)
        parts.append(box(slot(index), 246 + head * (CELL + GAP + 6), CELL, CELL + 4, fill, 1.0, line))
    colours = (theme.good, theme.good, theme.good, theme.bad, theme.quiet)
    parts += tokens(254, ("✓", "✓", "✓", "✗", ""), colours, theme)
    caption = f"cache of the target, one row per kv head: {chosen.mean():.0%} of it is read here"
    return [
        *parts,
        text(LEFT, 342, caption, theme.quiet, 13),
        text(TOKENS, 342, "3 accepted, 1 of its own", theme.quiet, 13),
    ]


def draw(theme: Theme) -> str:
    """The figure, as SVG."""
    attended = attention(np.random.default_rng(4))
    predicted = attended.max(axis=1)
    chosen = nucleus(predicted)
    steps = (drafting(attended[0], theme), predicting(predicted[0], chosen[0], theme), verifying(chosen, theme))
    body = "\n".join([box(0, 0, WIDTH, HEIGHT, theme.page), *(part for step in steps for part in step)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\">\n"
        "<title>SpecAttn: the draft's attention decides which cache entries the target reads</title>\n"
        f"{body}\n</svg>\n"
    )


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    out = parser.parse_args().out
    out.mkdir(exist_ok=True)
    for name, theme in THEMES.items():
        (out / f"method_{name}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
