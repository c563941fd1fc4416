"""Lets a target write texts of every kind, for calibration, training and evaluation.

`--out DIR` gets `train/KIND` and `valid/KIND`, which `--text DIR/train` and `--text DIR/valid` name, and `kinds.json`,
which says how they were made. Books and sources of the running Python are copied beside what the target wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from specattn_jax.loading.pair import choose_dtype
from specattn_jax.loading.resolve import load_model
from specattn_jax.training.writing import WriteSettings, write_kinds


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2", help="preset or model whose target writes")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    for field in dataclasses.fields(WriteSettings):
        if isinstance(field.default, int | float):
            parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    pair, dtype, out = (options.pop(name) for name in ("pair", "dtype", "out"))
    target, tokenizer = load_model(pair, dtype=choose_dtype(dtype))
    note = write_kinds(
        target, tokenizer, out, WriteSettings(**options), name=pair, progress=lambda *step: print(*step, flush=True)
    )
    print(json.dumps(note["texts"]), flush=True)


if __name__ == "__main__":
    main()
