"""Measures the lossless modes on a real pair: near-ties, what each level accepts, and texts that repeat themselves.

    python scripts/measure_lossless.py --pair qwen2.5-coder --out scripts/results/NAME/lossless.json

In 16 bits a pass over several tokens rounds otherwise than one over a single token, so that of two nearly equal tokens
the other one may win. Every text that a mode wrote is read again token by token; a token that would not have been
chosen there counts as differing, and its gap is by how much its log-probability is below that of the one chosen. Of
`hierarchical`, whose levels run ahead by what was kept, acceptance is said of a single prompt too.

The last table is of requests whose answer repeats the prompt: a function that is to be edited, and sentences that are
to be quoted.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from specattn_jax import Request, generate, load_pair
from specattn_jax.bench.decode_methods import (
    ALONE,
    AUTO_LOSSLESS,
    AUTOREGRESSIVE,
    HIERARCHY,
    HIERARCHY_OF_TEXT,
    LOOKUP,
    SPARSE_DRAFT,
    SPECULATIVE,
)
from specattn_jax.bench.decode_real import book_prompts, real_method
from specattn_jax.decoding.protocol import Models
from specattn_jax.files import write_json
from specattn_jax.loading.pair import ModelPair
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.reporting.provenance import commit, hardware, versions
from specattn_jax.runtime.results import Generation
from specattn_jax.runtime.session import Memory, Session
from specattn_jax.texts import read_text, shipped_books

MODES = (AUTOREGRESSIVE, SPECULATIVE, SPARSE_DRAFT, HIERARCHY, HIERARCHY_OF_TEXT, ALONE, LOOKUP)
LONGER = "lookup, window 10"
REPEATING = (*MODES, LONGER, AUTO_LOSSLESS)
TABLES = ("near_ties", "single", "repeating")
QUESTIONS = CODE_EDIT, QUOTATIONS = "code edit", "quotations"


def repeating_prompts(characters: int) -> dict[str, str]:
    """What is asked for, by name: questions whose answers stand in them, below so many characters of text."""
    code, method = inspect.getsource(textwrap), inspect.getsource(textwrap.TextWrapper._wrap_chunks)
    if len(code) > characters:
        # What is to be written again stands at the end of what is left.
        code = code[: code.index(method) + len(method)][-characters:]
    book = read_text(shipped_books("valid")[0])
    chapter = book[len(book) // 2 :][:characters]
    return {
        CODE_EDIT: (
            f"```python\n{code}\n```\n\nWrite the class TextWrapper's method _wrap_chunks again, whole, with the "
            "variable cur_line renamed to line and cur_len renamed to length. Answer with the code alone."
        ),
        QUOTATIONS: f"{chapter}\n\nQuote the first three paragraphs of this text, word for word.",
    }


@jax.jit
def token_by_token(
    target: LanguageModel, cache: KVCache, tokens: Int32[Array, "B n"]
) -> tuple[Float[Array, "B rest"], Int32[Array, "B rest"]]:
    """Gaps and choices of every token but the first, read one at a time behind a prefilled cache."""

    def step(
        cache: KVCache, pair: tuple[Int32[Array, " B"], Int32[Array, " B"]]
    ) -> tuple[KVCache, tuple[Float[Array, " B"], Int32[Array, " B"]]]:
        token, following = pair
        read = forward(target, token[:, None], cache)
        log_probs = jax.nn.log_softmax(target.logits(read.hidden[:, -1]).astype(jnp.float32))
        there = jnp.take_along_axis(log_probs, following[:, None], axis=-1)[:, 0]
        return read.cache, (jnp.max(log_probs, axis=-1) - there, jnp.argmax(log_probs, axis=-1).astype(jnp.int32))

    _, (gaps, chosen) = jax.lax.scan(step, cache, (tokens[:, :-1].T, tokens[:, 1:].T))
    return gaps.T, chosen.T


def levels(results: Sequence[Generation]) -> dict[str, float]:
    """What was accepted per window, and where there is an inner level, per inner window of that."""
    inner = [one.inner_accepted_per_window for one in results if one.inner_accepted_per_window is not None]
    found = {"accepted_per_window": statistics.mean(one.accepted_per_window for one in results)}
    return found | ({"inner_accepted_per_window": statistics.mean(inner)} if inner else {})


def near_ties(pair: ModelPair, prompts: Sequence[Sequence[int]], new: int) -> list[dict[str, Any]]:
    """One row per mode: how many of its tokens would not have been chosen one at a time, and by how much."""
    session, rows = Session(Models(pair.target)), []
    for name in MODES:
        models, how = real_method(pair, name)
        run = generate(models, prompts, Request(max_new_tokens=new, stop_at_eos=False, **how))
        tokens = jnp.asarray([result.tokens for result in run.results], jnp.int32)
        state = session.prefill(prompts, new)
        gaps, chosen = map(np.asarray, token_by_token(pair.target, state.target_cache, tokens))
        differs = chosen != np.asarray(tokens[:, 1:])
        windows = sum(result.windows for result in run.results)
        rows.append(
            {
                "mode": name,
                "tokens": int(differs.size),
                "windows": windows,
                "differing": int(differs.sum()),
                "share_of_windows": float(differs.sum() / windows),
                "largest_gap": float(gaps[differs].max()) if differs.any() else 0.0,
                "median_gap": float(np.median(gaps[differs])) if differs.any() else 0.0,
            }
            | levels(run.results)
        )
        print(rows[-1], flush=True)
    return rows


def single(pair: ModelPair, prompt: Sequence[int], new: int) -> list[dict[str, Any]]:
    """One row per hierarchy: what its levels accept behind one prompt."""
    rows = []
    for name in (HIERARCHY, HIERARCHY_OF_TEXT):
        models, how = real_method(pair, name)
        run = generate(models, [prompt], Request(max_new_tokens=new, stop_at_eos=False, **how))
        rows.append({"mode": name, "windows": run.results[0].windows} | levels(run.results))
        print(rows[-1], flush=True)
    return rows


def repeating_method(pair: ModelPair, name: str) -> tuple[ModelPair, dict[str, Any]]:
    """Who is asked, and what."""
    return (pair, {"mode": LOOKUP, "window": 10}) if name == LONGER else real_method(pair, name)


def repeated(pair: ModelPair, new: int, characters: int, turns: int, questions: Sequence[str]) -> list[dict[str, Any]]:
    """One row per question and mode: what was accepted, and how fast; all modes in turns, once more to compile."""
    rows, prompts, asked = [], {}, repeating_prompts(characters)
    for name in questions:
        prompts[name] = pair.tokenizer.encode(pair.tokenizer.apply_chat([{"role": "user", "content": asked[name]}]))
    # As much room for each, so that they share programs.
    slots = max(map(len, prompts.values())) + new + 64
    for name, prompt in prompts.items():
        runs: dict[str, list[Any]] = {mode: [] for mode in REPEATING}
        for _ in range(1 + turns):
            for mode, found in runs.items():
                models, how = repeating_method(pair, mode)
                memory = Memory(slots=slots)
                found.append(generate(models, [prompt], Request(max_new_tokens=new, **how), memory=memory))
        for mode, (_, *timed) in runs.items():
            result, seconds = timed[-1].results[0], statistics.median(run.timing.decode_s for run in timed)
            rows.append(
                {
                    "question": name,
                    "mode": mode,
                    "chosen": f"{result.mode} {result.window}",
                    "prompt_tokens": result.prompt_tokens,
                    "new_tokens": len(result.tokens),
                    "windows": result.windows,
                    **levels([result]),
                    "decode_seconds": seconds,
                    "tokens_per_second": len(result.tokens) / seconds,
                    "text": result.text,
                }
            )
            print({key: value for key, value in rows[-1].items() if key != "text"}, flush=True)
    return rows


def main() -> None:
    """Measures what is wanted, and writes after each table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="qwen2.5-coder")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt", type=int, default=8000, help="tokens of each prompt of the first table")
    parser.add_argument("--batch", type=int, default=16, help="prompts of the first table")
    parser.add_argument("--characters", type=int, default=20_000, help="of each text of the last table, at most")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="of the last table")
    parser.add_argument("--turns", type=int, default=3, help="timed runs of the last table, at least 1")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pair = load_pair(options.pair, dtype=options.dtype)
    prompts = book_prompts(pair, options.prompt, options.batch)
    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "near_ties": lambda: near_ties(pair, prompts, options.new),
        "single": lambda: single(pair, prompts[0], options.new),
        "repeating": lambda: repeated(pair, options.new, options.characters, options.turns, options.questions),
    }
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    report: dict[str, Any] = {"command": asked, "versions": versions(), "commit": commit(), "hardware": hardware()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.tables:
        report[name] = tables[name]()
        write_json(options.out, report)


if __name__ == "__main__":
    main()
