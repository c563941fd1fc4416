"""What tasks gave, in one folder: rows as JSON, a table for people, and the picture of score against reads saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specattn_jax.errors import UserError
from specattn_jax.evaluation.tasks.own import OWN_TASKS
from specattn_jax.files import atomic_file, read_json, sensible
from specattn_jax.reporting.plots import as_png, new_figure
from specattn_jax.reporting.provenance import commit, hardware, versions

TABLE, MARKDOWN, PICTURE, RUN = "table.json", "table.md", "scores.png", "run.json"
Row = Mapping[str, Any]
_HEADER = ("task", "tokens", "method", "reads saved", "score", "new tokens", "windows", "accepted", "requests/min")


def write_results(out: Path, rows: Sequence[Row], about: str, command: Mapping[str, Any]) -> None:
    """Writes table.json, table.md, scores.png and run.json.

    Args:
        out: the folder.
        rows: from `TaskRun.run`.
        about: a sentence about them.
        command: what was asked for, as JSON.

    Raises:
        UserError: they cannot be written.
    """
    _write(out, rows, about, {"command": command, "versions": versions(), "commit": commit(), "hardware": hardware()})


def join_results(folders: Sequence[Path], out: Path) -> list[Row]:
    """One table of those of several folders, which other processes wrote; `run.json` has all of theirs.

    What stands in several of them is taken from the first one, such as full attention, which each process measures.

    Args:
        folders: from `write_results`.
        out: a folder for the joined results.

    Returns:
        the rows, length by length and task by task.

    Raises:
        UserError: a folder holds no results, or two asked different questions.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    about, runs = [], []
    for folder in folders:
        with sensible(folder / TABLE, "name folders with finished results"):
            found: list[Row] = json.loads((folder / TABLE).read_text("utf-8"))
            about.append((folder / MARKDOWN).read_text("utf-8").partition("\n")[0])
        runs.append(read_json(folder / RUN))
        for row in found:
            rows.setdefault((row["length"], row["task"], method_label(row)), row)
    tasks = list(dict.fromkeys(row["task"] for row in rows.values()))
    joined = sorted(rows.values(), key=lambda row: (row["length"], tasks.index(row["task"])))
    asked: dict[tuple[int, str], str] = {}
    for row in joined:
        if asked.setdefault((row["length"], row["task"]), row["prompts"]) != row["prompts"]:
            raise UserError(f"join: {row['task']} at {row['length']} tokens has different questions in these folders.")
    _write(out, joined, " ".join(dict.fromkeys(about)), {"joined": runs})
    return joined


def _write(out: Path, rows: Sequence[Row], about: str, run: Mapping[str, Any]) -> None:
    """Writes all four files."""
    contents = {
        TABLE: json.dumps(list(rows), indent=1, allow_nan=False).encode() + b"\n",
        MARKDOWN: markdown(rows, about).encode(),
        RUN: json.dumps(run, indent=1).encode() + b"\n",
        PICTURE: picture(rows),
    }
    for name, content in contents.items():
        with atomic_file(out / name) as work:
            work.write_bytes(content)


def method_label(row: Row) -> str:
    """A method with what it was asked to save, or its p."""
    if row["wanted_kv_reduction"] is not None:
        return f"{row['line']}, {row['wanted_kv_reduction']:.0%}"
    return str(row["line"]) if row["p"] is None else f"{row['line']}, p = {row['p']:g}"


def cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table for people: its header, and one tuple of texts per row."""
    return _HEADER, [
        (
            row["task"],
            str(row["length"]),
            method_label(row),
            f"{row['kv_reduction']:.1%}",
            f"{100 * row['score']:.1f}" + (f" ± {100 * row['score_se']:.1f}" if row["score_se"] else ""),
            f"{row['new_tokens']:.0f}",
            f"{row['windows']:.1f}",
            f"{row['accepted_per_window']:.2f}",
            "" if row["requests_per_minute"] is None else f"{row['requests_per_minute']:.1f}",
        )
        for row in rows
    ]


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Rows of those tasks that every method of their length has answered: means over other tasks say nothing."""
    methods: dict[int, set[str]] = {}
    answered: dict[tuple[int, str], set[str]] = {}
    for row in rows:
        methods.setdefault(row["length"], set()).add(method_label(row))
        answered.setdefault((row["length"], row["task"]), set()).add(method_label(row))
    return [row for row in rows if answered[row["length"], row["task"]] == methods[row["length"]]]


def averages(rows: Sequence[Row]) -> list[tuple[str, int, float, float]]:
    """For each method and length its label, the length, and score and reads saved averaged over comparable tasks."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in comparable(rows):
        # The p that was found differs from length to length, the saving does not.
        groups.setdefault((method_label(row), row["length"]), []).append(row)
    return [
        (label, length, _mean(group, "score"), _mean(group, "kv_reduction"))
        for (label, length), group in groups.items()
    ]


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def markdown(rows: Sequence[Row], about: str) -> str:
    """Averages over tasks, and every row, under a sentence about them."""
    header, lines = cells(rows)
    short = [
        (label, str(length), f"{saved:.1%}", f"{100 * score:.1f}") for label, length, score, saved in averages(rows)
    ]
    parts = [
        about,
        _table(("method", "tokens", "reads saved", "mean score over tasks"), short),
        _table(header, lines),
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def picture(rows: Sequence[Row]) -> bytes:
    """Mean score against reads saved: one panel for short answers and one for long ones, one line a method."""
    rows = comparable(rows) or rows
    long = [row for row in rows if row["task"] in OWN_TASKS and OWN_TASKS[row["task"]].long]
    short = [row for row in rows if row not in long]
    panels = [(title, part) for title, part in (("short answers", short), ("long answers", long)) if part]
    figure = new_figure(5.2 * len(panels), 3.8)
    for index, (title, part) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for line in dict.fromkeys(row["line"] for row in part):
            points: dict[float | None, list[Row]] = {}
            for row in part:
                if row["line"] == line:
                    points.setdefault(row["wanted_kv_reduction"] or row["p"], []).append(row)
            places = sorted((_mean(group, "kv_reduction"), _mean(group, "score")) for group in points.values())
            axes.plot([100 * x for x, _ in places], [100 * y for _, y in places], "o-", label=line, markersize=4)
        axes.set_title(f"{title}, mean over tasks and lengths", fontsize=9)
        axes.set_xlabel("cache reads saved, %")
        axes.set_ylabel("score")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return as_png(figure)
