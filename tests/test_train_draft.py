"""`specattn train-draft` on a tiny target: from a text to a draft that serves, and what goes wrong on the way."""

from __future__ import annotations

import json
import shutil

import pytest
from command import mistake, run

from specattn_jax.cli.terminal import console
from specattn_jax.reporting import plots

SMALL = [
    *("--num-layers", 1, "--steps", 8, "--rows", 2, "--length", 128, "--continuations", 12, "--prompt", 32),
    *("--written", 32, "--batch", 8, "--checkpoint-every", 4),
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 200, encoding="utf-8")
    return path


@pytest.fixture
def train(tiny_folders, text, tmp_path):
    """The command on the tiny target."""
    return ["train-draft", "--target", tiny_folders.target, "--text", text, "--out", tmp_path / "run", *SMALL]


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_its_draft_serves(train, tiny_folders, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        # The run is over, but nothing is written of it yet.
        patch.setattr("specattn_jax.training.distil.read_metrics", interrupt)
        assert run(*train).exit_code == 130
    assert not (out / "draft").exists()
    result = run(*train, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["steps"] == 8
    assert 0 <= report["held_out_accepted_per_window"] <= 5
    assert {path.name for path in out.iterdir()} == {
        *("alignment", "checkpoints", "curves.png", "draft", "metrics.jsonl", "own_texts.npz")
    }
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [4, 8]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    pair = ["--target", tiny_folders.target, "--draft", report["draft"], "--alignment", report["alignment"]]
    sparse = run(
        *("generate", *pair, "--mode", "specattn", "--p", 1, "--prompt", "To be, or not"),
        *("--max-new-tokens", 8, "--json"),
    )
    alone = run(
        *("generate", "--target", tiny_folders.target, "--mode", "autoregressive", "--prompt", "To be, or not"),
        *("--max-new-tokens", 8, "--json"),
    )
    assert json.loads(sparse.stdout)["text"] == json.loads(alone.stdout)["text"]
    assert "holds a finished draft already" in mistake(*train)
    # What an interruption of the calibration leaves: the same command goes on with it.
    shutil.rmtree(out / "alignment")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "los')
    assert json.loads(run(*train, "--json").stdout)["steps"] == 8
    assert (out / "alignment" / "alignment.json").is_file()


@pytest.mark.slow
def test_a_draft_of_several_kinds_of_text(tiny_folders, tmp_path):
    kinds = {"prose": "It was a wide and silent sea. ", "tables": "| 1 | 2 |\n"}
    for kind, text in kinds.items():
        (tmp_path / "texts" / kind).mkdir(parents=True)
        # Each is shorter than a sequence, all together are not, but for one that calibration takes.
        for number, size in enumerate((100, 90, 80, 300)):
            (tmp_path / "texts" / kind / f"{number}.txt").write_text((text * 60)[:size])
    out = tmp_path / "run"
    texts = ["--text", tmp_path / "texts", "--out", out]
    assert run("train-draft", "--target", tiny_folders.target, *texts, *SMALL).exit_code == 0
    notes = json.loads((out / "draft" / "specattn_draft.json").read_text())["notes"]
    fitted = json.loads((out / "alignment" / "alignment.json").read_text())["provenance"]
    assert notes["texts"] == fitted["texts"] == ["prose: 4 texts", "tables: 4 texts"]
    assert fitted["settings"]["passages"] == 4


@pytest.mark.slow
def test_a_log_file_gets_a_line_for_every_checkpoint(train):
    assert not console.is_terminal
    lines = run(*train).stderr.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("step")] == ["step 4 of 8", "step 8 of 8"]
    assert "of 5 accepted" in lines[0]
    assert "specattn generate" in lines[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        # Seen only once the target has written its texts.
        pytest.param(["--num-layers", 9], "num_layers is 9; expected at most the target's 3", marks=pytest.mark.slow),
        (["--length", 120], "length is 120; expected a multiple of prompt + written, 64"),
        (["--length", 512], "length is 512; expected at most the target's context of 256"),
        (["--length", 0], "length is 0; expected at least 1"),
        (["--steps", 0], "steps is 0; expected at least 1"),
        (["--rows", 3, "--accumulate", 2], "rows is 3; expected a multiple of accumulate, 2"),
        (["--attention-weight", "nan"], "attention_weight is nan; expected 0 or more"),
        (["--peak-rate", "nan"], "peak_rate is nan; expected a positive number"),
        (["--storage", "int4"], "--storage is 'int4'; expected one of int8, bfloat16"),
        (["--batch", 0], "--batch is 0; expected at least 1"),
        (["--text", "nowhere.txt"], "nowhere.txt is neither a file nor a shipped book"),
    ],
)
def test_mistakes(train, tmp_path, options, said):
    assert said in mistake(*train, *options)
    assert not (tmp_path / "run" / "draft").exists()


def test_a_text_shorter_than_a_sequence(train, text, tmp_path):
    text.write_text("Too short.", encoding="utf-8")
    assert "the longest has 10 tokens" in mistake(*train)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_run_in_the_same_folder(train, text, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("specattn_jax.training.distil.read_metrics", interrupt)
        run(*train)
    assert "another configuration (peak_rate differ)" in mistake(*train, "--peak-rate", 0.5)
    assert "other texts or settings" in mistake(*train, "--seed", 1)
    text.write_text("Something else. " * 600, encoding="utf-8")
    assert "other texts or settings" in mistake(*train)


@pytest.mark.slow
def test_a_full_disk(train, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez", full)
        assert "own_texts.npz: cannot be written (No space left on device)" in mistake(*train)
    assert list((tmp_path / "run").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        assert "but the disk has 0.0 MiB left; free some room" in mistake(*train)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        said = "the checkpoint of step 4 could not be written (No space left on device)"
        assert said in mistake(*train)
    assert run(*train).exit_code == 0


def test_parts_that_are_zero_are_not_drawn():
    picture = plots.training_curves([1, 2], {"token": [2.0, 1.0], "attention": [0.0, 0.0]}, {2: 1.5})
    assert picture.startswith(b"\x89PNG")
