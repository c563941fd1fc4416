"""Measures the table of docs/tasks.md: RULER's offline tasks and our long answers, every method, on a real pair.

    python scripts/measure_tasks.py --pair qwen2.5-coder --lengths 4096 8192 16384 30000 --out scripts/results/NAME

It is `specattn tasks` with more savings for the method that counts: 75, 90 and 95 % for `default`, 75 and 90 % for the
others; or, with `--policies`, these alone at 75 and 90 %. The same command goes on where it stopped; `--minutes` ends
it after the task at hand.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from specattn_jax.evaluation.methods import FULL, SPECATTN, Case
from specattn_jax.evaluation.tasks.answering import SPECULATIVE
from specattn_jax.evaluation.tasks.report import write_results
from specattn_jax.evaluation.tasks.run import RULER, TASKS, TaskRun, TaskSettings, open_task_store
from specattn_jax.loading.pair import load_pair

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


def main() -> None:
    """Runs task after task, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="qwen2.5-coder")
    parser.add_argument("--tasks", nargs="+", default=list(RULER), choices=TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 30000])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--batch", type=int, default=17, help="three of them hold 50 questions")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--policies", nargs="+", help="of configs/policies.toml, in place of all methods")
    parser.add_argument(
        "--slots", type=int, default=0, help="room in the caches for so many tokens, so that lengths share programs"
    )
    parser.add_argument("--minutes", type=float, help="begin no task after so many")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases: Sequence[Case] = CASES
    if options.policies:
        cases = [Case(FULL), *(Case(SPECATTN, name, saving=part) for name in options.policies for part in (0.75, 0.9))]
    began = time.monotonic()
    pair = load_pair(options.pair, dtype=options.dtype)
    settings = TaskSettings(samples=options.samples, batch=options.batch)

    def tell(done: int, total: int, cell: str, result: str) -> None:
        if result:
            print(f"{time.monotonic() - began:.0f} s, {cell}: {result}", flush=True)

    run = TaskRun(pair, settings, open_task_store(options.out, pair, settings), tell, slots=options.slots)
    about = f"{options.pair}, {options.samples} questions of each task, {pair.target.dtype}, windows of 5."
    command = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    rows = []
    for length in options.lengths:
        for task in options.tasks:
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                return
            rows += run.run([task], [length], cases)
            write_results(options.out, rows, about, command)


if __name__ == "__main__":
    main()
