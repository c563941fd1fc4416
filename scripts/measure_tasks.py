"""Measures the table of docs/tasks.md: RULER's offline tasks and our long answers, every method, on a real pair.

    python scripts/measure_tasks.py --pair qwen2.5-coder --lengths 4096 8192 16384 30000 --out scripts/results/NAME
    python scripts/measure_tasks.py --policies default sparse --variants FILE.toml --alignments at_16k=DIR --out DIR
    python scripts/measure_tasks.py --join DIR1 DIR2 --out DIR

It is `specattn tasks` with more savings for the method that counts: 75, 90 and 95 % for `default`, 75 and 90 % for the
others; `--methods` chooses among them, and takes the lossless modes besides. The same command goes on where it stopped;
`--minutes` ends it after the task at hand. Several processes, each with a folder of its own, may share the work;
`--join` makes one table of theirs.

Experiments take the place of all methods where `--policies` is given: each policy at each of `--savings`, with the
pair's own alignment and with each of `--alignments`, in rows of their own. `--variants` is a file like
configs/policies.toml with further policies. All of them are asked the same prompts, which are read once, with a draft
that sees `--draft-reach` tokens back. Another reach reads the prompts in another way: it needs a folder of its own.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from specattn_jax.evaluation.methods import FULL, SPECATTN, Case, Variant
from specattn_jax.evaluation.tasks.answering import LOSSLESS_MODES, SPECULATIVE
from specattn_jax.evaluation.tasks.report import join_results, write_results
from specattn_jax.evaluation.tasks.run import RULER, TASKS, TaskRun, TaskSettings, open_task_store
from specattn_jax.loading.pair import ModelPair, check_alignment, load_pair
from specattn_jax.reporting.provenance import given
from specattn_jax.runtime.session import DRAFT_REACH
from specattn_jax.selection.alignment import load_alignment
from specattn_jax.selection.policy import read_policies

CASES = (
    Case(FULL),
    Case(SPECULATIVE),
    *(Case(SPECATTN, "default", saving=saving) for saving in (0.75, 0.9, 0.95)),
    *(
        Case(method, policy, saving=saving)
        for method, policy in ((SPECATTN, "paper"), ("quest", None), ("streaming", None), ("oracle", None))
        for saving in (0.75, 0.9)
    ),
)


def experiments(options: argparse.Namespace, pair: ModelPair) -> list[Case]:
    """Full attention, and every policy with every alignment and saving."""
    policies = {} if options.variants is None else read_policies(options.variants)
    alignments = {None: None, **{name: load_alignment(Path(folder)) for name, folder in options.alignments}}
    for alignment in alignments.values():
        if alignment is not None:
            check_alignment(alignment, pair.target, pair.need_draft())
    return [
        Case(FULL),
        *(
            Case(SPECATTN, name, None, saving, alignment, Variant(policies.get(name), alignments[alignment]))
            for name, alignment, saving in itertools.product(options.policies, alignments, options.savings)
        ),
    ]


def chosen(methods: Sequence[str] | None) -> Sequence[Case]:
    """The methods of the table, or some of them and of the lossless modes."""
    if methods is None:
        return CASES
    more = [Case(mode) for mode in LOSSLESS_MODES if mode != SPECULATIVE]
    return [case for case in (*CASES, *more) if case.method in methods]


def reach(text: str) -> int | None:
    """Tokens, or None for all."""
    return None if text == "all" else int(text)


def named(text: str) -> tuple[str, str]:
    """A name and a folder."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text} is no NAME=DIR")
    return name, folder


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="qwen2.5-coder")
    parser.add_argument("--tasks", nargs="+", default=list(RULER), choices=TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 30000])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--batch", type=int, default=17, help="three of them hold 50 questions")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--methods", nargs="+", help="those of the table with these names, and lossless modes besides")
    parser.add_argument("--policies", nargs="+", help="of configs/policies.toml or --variants, in place of all methods")
    parser.add_argument("--savings", nargs="+", type=float, default=[0.75, 0.9], help="of --policies")
    parser.add_argument("--variants", type=Path, help="further policies, written like configs/policies.toml")
    parser.add_argument("--alignments", nargs="+", type=named, default=[], help="NAME=DIR: besides the pair's own")
    parser.add_argument("--draft-reach", type=reach, default=DRAFT_REACH.recent, help="a number of tokens, or all")
    parser.add_argument(
        "--slots", type=int, default=0, help="room in the caches for so many tokens, so that lengths share programs"
    )
    parser.add_argument("--minutes", type=float, help="begin no task after so many")
    parser.add_argument("--join", nargs="+", type=Path, help="folders of other runs: makes one table, measures nothing")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if (options.variants or options.alignments) and not options.policies:
        parser.error("--variants and --alignments need --policies")
    return options


def main() -> None:
    """Runs task after task, and writes the table after each."""
    options = parse()
    if options.join:
        join_results(options.join, options.out)
        return
    began = time.monotonic()
    pair = load_pair(options.pair, dtype=options.dtype)
    cases: Sequence[Case] = experiments(options, pair) if options.policies else chosen(options.methods)
    settings = TaskSettings(samples=options.samples, batch=options.batch, draft_reach=options.draft_reach)

    def tell(done: int, total: int, cell: str, result: str) -> None:
        if result:
            print(f"{time.monotonic() - began:.0f} s, {cell}: {result}", flush=True)

    run = TaskRun(pair, settings, open_task_store(options.out, pair, settings), tell, slots=options.slots)
    about = f"{options.pair}, {options.samples} questions of each task, {pair.target.dtype}, windows of 5."
    command = given(vars(options))
    rows = []
    for length in options.lengths:
        for task in options.tasks:
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                return
            rows += run.run([task], [length], cases)
            write_results(options.out, rows, about, command)


if __name__ == "__main__":
    main()
