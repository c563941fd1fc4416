"""Measures what it costs that a draft reads sparsely, for a calibrated alignment in which that is missing.

`specattn calibrate` does this at its end. Alignments of before, and those made with other settings, get it here: each
length is read in passages of its own, and the alignment is written anew with what was found, otherwise as it was.

    python scripts/measure_draft_costs.py --pair qwen2.5-coder --text kinds/train --out DIR
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from specattn_jax.calibration.draft_reads import measure_draft_reads
from specattn_jax.calibration.passages import CalibrationSettings, choose_passages, usual_passages
from specattn_jax.files import atomic_folder, write_json
from specattn_jax.loading.pair import ModelPair, load_pair
from specattn_jax.reporting.provenance import commit, given, hardware, versions
from specattn_jax.selection.alignment import Alignment, join_alignments, load_alignment, save_alignment
from specattn_jax.selection.policy import load_policy
from specattn_jax.texts import UNNAMED, Documents, find_kinds, name_texts, read_text, shipped_books


def measured(pair: ModelPair, alignment: Alignment, texts: Documents, settings: CalibrationSettings) -> Alignment:
    """The alignment of one length with the KL of each share that the draft may read."""
    # Calibration looks at windows whose last begins `window + 1` tokens before the end.
    settings = dataclasses.replace(settings, context=alignment.length + settings.window + 1)
    passages = choose_passages(texts, settings, np.random.default_rng(settings.seed))
    return measure_draft_reads(
        pair.target,
        pair.need_draft(),
        alignment,
        load_policy("default"),
        jnp.stack([passage.tokens for passage in passages]),
        window=settings.window,
        windows=settings.draft_windows,
    )


def main() -> None:
    """Writes the alignment into `--out`, and what was measured into costs.json in there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--alignment", type=Path, help="a folder; without it the pair's own")
    parser.add_argument("--text", nargs="+", default=[], help="as --text of the command; the shipped books without")
    parser.add_argument("--passages", type=int, help="of all kinds of text in turn; without it two of each")
    parser.add_argument("--seed", type=int, default=1, help="of where passages begin")
    parser.add_argument("--again", action="store_true", help="also where it has been measured")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pair = load_pair(options.pair, dtype=options.dtype)
    alignment = pair.alignment if options.alignment is None else load_alignment(options.alignment)
    if alignment is None:
        parser.error(f"{options.pair} has no alignment; name one with --alignment.")
    paths = find_kinds(options.text) or {UNNAMED: shipped_books("train")}
    texts = {
        kind: [pair.tokenizer.encode(read_text(path), add_special=False) for path in files]
        for kind, files in paths.items()
    }
    settings = CalibrationSettings(passages=options.passages or usual_passages(len(paths)), seed=options.seed)
    every = [
        measured(pair, one, texts, settings) if options.again or not one.draft_losses else one
        for one in alignment.every
    ]
    found = {str(one.length): one.draft_losses for one in every}
    print(found)
    with atomic_folder(options.out) as folder:
        save_alignment(join_alignments(every), folder)
        facts = {"commit": commit(), "hardware": hardware(), "versions": versions(), "texts": name_texts(paths)}
        write_json(folder / "costs.json", {"command": given(vars(options)), **facts, "kl_by_length": found})


if __name__ == "__main__":
    main()
