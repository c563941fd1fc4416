"""`specattn bench`: how fast things are on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import print_json, print_table, stage_bar
from specattn_jax.errors import UserError

GRIDS = ("tiny", "small", "precision", "full")
DECODE_GRIDS = ("tiny", "small", "full")

bench = typer.Typer(help="Measure how fast the parts are on this machine.", no_args_is_help=True)


@bench.callback()
def bench_group() -> None:
    """Measure how fast the parts are on this machine."""


@bench.command("kernels")
def bench_kernels_command(
    out: Annotated[Path, typer.Option(help="Folder for results; the same command again goes on.", show_default=False)],
    grid: Annotated[str, typer.Option(help=f"What to measure: {', '.join(GRIDS)}.", metavar="GRID")] = "small",
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so long and keep what was measured.", show_default="no limit")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Time every op with every backend against dense attention and sorting; writes kernels.json, .md and plots."""
    if grid not in GRIDS:
        raise UserError(f"--grid is {grid!r}; expected one of {', '.join(GRIDS)}.")
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes is {minutes}; expected more than 0.")

    with importing():
        from specattn_jax.bench.kernels import KernelSettings, run_kernel_benchmark

    with stage_bar() as bar:
        report = run_kernel_benchmark(out, KernelSettings(grid, minutes), bar.steps)  # type: ignore[arg-type]
    _show(out, report, "kernels", as_json)


@bench.command("decode")
def bench_decode_command(
    out: Annotated[Path, typer.Option(help="Folder for results; the same command again goes on.", show_default=False)],
    grid: Annotated[str, typer.Option(help=f"What to measure: {', '.join(DECODE_GRIDS)}.", metavar="GRID")] = "small",
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so long and keep what was measured.", show_default="no limit")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="The one method to measure.", metavar="METHOD", show_default="all")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Time whole windows of decoding, with random weights and with a real pair; writes decode.json, .md and plots."""
    if grid not in DECODE_GRIDS:
        raise UserError(f"--grid is {grid!r}; expected one of {', '.join(DECODE_GRIDS)}.")
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes is {minutes}; expected more than 0.")
    # The largest case fills an 80 GB card, of which JAX would take three quarters; read when a device is asked for.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96")

    with importing():
        from specattn_jax.bench.decode import DecodeBenchmark, run_decode_benchmark

    with stage_bar() as bar:
        report = run_decode_benchmark(out, DecodeBenchmark(grid, minutes, only), bar.steps)  # type: ignore[arg-type]
    _show(out, report, "decode", as_json)


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
