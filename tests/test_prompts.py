"""Many prompts by one command: in order, resumable, and refused before a model is loaded."""

from __future__ import annotations

import json

import pytest
from command import mistake, run

from specattn_jax.cli.prompts import Results, read_jobs
from specattn_jax.errors import UserError
from specattn_jax.runtime.generate import generate as generate_in_python
from specattn_jax.selection.alignment import Alignment

TEXTS = ["Once upon a time", "naïve 日本語", "a", "There was a cache.", "the end"]
LINES = [json.dumps({"prompt": text}) for text in TEXTS[:3]]
LINES += ["", json.dumps({"prompt": TEXTS[3], "id": "four"}, ensure_ascii=False)]
LINES += [json.dumps({"messages": [{"role": "user", "content": TEXTS[4]}]})]


@pytest.fixture
def command(tiny_folders, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--mode", "autoregressive"]
    common = ["generate", *pair, "--max-new-tokens", 8, "--out", tmp_path / "out.jsonl", "--batch", 2]
    return lambda *more: [*common, *(more or ("--prompts", tmp_path / "in.jsonl"))]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_are_in_order_and_those_of_python(command, tiny_pair, tmp_path):
    result = run(*command("--prompts", tmp_path / "in.jsonl", "--json"))
    report = json.loads(result.stdout)
    assert (report["prompts"], report["answered_before"]) == (5, 0)
    assert "5/5" in result.stderr
    found = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [1, 2, 3, "four", 5]
    prompts = [*TEXTS[:4], f"user: {TEXTS[4]}\nassistant: "]
    # In the same batches, whose programs are compiled.
    batches = [prompts[first : first + 2] for first in (0, 2, 4)]
    wanted = [
        one
        for batch in batches
        for one in generate_in_python(tiny_pair, batch, mode="autoregressive", max_new_tokens=8).results
    ]
    assert [row["text"] for row in found] == [one.text for one in wanted]
    assert [row["prompt_tokens"] for row in found] == [one.prompt_tokens for one in wanted]


def test_an_interrupted_run_goes_on_to_the_same_bytes(command, tmp_path):
    out, more = tmp_path / "out.jsonl", ("--prompts", tmp_path / "in.jsonl", "--temperature", 1, "--json")
    run(*command(*more))
    whole = out.read_bytes()
    assert json.loads(run(*command(*more)).stdout)["answered_before"] == 5
    lines = whole.splitlines(keepends=True)
    for cut, kept in [(0, 0), (5, 0), (len(lines[0]) + 9, 0), (len(b"".join(lines[:3])) + 9, 2), (len(whole) - 1, 4)]:
        out.write_bytes(whole[:cut])
        assert json.loads(run(*command(*more)).stdout)["answered_before"] == kept
        assert out.read_bytes() == whole


def test_prompts_of_different_batches_draw_differently(command, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "same"}\n' * 4)
    run(*command("--prompts", tmp_path / "in.jsonl", "--temperature", 1))
    assert len({row["text"] for row in rows(tmp_path / "out.jsonl")}) == 4


def test_what_makes_results_doubtful_is_said_once(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Alignment, "doubt", lambda _, tokens: f"{tokens} tokens are many.")
    (tmp_path / "in.jsonl").write_text("\n".join(LINES[:3]))
    pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--alignment", tiny_folders.alignment]
    more = ["--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--max-new-tokens", 4, "--json"]
    done = run("generate", *pair, "--mode", "specattn", *more, "--batch", 1)
    assert json.loads(done.stdout)["prompts"] == 3
    assert [line for line in done.stderr.splitlines() if "note:" in line] == [
        f"note: {len(TEXTS[0]) + 4} tokens are many."
    ]


def test_prompt_files_may_follow_each_other(command, tmp_path):
    names = [tmp_path / f"{index}.txt" for index in range(3)]
    for name, text in zip(names, TEXTS, strict=False):
        name.write_text(text + "\n", encoding="utf-8")
    assert run(*command(*[part for name in names for part in ("--prompt-file", name)])).exit_code == 0
    found = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == list(map(str, names))
    assert [row["prompt_tokens"] for row in found] == [len(text.encode()) for text in TEXTS[:3]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "is [1]; expected an object"),
        ("7", "is 7; expected an object"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "expected either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "expected either prompt or messages"),
        ('{"promt": "a"}', 'has "promt"; expected only prompt, messages, id'),
        ('{"prompt": " "}', 'prompt is " "; expected some text'),
        ('{"prompt": 3}', "prompt is 3; expected some text"),
        ('{"prompt": "\\ud800"}', 'prompt is "\\ud800"; expected some text'),
        ('{"messages": [{"role": "user"}]}', "messages is "),
        ('{"messages": []}', "messages is []"),
        ('{"prompt": "a", "id": null}', "id is null"),
        ('{"prompt": "a", "id": 1}', "id is 1, as before it"),
    ],
)
def test_a_bad_line_is_named_before_any_model_is_loaded(tmp_path, line, said):
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    found = mistake("generate", "--target", "no/such", "--prompts", path, "--out", tmp_path / "out.jsonl")
    assert found.startswith(f"--prompts: {path}, line 3: {said}")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_that_is_too_long_is_named_before_any_is_decoded(command, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join([*LINES, json.dumps({"prompt": "a" * 300})]))
    result = run(*command())
    assert result.exit_code == 1
    assert f"line {len(LINES) + 1}: The prompt has 300 tokens" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_other_results_are_not_overwritten(command, tmp_path):
    out = tmp_path / "out.jsonl"
    for foreign in ("a text\n", "no line end", '{"id": 1}\n'):
        out.write_text(foreign)
        assert f"--out: {out}, line 1 is no result of these prompts" in mistake(*command())
        assert out.read_text() == foreign
    out.unlink()
    run(*command())
    before = out.read_bytes()
    changed = command("--prompts", tmp_path / "in.jsonl", "--temperature", 1)
    assert "line 1 is no result of these prompts with these options" in mistake(*changed)
    assert out.read_bytes() == before
    out.unlink()
    out.mkdir()
    assert "is no file" in mistake(*command())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompts", "x.jsonl"], "--prompts is given, but no --out"),
        (["--prompt", "a", "--batch", 3], "--batch is given, but no --out"),
        (["--prompt-file", "a", "--prompt-file", "b"], "--prompt-file is given 2 times, but no --out"),
        (["--out", "x"], "--out: expected one of"),
        (["--out", "x", "--prompt", "a", "--prompts", "b"], "--out: expected one of"),
        (["--out", "x", "--prompt", "a", "--batch", 0], "--batch is 0; expected at least 1"),
        (["--out", "x", "--prompt-file", "-", "--prompt-file", "-"], "more than once"),
        (["--out", "x", "--prompts", "nothing.jsonl"], "text: nothing.jsonl does not exist"),
    ],
)
def test_options_that_do_not_fit(arguments, said):
    assert said in mistake("generate", *arguments)


def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "in.jsonl").write_text(LINES[0])
    (tmp_path / "file").write_text("")
    jobs = read_jobs(tmp_path / "in.jsonl")
    results = Results(tmp_path / "file" / "out.jsonl", jobs, {}, 1)
    with pytest.raises(UserError, match="cannot be written"):
        results.append([{"id": 1}])
