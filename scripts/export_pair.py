"""Writes a pair and prompts for other libraries: two Hugging Face folders, and token ids of a shipped book.

python scripts/export_pair.py smollm2 --tokens 6144 --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from specattn_jax.loading import save_hf
from specattn_jax.loading.pair import load_pair
from specattn_jax.texts import read_text, shipped_books


def main() -> None:
    """Writes target/, draft/ and prompts.json, the prompts that `specattn bench request --grid real` continues."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair")
    parser.add_argument("--tokens", type=int, nargs="+", required=True, help="of each prompt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pair = load_pair(options.pair, alignment=None, dtype=options.dtype)
    for role, model in (("target", pair.target), ("draft", pair.draft)):
        save_hf(model, pair.tokenizer, options.out / role)
    book = read_text(shipped_books("valid")[0])[: 16 * max(options.tokens)]
    tokens = list(pair.encode(book))
    prompts = [tokens[:count] for count in options.tokens]
    (options.out / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")


if __name__ == "__main__":
    main()
