"""`specattn perplexity`: what reading less of the cache costs in quality."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import StageBar, console, on_terminal, print_json, print_table, say, stage_bar
from specattn_jax.errors import UserError
from specattn_jax.texts import UNNAMED

if TYPE_CHECKING:
    from specattn_jax.evaluation.tables import Row

_TABLE_WIDTH = 100


def perplexity_command(
    ctx: typer.Context,
    out: Annotated[
        Path,
        typer.Option(help="Folder for results; the same command again goes on where it stopped.", show_default=False),
    ],
    target: options.Target = "smollm2",
    draft: options.Draft = "default",
    alignment: options.MethodsAlignment = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help=f"{options.TEXTS_HELP} Each kind is evaluated apart.",
            metavar="F...",
            show_default="the shipped books for evaluation",
        ),
    ] = None,
    more_texts: options.MoreTexts = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of texts: pg19, streamed from the Hugging Face hub.", show_default=False)
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens per document.")] = 2048,
    prefill: Annotated[float, typer.Option(help="Share of each document that is prefilled densely.")] = 0.1,
    documents: Annotated[int, typer.Option(help="Documents, spread evenly over the texts (of each kind).")] = 4,
    batch: Annotated[int, typer.Option(help="Documents read at a time.")] = 4,
    methods: Annotated[
        str,
        typer.Option(
            help="Some of full (always there), streaming, quest, vegas, oracle, oracle_layer, specattn.",
            metavar="M,...",
        ),
    ] = "full,streaming,quest,oracle,specattn",
    kv_reduction: options.Savings = None,
    p: options.Masses = None,
    policy: options.Policies = "default,paper",
    window: options.Window = 5,
    drift_tokens: Annotated[
        int,
        typer.Option(help="Also generate this many tokens freely, to see how errors add up in the cache."),
    ] = 0,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    mesh: options.Mesh = None,
    as_json: options.Json = False,
) -> None:
    """Measure quality against cache reads saved, for several methods: perplexity, KL and top-1 fidelity.

    Writes table.json, table.md, pareto.png, alignment.png, selection.png and run.json.
    """
    names, policies = options.split_names(methods, "--methods"), options.split_names(policy, "--policy")
    savings, masses = options.split_reading(kv_reduction, p)
    if dataset is not None and (text or more_texts):
        raise UserError(f"--text and --dataset {dataset} both say what to read; give one of them.")
    paths = options.find_texts(text, more_texts, "valid") if dataset is None else {}
    began = time.perf_counter()

    with importing():
        from specattn_jax.evaluation.documents import cut_documents, load_dataset_preset, stream_texts, take_documents
        from specattn_jax.evaluation.methods import list_cases, without_p
        from specattn_jax.evaluation.perplexity import EvaluationSettings
        from specattn_jax.evaluation.report import evaluate_into, evaluate_kinds_into
        from specattn_jax.loading.pair import load_pair
        from specattn_jax.planning.mesh_choice import Wanted, default_mesh
        from specattn_jax.reporting.provenance import given

    if dataset is not None:
        load_dataset_preset(dataset)
    cases = list_cases(names, policies, savings=savings, masses=masses)
    settings = EvaluationSettings(prefill=prefill, window=window, batch=batch)
    if masses and without_p(names):
        say(f"Left out, because they read a given share and know no p: {', '.join(without_p(names))}.")
    with stage_bar() as bar:
        bar.wait("starting")
        mesh = mesh or default_mesh(target, draft, dtype, Wanted(batch, context, drift_tokens))
        pair = load_pair(target, draft, alignment=alignment or "default", dtype=dtype, mesh=mesh, progress=bar.bytes)
        if dataset is None:
            read = bar.read_documents(paths, pair.tokenizer)
            chosen = {kind: cut_documents(texts, context, documents) for kind, texts in read.items()}
        else:
            streamed = take_documents(
                stream_texts(dataset),
                functools.partial(pair.tokenizer.encode, add_special=False),
                context,
                documents,
                functools.partial(bar.steps, "streaming texts"),
            )
            chosen = {UNNAMED: streamed}
        source = dataset or ", ".join(path.name.split(".")[0] for path in paths.get(UNNAMED, []))
        how: dict[str, Any] = {
            "names": {"target": target, "draft": draft, "texts": source},
            "command": given(ctx.params),
            "drift_tokens": drift_tokens,
            "seed": seed,
            "progress": functools.partial(_show, bar),
        }
        if UNNAMED in chosen:
            results = evaluate_into(out, pair, chosen[UNNAMED], cases, settings, **how)
        else:
            results = evaluate_kinds_into(out, pair, chosen, cases, settings, **how)
    report = {"out": str(out), **results, "seconds": time.perf_counter() - began}
    if as_json:
        print_json(report)
    else:
        _print(report["rows"])
        print_table(_summary(report))


def _show(bar: StageBar, done: int, total: int, case: str, result: str) -> None:
    """Moves the bar; where there is none, such as in a log file, writes a line for everything that was measured."""
    note = f"{case}: {result}" if result else case
    bar.steps("reading documents", done, total, note)
    if result and not on_terminal():
        say(note)


def _print(rows: Sequence[Row]) -> None:
    """The table, for people."""
    from specattn_jax.evaluation.tables import short_cells

    header, cells = short_cells(rows)
    table = Table(box=box.SIMPLE)
    for name in header:
        table.add_column(name, justify="left" if name in ("kind", "method") else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    # Rather wrapped by a narrow terminal than cut.
    Console(stderr=True, highlight=False, width=max(console.width, _TABLE_WIDTH)).print(table, crop=False)


def _summary(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What is below the table."""
    drift = [
        (
            ", ".join(["drift", *([line["kind"]] if "kind" in line else []), line["label"]]),
            f"KL {line['kl_first_quarter']:.4f} in the first quarter of the new tokens, "
            f"{line['kl_last_quarter']:.4f} in the last",
        )
        for line in report["drift"]
    ]
    return [*drift, ("written", report["out"]), ("time", f"{report['seconds']:.0f} s")]
