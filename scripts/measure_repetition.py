"""Measures how much more a model's own words repeat than the prompt does that they follow.

    python scripts/measure_repetition.py --pairs smollm2 qwen2.5-coder --out scripts/results/NAME.json

`auto` has to guess at first how often looking up in the text would be right; all that it has is the prompt. Prompts of
a novel, of a play and of Python's standard library are continued, greedily and with temperature .8. For both is counted
how often prompt lookup would have been right, and for how many of the next tokens in a row.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specattn_jax import generate, load_pair
from specattn_jax.files import write_json
from specattn_jax.loading.pair import ModelPair
from specattn_jax.planning.acceptance import ROW, Replay
from specattn_jax.reporting.provenance import commit, given, hardware, versions
from specattn_jax.texts import find_text, read_text, spread_parts

BOOKS = {"novel": "pride_and_prejudice", "play": "shakespeare"}
MODULES = ("argparse", "tarfile", "typing", "mailbox")
TEMPERATURES = (0.0, 0.8)


def prompts(pair: ModelPair, tokens: int, count: int) -> Mapping[str, Sequence[Sequence[int]]]:
    """So many prompts of each kind of text."""
    found: dict[str, Sequence[Sequence[int]]] = {}
    for kind, name in BOOKS.items():
        found[kind] = spread_parts(pair.encode(read_text(find_text(name))[:800_000]), tokens, count)
    sources = [importlib.util.find_spec(name) for name in MODULES[:count]]
    texts = [pair.encode(read_text(Path(source.origin))) for source in sources if source and source.origin]
    return {**found, "code": [text[len(text) // 4 :][:tokens] for text in texts]}


def measure(prompt: Sequence[int], new: Sequence[int]) -> dict[str, Any]:
    """Shares of a prompt's and of new tokens that looking up has right, and mean tokens in a row, of `ROW`."""
    replay, rows = Replay(), {}
    for part, text in (("prompt", prompt), ("output", new)):
        found, in_a_row = replay.found, replay.in_a_row
        replay.push(text)
        rows[part] = {
            "found": (replay.found - found) / len(text),
            "in_a_row": (replay.in_a_row - in_a_row) / len(text),
        }
    return rows


def main() -> None:
    """Writes one file; what is done is written after each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=["smollm2"])
    parser.add_argument("--tokens", type=int, default=1024, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=3, help="of each kind of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    facts = {"commit": commit(), "hardware": hardware(), "versions": versions(), "row": ROW}
    for name in options.pairs:
        pair = load_pair(name, "none")
        for kind, texts in prompts(pair, options.tokens, options.prompts).items():
            for temperature in TEMPERATURES:
                how = {"mode": "autoregressive", "stop_at_eos": False, "seed": options.seed}
                run = generate(pair, texts, max_new_tokens=options.new_tokens, temperature=temperature, **how)
                for text, result in zip(texts, run.results, strict=True):
                    about = {"pair": name, "kind": kind, "temperature": temperature}
                    rows.append({**about, **measure(text, result.tokens)})
                    print({**about, **{part: rows[-1][part]["found"] for part in ("prompt", "output")}}, flush=True)
        write_json(options.out, {"command": given(vars(options)), **facts, "rows": rows})


if __name__ == "__main__":
    main()
