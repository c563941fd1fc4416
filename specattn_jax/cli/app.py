"""The commands, put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import specattn_jax
from specattn_jax.cli.bench import bench
from specattn_jax.cli.calibrate import calibrate_command
from specattn_jax.cli.chat import chat_command
from specattn_jax.cli.estimate import estimate_command
from specattn_jax.cli.generate import generate_command
from specattn_jax.cli.models import convert_command, fetch_command, info_command
from specattn_jax.cli.perplexity import perplexity_command
from specattn_jax.cli.process import join_processes
from specattn_jax.cli.tasks import tasks_command
from specattn_jax.cli.terminal import mendable_errors, print_errors_alone, writable_output
from specattn_jax.cli.train_draft import train_draft_command


class _Commands(TyperGroup):
    """The commands, with errors for people."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Parses, runs, and writes what there is to write."""
        with writable_output():
            return super().main(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        with mendable_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="specattn",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"specattn {specattn_jax.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="Several processes share a mesh: HOST:PORT of process 0, or auto where the cluster tells.",
            metavar="HOST:PORT",
            show_default=False,
        ),
    ] = None,
    process_id: Annotated[int | None, typer.Option(help="Which of them this is; only 0 prints.", min=0)] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.", min=1)] = None,
) -> None:
    """SpecAttn: a draft model's attention decides which cache entries the target reads while it verifies."""
    if not join_processes(coordinator, process_id, processes):
        print_errors_alone()


app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("calibrate")(calibrate_command)
app.command("perplexity")(perplexity_command)
app.command("tasks")(tasks_command)
app.command("train-draft")(train_draft_command)
app.command("fetch")(fetch_command)
app.command("convert")(convert_command)
app.command("info")(info_command)
app.command("estimate")(estimate_command)
app.add_typer(bench, name="bench")
