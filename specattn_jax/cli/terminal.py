"""What people and programs see: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from specattn_jax.errors import UserError, is_out_of_memory
from specattn_jax.files import first_line, is_taken
from specattn_jax.texts import decode_text, read_text

if TYPE_CHECKING:
    from specattn_jax.loading.tokenizer import Tokenizer

# Highlighting off: numbers in a sentence are not worth a colour.
console = Console(stderr=True, highlight=False)


def on_terminal() -> bool:
    """Whether stderr can be drawn over. Notebooks set FORCE_COLOR, by which rich believes so where it cannot."""
    return console.is_terminal and sys.stderr.isatty()


def say(message: str, style: str = "") -> None:
    """One line for people, never wrapped, so that it can be searched and copied."""
    console.print(Text(message, style=style), soft_wrap=True)


def say_notes(notes: Sequence[str]) -> None:
    """What makes a result doubtful, a line each."""
    for note in notes:
        say(f"note: {note}", style="dim")


def print_errors_alone() -> None:
    """Lets another process say all the rest."""
    console.quiet = True
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives


def say_error(message: str) -> None:
    """One line that says what went wrong, also where it quotes a name of several lines."""
    console.quiet = False
    console.print(Text.assemble(("Error: ", "bold red"), "\\n".join(message.splitlines())), soft_wrap=True)


@contextlib.contextmanager
def mendable_errors() -> Iterator[None]:
    """Turns what a person can mend into one sentence and exit status 1, an interruption into a word and status 130."""
    try:
        yield
    except UserError as error:
        say_error(str(error))
        raise SystemExit(1) from error
    except KeyboardInterrupt as interrupt:
        say("Interrupted.")
        raise SystemExit(130) from interrupt
    except Exception as error:
        if problem := _missing_platform():
            say_error(problem)
            raise SystemExit(1) from error
        if _joined():
            say_error(f"a process of several failed, or another one has gone ({first_line(error)[:300]}).")
            # Not in the usual way, which waits for the others.
            sys.stderr.flush()
            os._exit(1)
        if not is_out_of_memory(error):
            raise
        say_error("the device ran out of memory; use a smaller model, a shorter context or --dtype bfloat16.")
        raise SystemExit(1) from error


def _joined() -> bool:
    """Whether this is one of several processes that share a mesh."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def _missing_platform() -> str | None:
    """What is wrong with JAX_PLATFORMS, if JAX cannot start with it; asked only once something has failed."""
    named = os.environ.get("JAX_PLATFORMS")
    if not named:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX was built without that platform
        reason = first_line(error).partition(" (set JAX_PLATFORMS")[0] if str(error) else "JAX was built without it"
        return f"JAX_PLATFORMS is {named!r}, but JAX finds no such device here ({reason}); unset it, or set it to cpu."
    return None


@contextlib.contextmanager
def writable_output() -> Iterator[None]:
    """Turns output that cannot be written, as into a full disk, into one sentence and exit status 1.

    A reader that has gone (a broken pipe) is left to typer, which ends quietly.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        # What is still buffered must not fail once more when the program ends.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        where = f"{error.filename}" if error.filename else "the output"
        say_error(f"{where} cannot be written ({error.strerror}); free some space, or write somewhere else.")
        raise SystemExit(1) from error


def print_json(report: Mapping[str, Any]) -> None:
    """The one JSON object on stdout."""
    print(json.dumps(report, allow_nan=False), flush=True)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, for people. Long values are not cut, so that paths can be copied."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), value), soft_wrap=True)


def size(count: float) -> str:
    """Bytes in the largest binary unit that keeps the number readable."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


class _Amount(ProgressColumn):
    """How far a stage is, in the unit of the stage."""

    def __init__(self) -> None:
        super().__init__()
        self._columns: dict[str, ProgressColumn] = {"bytes": DownloadColumn(), "steps": MofNCompleteColumn()}

    def render(self, task: Task) -> Text:
        """The amount; empty while the total is unknown."""
        return Text("") if task.total is None else Text(str(self._columns[task.fields["unit"]].render(task)))


class StageBar:
    """One bar on stderr that shows the stage at hand; it appears with the first stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, unit="steps", note="")
        self._stage = ""
        self._shown = False

    def bytes(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes of a stage are there."""
        self._show(stage, done, total, "bytes")

    def steps(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Shows that `done` of `total` steps are done, and a note beside it."""
        self._show(stage, done, total, "steps", note)

    def read_documents(self, paths: Mapping[str, Sequence[Path]], tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
        """Token ids of each text, by kind, showing how many are read."""
        documents: dict[str, list[list[int]]] = {kind: [] for kind in paths}
        total = sum(map(len, paths.values()))
        for index, (kind, path) in enumerate((kind, path) for kind, files in paths.items() for path in files):
            self.steps("reading texts", index, total)
            documents[kind].append(tokenizer.encode(read_text(path), add_special=False))
        return documents

    def wait(self, stage: str) -> None:
        """Shows a stage of unknown length."""
        self._show(stage, 0, None, "steps")

    def hide(self) -> None:
        """Takes the bar away, so that text can be written."""
        if self._shown:
            self._progress.stop()
        self._shown = False

    def _show(self, stage: str, done: int, total: int | None, unit: str, note: str = "") -> None:
        if self._progress.disable:
            return
        if total is None or stage != self._stage:
            # A task of its own: a known total cannot be forgotten again.
            self._progress.remove_task(self._task)
            self._task = self._progress.add_task(stage, total=total, unit=unit, note=note)
            self._stage = stage
        self._progress.update(self._task, completed=done, total=total, note=note)
        if not self._shown:
            self._progress.start()
        self._shown = True


@contextlib.contextmanager
def stage_bar(*, keep: bool = False) -> Iterator[StageBar]:
    """A bar that vanishes at the end, unless its last state is to be kept."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _Amount(),
        TextColumn("{task.fields[note]}"),
    )
    # Into a file, only a bar that is kept is worth writing.
    disable = not (keep or on_terminal())
    bar = StageBar(Progress(*columns, console=console, transient=not keep, disable=disable))
    try:
        yield bar
    finally:
        bar.hide()


def read_stdin() -> str:
    """All of stdin, as UTF-8.

    Raises:
        UserError: it is not UTF-8 (says where), or closed.
    """
    return decode_text(open_stdin().read(), "stdin")


def open_stdin() -> BinaryIO:
    """Stdin, as bytes.

    Raises:
        UserError: whoever started the program has closed it.
    """
    if sys.stdin is None:
        raise UserError("stdin is closed; expected a text there: give it one, or name a file.")
    return sys.stdin.buffer


def check_out(out: Path) -> None:
    """Refuses an output folder that is taken, before anything slow begins.

    Raises:
        UserError: it is a file, or holds something.
    """
    if is_taken(out):
        raise UserError(f"--out: {out} exists already; expected a new or empty folder; choose another or remove it.")
