"""The demo: one book passage, continued with dense and with sparse verification, and what each cost."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from specattn_jax.cli.process import importing, prepare_process
from specattn_jax.cli.terminal import mendable_errors, stage_bar
from specattn_jax.texts import find_text, read_text

if TYPE_CHECKING:
    from specattn_jax.loading.tokenizer import Tokenizer
    from specattn_jax.runtime.request import Mode
    from specattn_jax.runtime.results import Generations

BOOK, FIRST_WORDS = "pride_and_prejudice", "It is a truth universally acknowledged"
NAMES: dict[Mode, str] = {"speculative": "dense", "specattn": "SpecAttn"}


def passage(tokenizer: Tokenizer, at_least: int) -> str:
    """The book from its first sentence to the end of the paragraph in which token `at_least` falls."""
    text = read_text(find_text(BOOK))
    paragraphs = text[text.index(FIRST_WORDS) :].split("\n\n")
    count = tokens = 0
    while tokens < at_least and count < len(paragraphs):
        count += 1
        tokens += len(tokenizer.encode(paragraphs[count - 1] + "\n\n"))
    return "\n\n".join(paragraphs[:count])


def run_both(options: argparse.Namespace) -> tuple[str, dict[Mode, Generations]]:
    """The passage, and what each way of verifying made of it."""
    with importing():
        from specattn_jax.loading.pair import load_pair
        from specattn_jax.runtime.generate import generate

    runs: dict[Mode, Generations] = {}
    with stage_bar() as bar:
        bar.wait("loading SmolLM2-135M")
        pair = load_pair("smollm2", alignment=options.alignment, progress=bar.bytes)
        prompt = passage(pair.tokenizer, options.prompt_tokens)
        for mode, name in NAMES.items():

            def on_prefill(done: int, total: int, name: str = name) -> None:
                if done < total:
                    bar.steps(f"{name}: target and draft read the prompt", done, total)
                else:
                    bar.wait(f"{name}: writing {options.max_new_tokens} tokens")

            bar.wait(f"{name}: compiling")
            runs[mode] = generate(
                pair,
                [prompt],
                mode=mode,
                kv_reduction=options.kv_reduction if mode == "specattn" else None,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=0.9,
                seed=options.seed,
                on_prefill=on_prefill,
            )
    return prompt, runs


def results_table(runs: dict[Mode, Generations]) -> Table:
    """What each way of verifying cost."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("verifi-\ncation", no_wrap=True)
    for column in ("tokens/s", "accepted\nper window", "cache reads\nsaved", "windows", "prefill", "decode"):
        table.add_column(column, justify="right", no_wrap=True)
    for mode, run in runs.items():
        result = run.results[0]
        table.add_row(
            NAMES[mode],
            f"{run.tokens_per_s:.1f}",
            f"{result.accepted_per_window:.2f}",
            f"{result.kv_reduction:.1%}",
            str(result.windows),
            f"{run.timing.prefill_s:.1f} s",
            f"{run.timing.decode_s:.1f} s",
        )
    return table


def flowing(text: str) -> str:
    """A text without the line ends of the printed book, so that it fits any column; paragraphs stay apart."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text.strip())


def show(prompt: str, runs: dict[Mode, Generations]) -> None:
    """Prints the end of the passage, both continuations side by side, and the table."""
    console = Console(highlight=False)
    tokens = runs["specattn"].results[0].prompt_tokens
    end = flowing(prompt[-500:].split(" ", 1)[-1])
    console.print(Panel(Text(f"[...] {end}"), title=f"Pride and Prejudice: the end of a prompt of {tokens:,} tokens"))
    width = max(36, (console.width - 1) // 2)
    panels = [
        Panel(Text(flowing(run.results[0].text)), title=f"continued, {NAMES[mode]}", width=width)
        for mode, run in runs.items()
    ]
    console.print(Columns(panels, padding=(0, 1)))
    console.print(results_table(runs))


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=2000, help="length of the passage, at least")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--kv-reduction", type=float, default=0.75, help="share of the cache reads to save")
    # Greedy text of so small a model soon repeats itself.
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alignment", default="default", help="folder written by `specattn calibrate`")
    options = parser.parse_args()
    prepare_process()
    with mendable_errors():
        show(*run_both(options))


if __name__ == "__main__":
    main()
