"""Running commands in the test's own process."""

from __future__ import annotations

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
