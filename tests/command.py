"""Running commands and scripts in the test's own process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner, Result

from specattn_jax.cli.app import app


def run(*arguments: object, stdin: bytes = b"") -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def mistake(*arguments: object, stdin: bytes = b"") -> str:
    """The one sentence that a mistake must end with."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert lines[0].endswith(".")
    return lines[0].removeprefix("Error: ")


def run_script(name: str, *arguments: object) -> int:
    """The exit status of a script, as if it were a program of its own."""
    path = str(Path(__file__).parents[1] / "scripts" / name)
    with mock.patch.object(sys, "argv", [path, *map(str, arguments)]):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0
