"""Texts of several kinds: seeds, what a target writes after them, and how kinds are named, mixed and told apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command import mistake, run

from specattn_jax.calibration.passages import CalibrationSettings, choose_passages
from specattn_jax.errors import UserError
from specattn_jax.evaluation.tables import of_kind
from specattn_jax.evaluation.tasks import own
from specattn_jax.examples import tiny_pair
from specattn_jax.kinds import KINDS, SPLITS, load_seeds, loops, python_sources, texts_at_hand
from specattn_jax.loading.tokenizer import Tokenizer
from specattn_jax.texts import find_kinds, name_texts, read_text, shipped_books
from specattn_jax.training.data import random_windows, split_kinds
from specattn_jax.training.writing import WriteSettings, to_text, write_kinds


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_for_training_and_evaluation(kind):
    train, valid = (load_seeds(kind, split) for split in SPLITS)
    assert (len(train), len(valid)) == (24, 8)
    assert len({seed.strip() for seed in train + valid}) == 32
    assert all(1 <= len(seed.strip().splitlines()) <= 8 for seed in train + valid)
    assert not set(texts_at_hand(kind, "train").values()) & set(texts_at_hand(kind, "valid").values())


def test_the_task_never_asks_what_drafts_learnt():
    train, valid = (python_sources(split) for split in SPLITS)
    assert len(train) > 50
    assert own._sources() == valid
    assert not set(train) & set(valid)
    assert set(texts_at_hand("code", "valid").values()) < set(valid)


def test_loops_are_found_and_texts_are_not():
    book = read_text(shipped_books("valid")[0])
    source = python_sources("valid")[0].read_text(encoding="utf-8")
    for text in (book[20_000:28_000], source[:8_000], "\n".join(load_seeds("tables", "train"))):
        assert not loops(text)
        # Only its end goes round in circles.
        assert loops(text + "| 40 | North Atlantic |\n" * (len(text) // 50))


def test_texts_are_named_one_by_one_or_by_folders(tmp_path):
    for kind, name in (("prose", "b.txt"), ("prose", "a.txt"), ("code", "c.py"), ("prose", ".hidden")):
        (tmp_path / "all" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / kind / name).write_text(name)
    everything, prose = tmp_path / "all", tmp_path / "all" / "prose"
    assert {kind: [path.name for path in paths] for kind, paths in find_kinds([str(everything)]).items()} == {
        "code": ["c.py"],
        "prose": ["a.txt", "b.txt"],
    }
    named = find_kinds([f"novels={prose}", "novels=northanger_abbey", f"x={everything / 'code' / 'c.py'}"])
    assert {kind: len(paths) for kind, paths in named.items()} == {"novels": 3, "x": 1}
    assert name_texts(named) == ["novels: 3 texts", "x: 1 texts"]
    assert name_texts(find_kinds([str(prose)])) == ["a.txt", "b.txt"]
    odd = tmp_path / "a=b.txt"
    odd.write_text("a file of that name")
    assert find_kinds([str(odd)]) == {"": [odd]}
    for names, said in (
        ([str(prose), f"code={odd}"], "some are named \\(code\\) and some are not"),
        (["=x"], "'=x' is incomplete; expected KIND=PATH"),
        (["prose=nowhere.txt"], "nowhere.txt is neither a file nor a shipped book"),
    ):
        with pytest.raises(UserError, match=said):
            find_kinds(names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a folder without texts"):
        find_kinds([str(tmp_path / "empty")])


def test_kinds_are_learnt_in_equal_shares_whatever_their_size():
    # Tokens of a kind lie in a range of their own; the second is of short texts.
    documents = {"large": [(np.arange(50_000) % 100).tolist()], "small": [[200 + number] * 60 for number in range(10)]}
    train, ends = split_kinds(documents, 128, 64)
    assert [len(texts) for texts in train] == [1, 1]
    assert [len(texts[0]) for texts in ends] == [1000, 64], "long enough for a prompt"
    assert len(train[1][0]) == 600 - 64
    windows = random_windows(train, 2000, 128, np.random.default_rng(0))
    assert np.mean(windows[:, 0] >= 200) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(UserError, match="the longest has 600 tokens"):
        split_kinds(documents, 1024, 64)


def test_one_kind_draws_as_texts_without_kinds():
    texts = [np.arange(300), np.arange(1000, 1500)]
    rng = np.random.default_rng(4)
    rooms = np.array([300 - 63, 500 - 63])
    which = rng.choice(2, size=8, p=rooms / rooms.sum())
    wanted = [texts[index][(at := rng.integers(rooms[index])) : at + 64] for index in which]
    np.testing.assert_array_equal(random_windows([texts], 8, 64, np.random.default_rng(4)), wanted)


def test_calibration_visits_kinds_in_turn():
    documents = {"a": [[1] * 200, [2] * 200, [0] * 20], "b": [[3] * 300], "c": [[4] * 70, [0] * 9, [5] * 70]}
    settings = CalibrationSettings(context=128, passages=6, windows=2)
    chosen = choose_passages(documents, settings, np.random.default_rng(0))
    assert [int(passage.tokens[0]) for passage in chosen] == [1, 3, 4, 2, 3, 4]
    assert set(np.asarray(chosen[2].tokens).tolist()) == {0, 4, 5}, "short ones are joined"
    with pytest.raises(UserError, match="passages is 4; expected at least 6, two for each kind"):
        choose_passages(documents, CalibrationSettings(context=128, passages=4), np.random.default_rng(0))
    with pytest.raises(UserError, match="all texts of b have 20 tokens"):
        choose_passages({"a": [[1] * 200], "b": [[1] * 20]}, settings, np.random.default_rng(0))


def test_the_table_says_how_far_the_oracle_is():
    rows = [
        {"method": "full", "wanted_kv_reduction": None, "kl": 0.0},
        {"method": "oracle", "wanted_kv_reduction": 0.9, "kl": 0.02},
        {"method": "specattn", "wanted_kv_reduction": 0.9, "kl": 0.05},
        {"method": "specattn", "wanted_kv_reduction": 0.75, "kl": 0.01},
    ]
    assert [row["kl_over_oracle"] for row in of_kind("code", rows)] == [None, 1.0, 2.5, None]


def test_what_was_written_is_plain_text():
    class Words(Tokenizer):
        special_ids = frozenset({0})

        def __init__(self):
            pass

        def decode(self, ids, skip_special=True):
            return "".join({1: "The end.", 2: "user\nWhy?", 3: " Because.", 4: "\n"}[index] for index in ids)

    assert to_text(Words(), [1, 0, 4, 0, 2, 3, 0]) == "The end.\n\nWhy? Because."


# The tiny target writes noise, of which nothing loops.
def test_a_target_writes_every_kind_and_the_kinds_serve(tmp_path, tiny_folders, monkeypatch):
    monkeypatch.setattr("specattn_jax.training.writing.load_seeds", lambda *_: ["Once", "There was"])
    monkeypatch.setattr("specattn_jax.training.writing.texts_at_hand", lambda *_: {})
    monkeypatch.setattr("specattn_jax.training.writing.loops", lambda text: "Once" in text)
    pair, out = tiny_pair(), tmp_path / "kinds"
    settings = WriteSettings(tokens=150, least=100, train=6, valid=4, kept=1, batch=16)
    note = write_kinds(pair.target, pair.tokenizer, out, settings, name="tiny")
    assert json.loads((out / "kinds.json").read_text()) == note
    assert note["texts"]["train"]["code"] == {"at_hand": 0, "begun": 6, "kept": 3}
    assert note["texts"]["valid"]["prose"] == {"at_hand": 0, "begun": 4, "kept": 1}
    assert all(path.read_text().startswith("There was") for path in out.glob("*/*/*.txt"))
    models = ["--target", tiny_folders.target, "--draft", tiny_folders.draft]
    fitted = [*models, "--text", out / "train", "--context", 96, "--out", tmp_path / "alignment"]
    report = json.loads(run("calibrate", *fitted, "--json").stdout)
    assert report["texts"][0] == "code: 3 texts"
    assert (
        json.loads((tmp_path / "alignment" / "alignment.json").read_text())["provenance"]["settings"]["passages"] == 10
    )
    assert "passages is 4; expected at least 10" in mistake("calibrate", *fitted[:-1], tmp_path / "b", "--passages", 4)


def test_every_kind_is_evaluated_apart(tmp_path, tiny_folders):
    files = {"prose": "It was a wide and silent sea. " * 40, "tables": "| 1 | 2 |\n" * 100}
    for kind, text in files.items():
        (tmp_path / kind).write_text(text)
    named = [f"{kind}={tmp_path / kind}" for kind in files]
    models = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--alignment", tiny_folders.alignment]
    options = ["--context", 96, "--prefill", 0.3, "--documents", 2, "--batch", 2, "--window", 3, "--kv-reduction", 0.6]
    command = ["perplexity", *models, *options, "--methods", "oracle,specattn", "--policy", "default"]
    out = tmp_path / "out"
    rows = json.loads(run(*command, "--text", *named, "--out", out, "--json").stdout)["rows"]
    assert json.loads((out / "table.json").read_text()) == rows
    assert [(row["kind"], row["method"]) for row in rows] == [
        (kind, method) for kind in files for method in ("full", "oracle", "specattn")
    ]
    assert rows[2]["kl_over_oracle"] == rows[2]["kl"] / rows[1]["kl"]
    alone = json.loads((out / "tables" / "table.json").read_text())
    assert [row["perplexity"] for row in alone] == [row["perplexity"] for row in rows[3:]]
    lines = (out / "table.md").read_text().splitlines()
    assert "| kind | method | policy |" in lines[2]
    assert len(lines) == 4 + 6
    # Finished: nothing is read again, and texts without kinds have no place here.
    assert json.loads(run(*command, "--text", *named, "--out", out, "--json").stdout)["rows"] == rows
    assert "exists already and holds no evaluation" in mistake(*command, "--text", tmp_path / "prose", "--out", out)
