"""`specattn bench`: how fast things are on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import print_json, print_table, stage_bar
from specattn_jax.errors import UserError

if TYPE_CHECKING:
    from specattn_jax.bench.runner import Benchmark

GRIDS = ("tiny", "small", "precision", "full")
DECODE_GRIDS = ("tiny", "small", "full")
REQUEST_GRIDS = ("tiny", "small", "real", "lossless")
Out = Annotated[Path, typer.Option(help="Folder for results; the same command again goes on.", show_default=False)]
Minutes = Annotated[
    float | None, typer.Option(help="Stop after so long and keep what was measured.", show_default="no limit")
]
Cases = Annotated[
    list[str] | None,
    typer.Option(help='Part of a case to measure, such as "B8 S32768"; may be repeated.', metavar="PART"),
]

bench = typer.Typer(help="Measure how fast the parts are on this machine.", no_args_is_help=True)


@bench.callback()
def bench_group() -> None:
    """Measure how fast the parts are on this machine."""


@bench.command("kernels")
def bench_kernels_command(
    out: Out,
    grid: Annotated[str, typer.Option(help=f"What to measure: {', '.join(GRIDS)}.", metavar="GRID")] = "small",
    minutes: Minutes = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A contender to measure; may be repeated.", metavar="CONTENDER")
    ] = None,
    cases: Cases = None,
    as_json: options.Json = False,
) -> None:
    """Time every op with every backend against dense attention and sorting; writes kernels.json, .md and plots."""
    _check(grid, GRIDS, minutes)
    with importing():
        from specattn_jax.bench.kernels import kernel_benchmark
    _run(out, kernel_benchmark(grid), (minutes, only, cases), as_json)  # type: ignore[arg-type]


@bench.command("decode")
def bench_decode_command(
    out: Out,
    grid: Annotated[str, typer.Option(help=f"What to measure: {', '.join(DECODE_GRIDS)}.", metavar="GRID")] = "small",
    minutes: Minutes = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A method to measure; may be repeated.", metavar="METHOD")
    ] = None,
    cases: Cases = None,
    mesh: options.MeshBesideOne = None,
    as_json: options.Json = False,
) -> None:
    """Time whole windows of decoding, with random weights and with a real pair; writes decode.json, .md and plots."""
    _check(grid, DECODE_GRIDS, minutes)
    _claim_memory(mesh)
    with importing():
        from specattn_jax.bench.decode import decode_benchmark
    _run(out, decode_benchmark(grid, mesh), (minutes, only, cases), as_json)  # type: ignore[arg-type]


@bench.command("request")
def bench_request_command(
    out: Out,
    grid: Annotated[str, typer.Option(help=f"What to measure: {', '.join(REQUEST_GRIDS)}.", metavar="GRID")] = "small",
    minutes: Minutes = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A method to measure; may be repeated.", metavar="METHOD")
    ] = None,
    cases: Cases = None,
    mesh: options.MeshBesideOne = None,
    as_json: options.Json = False,
) -> None:
    """Time whole requests, from the prompt to the last new token; writes request.json, .md and a plot."""
    _check(grid, REQUEST_GRIDS, minutes)
    _claim_memory(mesh)
    with importing():
        from specattn_jax.bench.request import request_benchmark
    _run(out, request_benchmark(grid, mesh), (minutes, only, cases), as_json)  # type: ignore[arg-type]


def _claim_memory(mesh: str | None) -> None:
    """The largest case fills an 80 GB card, of which JAX would take three quarters; read when a device is asked for.

    What devices meet with needs room besides.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96" if mesh is None else "0.92")


def _check(grid: str, grids: tuple[str, ...], minutes: float | None) -> None:
    if grid not in grids:
        raise UserError(f"--grid is {grid!r}; expected one of {', '.join(grids)}.")
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes is {minutes}; expected more than 0.")


def _run(
    out: Path,
    benchmark: Benchmark,
    limits: tuple[float | None, list[str] | None, list[str] | None],
    as_json: bool,
) -> None:
    """Measures, and shows what was measured."""
    from specattn_jax.bench.runner import Limits, run_benchmark

    minutes, only, cases = limits
    with stage_bar() as bar:
        report = run_benchmark(out, benchmark, Limits(minutes, only or (), cases or ()), bar.steps)
    _show(out, report, benchmark.file, as_json)


def _show(out: Path, report: dict[str, Any], name: str, as_json: bool) -> None:
    """The facts of a finished run; in JSON its points too."""
    points = report["points"]
    failed = [point for point in points if point["failure"] is not None]
    if as_json:
        print_json(
            {"out": str(out), **{key: value for key, value in report.items() if key != "points"}}
            | {"measured": len(points) - len(failed), "failed": len(failed), "points": points}
        )
    else:
        rows = [
            ("device", f"{report['device']}, copies {report['copy_bytes_per_second'] / 1e9:.0f} GB/s"),
            ("points", f"{len(points) - len(failed)} measured, {len(failed)} failed"),
            ("written", f"{out / name}.json, {name}.md and plots"),
        ]
        if not report["complete"]:
            rows.append(("unfinished", "the same command goes on"))
        print_table(rows)
