"""What the README and the documentation show is there, and is what commands print and files hold."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from command import run, run_script

import specattn_jax
from specattn_jax import examples
from specattn_jax.cli.app import app

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
each_page = pytest.mark.parametrize("page", PAGES)
DECODE = json.loads((RESULTS / "decode-nvidia-h100" / "decode.json").read_text(encoding="utf-8"))
PAIRS = {"Llama-3.2-1B / 3.1-8B": "llama-3.1-8b", "TinyLlama-1.1B / Llama-2-7B": "llama-2-7b"}


def blocks(text: str, language: str = "") -> list[str]:
    """Fenced blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def rows(text: str, first: str) -> Iterator[list[str]]:
    """Cells of the table rows that begin with a cell."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("|") and cells[0] == first:
            yield cells


@each_page
def test_links_and_pictures_are_there(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", PAGES[page])
    for target in [one or other for one, other in targets]:
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@each_page
def test_links_to_headings_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_commands_exist(page):
    group = typer.main.get_command(app)
    for block in blocks(PAGES[page]):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.match(r"(specattn|bash|python) \S", line) else [""]
            if words[0] == "specattn":
                check_command(group, words[1:])
            elif words[0] and words[1].startswith("scripts/"):
                assert (ROOT / words[1]).is_file(), line


def check_command(group: Any, words: list[str]) -> None:
    """Fails where a command line names a command or an option that there is not."""
    context, command = click.Context(group), group
    # Options of the program itself stand before the command, each with a value.
    while (
        words
        and words[0].startswith("--")
        and words[0] in {one for parameter in group.params for one in parameter.opts}
    ):
        words = words[2:]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.get_params(context) for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, words


def test_the_figure_is_what_its_script_draws(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "draw_method.py", "--out", tmp_path], check=True)
    for theme in ("light", "dark"):
        name = f"method_{theme}.svg"
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 160


def test_the_version_is_that_of_the_package():
    (cited,) = re.findall(r"version = \{(.*)\}", README)
    assert cited == specattn_jax.__version__
    assert f"\n## [{cited}]" in PAGES["CHANGELOG.md"]


def test_what_estimate_prints():
    (command,) = re.findall(r"^specattn (estimate .*)$", README, re.MULTILINE)
    printed = "\n".join(line.rstrip() for line in run(*shlex.split(command)).stderr.splitlines())
    assert f"```\n{printed}\n```" in README


def test_the_lines_of_python(monkeypatch, capsys):
    (code,) = blocks(README, "python")
    assert len(code.splitlines()) <= 12
    monkeypatch.setattr("specattn_jax.load_pair", lambda _: examples.tiny_pair(), raising=False)
    exec(compile(code, "README.md", "exec"), {})
    assert "drafted tokens accepted" in capsys.readouterr().out


def test_the_demo(monkeypatch, capsys):
    monkeypatch.setattr("specattn_jax.loading.pair.load_pair", lambda *_, **__: examples.tiny_pair())
    assert run_script("demo.py", "--prompt-tokens", 40, "--max-new-tokens", 4, "--seed", 1) == 0
    assert re.search(r"^ +SpecAttn +\d.*%", capsys.readouterr().out, re.MULTILINE)


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of everything of ours that calls ours in Python, but for the packages themselves."""
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "scripts" / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code = "\n".join(text for text in texts if not text.startswith("%%"))
        # Commands of the shell go on behind a backslash.
        yield path.name, re.sub(r"^( *)[!%](?:.*\\\n)*.*$", r"\1pass", code, flags=re.MULTILINE)
    for page, text in PAGES.items():
        for block in blocks(text, "python"):
            yield page, block


def test_options_of_generate_exist():
    """Types do not see this: whatever is given beside a request becomes a part of it."""
    known = {*inspect.signature(specattn_jax.generate).parameters, *inspect.signature(specattn_jax.Request).parameters}
    calls = [
        (name, keyword.arg)
        for name, text in sources()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("generate", "Request")
        # Others have a method of that name.
        and "model" not in ast.unparse(node.func)
        for keyword in node.keywords
    ]
    assert len(calls) > 20
    assert [(name, option) for name, option in calls if option not in known and option is not None] == []


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_table_of_decoding(page):
    """Each row: pair, sequences, context, tokens/s in three modes, SpecAttn over the other two."""
    found = 0
    for name, target in PAIRS.items():
        for cells in rows(PAGES[page], name):
            batch, slots = int(cells[1]), 1024 * int(cells[2].removesuffix("k"))
            speeds = {
                point["method"]: point["tokens_per_second"]
                for point in DECODE["points"]
                if (point["case"].get("target"), point["case"].get("batch"), point["case"].get("slots"))
                == (target, batch, slots)
            }
            check_speeds(cells[3:], speeds["autoregressive"], speeds["speculative"], speeds["specattn"])
            found += 1
    assert found >= 3


# What the tables of the real pair call some methods.
LINES = {
    "lookup": "lookup, window 5",
    "specattn": "specattn, 75 % saved",
    "specattn, window 3": "specattn, 75 % saved, window 3",
    "specattn, window auto": "specattn, 75 % saved, window auto",
}


def request_points(folder: str) -> list[dict[str, Any]]:
    """What `specattn bench request` measured."""
    points: list[dict[str, Any]] = json.loads((RESULTS / folder / "request.json").read_text(encoding="utf-8"))["points"]
    return points


@pytest.mark.parametrize("batch", [1, 16, 32])
def test_the_table_of_the_real_pair(batch):
    """Seconds to the first token and for the others, of each method."""
    points = request_points("request-real-nvidia-h100")
    found = {
        point["method"]: point
        for point in points
        if (point["case"]["target"], point["case"]["batch"], point["prompt_tokens"]) == ("qwen2.5-coder", batch, 30_000)
    }
    (cells,) = rows(section("README.md", "What it brings, and what it costs"), str(batch))
    for cell, method in zip(cells[1:], ("autoregressive", "speculative", "specattn, 90 % saved", "auto"), strict=True):
        first, others = (float(number) for number in cell.split(" + "))
        assert first == pytest.approx(found[method]["prefill_seconds"], rel=0.02)
        assert others == pytest.approx(statistics.median(found[method]["decode_seconds"]), rel=0.02)


def test_the_table_of_all_modes_on_the_real_pair():
    """Seconds to the first token and for the others, and what is accepted, of 1, 16 and 32 sequences."""
    points = request_points("request-real-nvidia-h100")
    points = [one for one in points if one["case"]["target"] == "qwen2.5-coder" and one["prompt_tokens"] == 30_000]
    text, shown = section("docs/results.md", "A real pair"), 0
    for point in points:
        if point["method"] == "auto, lossless":
            continue
        (cells,) = rows(text, LINES.get(point["method"], point["method"]))
        at = 1 + 3 * [1, 16, 32].index(point["case"]["batch"])
        # An empty cell at the end is not told apart from the end of the line.
        found = [*cells, ""][at : at + 3]
        wanted = point["prefill_seconds"], point["decode_seconds_median"], point["accepted_per_window"]
        assert [float(cell or 0) for cell in found] == pytest.approx(wanted, abs=0.0051, rel=0.01)
        shown += 1
    assert shown == 35


def test_the_table_of_the_real_pair_with_memory():
    """Seconds to the first token and for the others, and in brackets what is accepted, of each method and case."""
    cases = [(batch, prompt) for prompt in (30_000, 8_000) for batch in (1, 8, 32)]
    points = request_points("request-real-nvidia-h200")
    text = section("docs/results.md", "The real pair on H200s, with memory")
    for point in points:
        (cells,) = rows(text, LINES.get(point["method"], point["method"]))
        shown = cells[1 + cases.index((point["case"]["batch"], point["prompt_tokens"]))]
        found = [float(number) for number in re.findall(r"[\d.]+", shown)]
        wanted = [point["prefill_seconds"], point["decode_seconds_median"], point["accepted_per_window"]]
        assert found == pytest.approx(wanted[: 2 if point["method"] == "autoregressive" else 3], abs=0.0051, rel=0.01)
    # And none that were not measured.
    assert text.count(" + ") == len(points) == 61


def test_the_table_of_lossless_modes():
    """Whole requests at the rates of a real pair: seconds of both parts, and of all; then what decodes how fast."""
    points = request_points("request-lossless-nvidia-h100")
    text, shown = section("docs/results.md", "Lossless modes, at what a real pair accepts"), 0
    lines = {"auto, lossless": "auto, lossless (takes lookup, window 8)", "specattn": "specattn, 12 % read"}
    seconds = dict[tuple[str, int], float]()
    for point in points:
        if not point["case"]["target"].startswith("llama"):
            continue
        (cells,) = rows(text, lines.get(point["method"], point["method"]))
        at = 1 + 3 * [8, 1].index(point["case"]["batch"])
        names = "prefill_seconds", "decode_seconds_median", "request_seconds"
        assert cells[at : at + 3] == [f"{point[name]:.2f}" for name in names]
        seconds[point["method"], point["case"]["batch"]] = point["decode_seconds_median"]
        shown += 1
    assert shown == 15

    def gain(method: str, over: str) -> str:
        return " and ".join(f"{seconds[over, batch] / seconds[method, batch]:.2f}" for batch in (8, 1))

    assert f"`lookup`, decodes {gain('auto, lossless', 'speculative')} times" in text
    assert gain("speculative, sparse draft", "speculative") in text.replace("\n  ", " ")
    assert f"decodes {gain('self', 'autoregressive')} times as fast as autoregressive" in text


def test_the_row_of_the_embedded_pair():
    (cells,) = rows(README, "SmolLM2-135M, our draft")
    assert cells[1:3] == ["1", "6k"]
    speeds = [
        point["tokens_per_second"]
        for method in ("autoregressive", "speculative", "specattn")
        for point in DECODE["points"]
        if point["case"].get("name", point["case"].get("target")) == "smollm2" and point["method"] == method
    ]
    check_speeds(cells[3:], *speeds)


def check_speeds(cells: list[str], alone: float, dense: float, sparse: float) -> None:
    assert cells == [f"{speed:,.0f}" for speed in (alone, dense, sparse)] + [
        f"{ratio:.2f}" for ratio in (sparse / dense, sparse / alone)
    ]


def section(page: str, heading: str) -> str:
    """What stands between a heading and the next one."""
    return re.split(r"^#+ ", PAGES[page].partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_table_of_near_ties():
    """Each row, after 8,000 and after 24,000 tokens: acceptance, tokens that differ, share of windows, and gaps."""
    short, long = (
        json.loads((RESULTS / "lossless-nvidia-h100" / name).read_text(encoding="utf-8"))
        for name in ("lossless.json", "near_ties_24000.json")
    )
    text = section("docs/results.md", "Near-ties in bfloat16")

    def shown(row: dict[str, Any]) -> list[str]:
        inner = row.get("inner_accepted_per_window")
        return [
            f"{row['accepted_per_window']:.2f}",
            "" if inner is None else f"{inner:.2f}",
            f"{row['differing']}",
            f"{row['share_of_windows']:.1%}".replace("%", " %").removeprefix("0"),
            *(f"{row[name]:.3f}".removeprefix("0") for name in ("largest_gap", "median_gap")),
        ]

    for first, second in zip(short["near_ties"], long["near_ties"], strict=True):
        assert first["mode"] == second["mode"]
        assert first["tokens"] == second["tokens"] == 4080
        if first["mode"] == "autoregressive":
            assert first["differing"] == second["differing"] == 0
            continue
        ((_, *cells),) = rows(text, first["mode"])
        assert cells == [" / ".join(filter(None, both)) for both in zip(shown(first), shown(second), strict=True)]
    for measured, least in ((short, 0.88), (long, 0.92)):
        assert max(row["largest_gap"] for row in measured["near_ties"]) < -math.log(least)
    for row in short["single"]:
        assert f"{row['accepted_per_window']:.2f}" in text
        assert f"{row['inner_accepted_per_window']:.2f}" in text


def test_the_table_of_a_small_draft():
    """Each row: prompts, then accepted per window and agreement, of the small draft beside that of the preset."""
    text, folder = section("docs/your_own_models.md", "What ten minutes buy"), RESULTS / "small-draft-nvidia-h100"
    small, preset = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["kinds"]
        for name in ("five_layers", "half_billion")
    )
    for kind, found in small.items():
        ((_, *cells),) = rows(text, kind)
        assert cells == [
            f"{found['acceptance']['prompts']}",
            *(f"{one[kind]['acceptance']['accepted_per_window']:.2f}" for one in (small, preset)),
            *(f"{one[kind]['top1_agreement_on_text']:.0%}".replace("%", " %") for one in (small, preset)),
        ]


def task_scores() -> dict[tuple[str, int], dict[str, float]]:
    """Scores of tasks, by a line of the page, such as "quest, 75 %", and length."""
    folder, found = RESULTS / "tasks-nvidia-h100", dict[tuple[str, int], dict[str, float]]()
    for name in ("table.json", "former.json"):
        for row in json.loads((folder / name).read_text(encoding="utf-8")):
            saving = row["wanted_kv_reduction"]
            line = "the former default" if name == "former.json" else row["line"]
            line += "" if saving is None else f", {100 * saving:.0f} %"
            found.setdefault((line, row["length"]), {})[row["task"]] = 100 * row["score"]
    return found


TASK_LENGTHS = (4096, 8192, 16384, 30000)


def test_the_tables_of_tasks():
    """Means over RULER's six tasks and lists of needles, at four lengths; then task by task."""
    scores, text = task_scores(), section("docs/tasks.md", "What was measured")
    ruler = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
    lines = sorted({line for line, _ in scores})
    assert len(lines) == 19
    means = 0
    for line in lines:
        name = f"**{line}**" if line.startswith("specattn default") else line
        # Empty cells at the end are not told apart from the end of the line.
        overview = [*next(rows(text, name)), *[""] * 7]
        for length, mean, needles in zip(TASK_LENGTHS, overview[1:5], overview[5:9], strict=True):
            found = scores.get((line, length), {})
            asked = [found[task] for task in ruler if task in found]
            if not asked:
                assert mean == needles == ""
                continue
            assert float(mean.strip("*").split()[0]) == pytest.approx(statistics.mean(asked), abs=0.0501)
            assert ("of 80.1 *" in mean) == (len(asked) == 5)
            assert needles == (f"{found['book_needles_all']:.0f}" if "book_needles_all" in found else "")
            means += 1
        single = [cells for cells in rows(text, line) if "/" in cells[1]]
        for cells in single:
            for cell, task in zip(cells[1:], ruler, strict=True):
                for number, length in zip(cell.split(" / "), TASK_LENGTHS, strict=True):
                    found = scores.get((line, length), {})
                    assert number == (f"{found[task]:.0f}" if task in found else "\N{EN DASH}")
    assert means == 67


def test_the_table_of_short_alignments():
    """Scores at 75, 90 and 95 % saved, task by task, and their means."""
    measured = json.loads((RESULTS / "tasks-levers-nvidia-h100" / "short.json").read_text(encoding="utf-8"))["rows"]
    text, savings = section("docs/tasks.md", "Of short texts"), (0.75, 0.9, 0.95)
    names = {"full": "full", "novels and Python": "specattn default", "**five kinds (shipped)**": "specattn default a"}
    for name, line in names.items():
        found = {
            (row["task"], row["wanted_kv_reduction"]): 100 * row["score"] for row in measured if row["line"] == line
        }
        asked = (None,) if line == "full" else savings
        (cells,) = rows(text, name)
        tasks = ("niah_single_1", "niah_multikey_3", "ruler_fwe", "ruler_cwe")
        for cell, task in zip(cells[1:5], tasks, strict=True):
            assert cell == " / ".join(f"{found[task, saving]:.0f}" for saving in asked)
        means = [statistics.mean(found[task, saving] for task in tasks) for saving in asked]
        assert cells[5] == " / ".join(f"{mean:.1f}" for mean in means)


def check_cells(cells: list[str], measured: list[float]) -> None:
    """Numbers in cells are those that were measured, rounded."""
    for cell, number in zip(cells, measured, strict=True):
        digits = len(cell.strip("*+ %").partition(".")[2])
        assert float(cell.strip("*+ %")) == pytest.approx(number, abs=0.5001 * 10**-digits)


def test_the_readme_says_what_the_pages_say():
    """Shares such as .014 stand in the table of quality; what the demo printed stands in full among the results."""
    numbers = r"(?<!\d)\.\d{2,}"
    said = set(re.findall(numbers, README))
    assert len(said) >= 4
    assert said <= set(re.findall(numbers, PAGES["docs/quality.md"]))
    demo = re.findall(r"^  (?:dense|SpecAttn) +\d.*$", README, re.MULTILINE)
    assert len(demo) == 2
    assert set(demo) <= set(PAGES["docs/results.md"].splitlines())


def test_the_axes_of_the_glossary():
    from specattn_jax import glossary

    letters = re.findall(r"^([A-Z])  +(.*)$", glossary.__doc__ or "", re.MULTILINE)
    assert len(letters) > 10
    assert letters == re.findall(r"^\| ([A-Z]) \| (.*) \|$", PAGES["docs/glossary.md"], re.MULTILINE)
