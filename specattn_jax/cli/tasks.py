"""`specattn tasks`: what reading less of the cache costs in answers."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import StageBar, console, on_terminal, print_json, print_table, say, stage_bar

_TABLE_WIDTH = 120


def tasks_command(
    ctx: typer.Context,
    out: Annotated[
        Path,
        typer.Option(help="Folder for results; the same command again goes on where it stopped.", show_default=False),
    ],
    target: options.Target = "smollm2",
    draft: options.Draft = "default",
    alignment: options.MethodsAlignment = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Some of ruler (its six offline tasks), own (five of ours), or single ones by name.", metavar="T,..."
        ),
    ] = "ruler,own",
    lengths: Annotated[str, typer.Option(help="Most tokens of a prompt with its answer.", metavar="N,...")] = "4096",
    samples: Annotated[int, typer.Option(help="Questions of each task and length.")] = 50,
    batch: Annotated[int, typer.Option(help="Questions at a time.")] = 1,
    methods: Annotated[
        str,
        typer.Option(
            help="Some of full (always there), speculative, lookup, self, hierarchical, streaming, quest, vegas, "
            "oracle, oracle_layer, specattn.",
            metavar="M,...",
        ),
    ] = "full,streaming,quest,specattn",
    kv_reduction: options.Savings = None,
    p: options.Masses = None,
    policy: options.Policies = "default,paper",
    window: options.Window = 5,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat format.")] = False,
    dtype: options.Dtype = "auto",
    mesh: options.Mesh = None,
    as_json: options.Json = False,
) -> None:
    """Measure scores against cache reads saved: RULER, needles and long answers in books, code completion.

    Writes table.json, table.md, scores.png and run.json.
    """
    counts = options.split_lengths(lengths, "--lengths")
    savings, masses = options.split_reading(kv_reduction, p)
    began = time.perf_counter()

    with importing():
        from specattn_jax.evaluation.tasks.own import OWN_TASKS
        from specattn_jax.evaluation.tasks.report import write_results
        from specattn_jax.evaluation.tasks.run import (
            RULER,
            TaskRun,
            TaskSettings,
            check_tasks,
            list_task_cases,
            open_task_store,
        )
        from specattn_jax.loading.pair import load_pair
        from specattn_jax.planning.mesh_choice import Wanted, default_mesh
        from specattn_jax.reporting.provenance import given

    groups = {"ruler": RULER, "own": tuple(OWN_TASKS)}
    names = [one for name in options.split_names(tasks, "--tasks") for one in groups.get(name, (name,))]
    names = list(dict.fromkeys(names))
    check_tasks(names)
    cases = list_task_cases(
        options.split_names(methods, "--methods"),
        options.split_names(policy, "--policy"),
        savings=savings,
        masses=masses,
    )
    settings = TaskSettings(samples=samples, window=window, batch=batch, chat=chat)
    with stage_bar() as bar:
        bar.wait("starting")
        mesh = mesh or default_mesh(target, draft, dtype, Wanted(batch, max(counts), 128))
        pair = load_pair(target, draft, alignment=alignment or "default", dtype=dtype, mesh=mesh, progress=bar.bytes)
        run = TaskRun(pair, settings, open_task_store(out, pair, settings), functools.partial(_show, bar))
        rows = run.run(names, counts, cases)
    about = (
        f"{target}, drafted by {draft}, {samples} questions of each task, {pair.target.dtype}, windows of {window}; "
        "± is one standard error over questions."
    )
    write_results(out, rows, about, given(ctx.params))
    seconds = time.perf_counter() - began
    if as_json:
        print_json({"out": str(out), "rows": rows, "seconds": seconds})
    else:
        _print(rows)
        print_table([("written", str(out)), ("time", f"{seconds:.0f} s")])


def _show(bar: StageBar, done: int, total: int, cell: str, result: str) -> None:
    """Moves the bar; where there is none, such as in a log file, writes a line for everything that was measured."""
    note = f"{cell}: {result}" if result else cell
    bar.steps("answering", done, total, note)
    if result and not on_terminal():
        say(note)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    """The table, for people."""
    from specattn_jax.evaluation.tasks.report import cells

    header, lines = cells(rows)
    table = Table(box=box.SIMPLE)
    for name in header:
        table.add_column(name, justify="left" if name in ("task", "method") else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # Rather wrapped by a narrow terminal than cut.
    Console(stderr=True, highlight=False, width=max(console.width, _TABLE_WIDTH)).print(table, crop=False)
