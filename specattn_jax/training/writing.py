"""Texts of every kind that a target writes after short seeds, beside those that are at hand, as folders of files."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specattn_jax.errors import UserError
from specattn_jax.files import atomic_folder, write_json
from specattn_jax.kinds import KINDS, SPLITS, load_seeds, loops, texts_at_hand
from specattn_jax.loading.tokenizer import Tokenizer
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.reporting.provenance import commit, hardware, versions
from specattn_jax.training.data import write_continuations

NOTE = "kinds.json"
# What a chat format puts after the token that begins a message.
_ROLE = re.compile(r"(system|user|assistant)\n")


@dataclasses.dataclass(frozen=True)
class WriteSettings:
    """How texts are written.

    Attributes:
        tokens: tokens written after each seed.
        least: tokens that a text has to have in the end; end tokens and their like are taken out.
        train: texts begun for training, of each kind, equally many at each temperature.
        valid: texts begun for evaluation, of each kind.
        kept: most texts for evaluation that are kept of each kind.
        temperatures: of the texts for training.
        valid_temperature: of those for evaluation.
        batch: texts written at once.
        seed: of everything random.
    """

    tokens: int = 2176
    least: int = 2048
    train: int = 192
    valid: int = 64
    kept: int = 16
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0)
    valid_temperature: float = 0.8
    batch: int = 320
    seed: int = 0


def write_kinds(
    target: LanguageModel,
    tokenizer: Tokenizer,
    out: Path,
    settings: WriteSettings,
    *,
    name: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes `train/KIND/*` and `valid/KIND/*` for every kind, and says in `kinds.json` how.

    Texts that loop or turn out much shorter than was written are left out.

    Args:
        target: who writes.
        tokenizer: the target's.
        out: a new or empty folder; it appears complete or not at all.
        settings: how.
        name: of the target.
        progress: told the part, texts written and texts in all.

    Returns:
        What `kinds.json` holds.

    Raises:
        UserError: no text of some kind was left, or `out` is taken or cannot be written.
    """
    texts = {split: _write(target, tokenizer, split, settings, progress) for split in SPLITS}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    with atomic_folder(out) as work:
        for split, kinds in texts.items():
            for kind, written in kinds.items():
                at_hand = texts_at_hand(kind, split)
                folder = work / split / kind
                folder.mkdir(parents=True)
                for copy, source in at_hand.items():
                    shutil.copyfile(source, folder / copy)
                kept = [text for text in written if text is not None]
                kept = kept[: settings.kept] if split == "valid" else kept
                for index, text in enumerate(kept):
                    (folder / f"written_{index:03d}.txt").write_text(text, encoding="utf-8")
                begun = len(written)
                counts.setdefault(split, {})[kind] = {"at_hand": len(at_hand), "begun": begun, "kept": len(kept)}
                if not kept:
                    raise UserError(f"target: of {begun} texts of {kind} that {name} wrote, all loop or end early.")
        note = {
            "target": name,
            "settings": dataclasses.asdict(settings),
            "texts": counts,
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware(),
        }
        write_json(work / NOTE, note)
    return json.loads(json.dumps(note))


def _write(
    target: LanguageModel,
    tokenizer: Tokenizer,
    split: str,
    settings: WriteSettings,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, list[str | None]]:
    """Texts of every kind for one part; None in place of those that cannot be used."""
    temperatures = settings.temperatures if split == "train" else (settings.valid_temperature,)
    share = max(1, (settings.train if split == "train" else settings.valid) // len(temperatures))
    texts: dict[str, list[str | None]] = {kind: [] for kind in KINDS}
    for turn, temperature in enumerate(temperatures):
        begun = [
            (kind, seeds[(index * len(temperatures) + turn) % len(seeds)])
            for kind in KINDS
            for seeds in [load_seeds(kind, split)]
            for index in range(share)
        ]

        def tell(done: int, before: int = turn * len(begun), total: int = len(begun) * len(temperatures)) -> None:
            if progress is not None:
                progress(f"the target writes to {split} on", before + done, total)

        prompts = [tokenizer.encode(seed, add_special=False) for _, seed in begun]
        # Texts for evaluation are of other chances than those for training.
        chance = 2 * (settings.seed * len(settings.temperatures) + turn) + SPLITS.index(split)
        written = write_continuations(
            target, prompts, settings.tokens, temperature, chance, batch=settings.batch, progress=tell
        )
        for (kind, seed), tokens in zip(begun, written.tolist(), strict=True):
            text = seed + to_text(tokenizer, tokens)
            long_enough = len(tokenizer.encode(text, add_special=False)) >= settings.least
            texts[kind].append(text if long_enough and not loops(text) else None)
    return texts


def to_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """What was written, as plain text: where the target ended a text and began another stands an empty line."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token in tokenizer.special_ids:
            parts.append([])
        else:
            parts[-1].append(token)
    first, *others = [tokenizer.decode(part) for part in parts]
    # The roles of a chat format are no text.
    rest = [text.strip() for text in (_ROLE.sub("", other, count=1) for other in others)]
    return "\n\n".join([first, *filter(None, rest)])
