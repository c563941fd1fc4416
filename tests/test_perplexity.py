"""`specattn perplexity`: the table and its pictures, resuming, the search for p, drift, and what goes wrong."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from command import mistake, run

from specattn_jax.errors import UserError
from specattn_jax.evaluation.documents import cut_documents, take_documents
from specattn_jax.evaluation.drift import measure_drift, read_densely
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.evaluation.methods import Case, list_cases
from specattn_jax.evaluation.perplexity import Evaluation, EvaluationSettings, open_store
from specattn_jax.evaluation.pictures import selection_picture, slots_read
from specattn_jax.evaluation.search import READINGS, TOLERANCE, find_left_out
from specattn_jax.evaluation.tables import Measured, make_row, standard_error
from specattn_jax.runtime.request import choose_reading

CONTEXT = 96
CONTRACT = [
    *("method", "policy", "p", "context", "perplexity", "relative_increase", "kv_reduction", "top1_fidelity", "kl"),
    "tokens",
]


@pytest.fixture(scope="session")
def novel(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "novel.txt"
    rng = np.random.default_rng(0)
    words = ["the", "sea", "was", "a", "wide", "and", "silent", "mirror", "of", "clouds", "ships", "went", "home."]
    path.write_text(" ".join(rng.choice(words, 200)), encoding="utf-8")
    return path


@pytest.fixture
def evaluate(tiny_folders, novel, tmp_path):
    """The command on the tiny pair; what is given later counts."""
    pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--alignment", tiny_folders.alignment]
    return [
        *("perplexity", *pair, "--text", novel, "--context", CONTEXT, "--prefill", 0.3, "--documents", 4),
        *("--batch", 2, "--window", 3, "--out", tmp_path / "out"),
    ]


def read_table(out):
    return json.loads((out / "table.json").read_text())


def interrupt(*_, **__):
    raise KeyboardInterrupt


# Methods, policies, and the rows of their table.
SMALL = ("full,oracle,specattn", "default", [("full", None), ("oracle", None), ("specattn", "default")])
LARGE = (
    "full,quest,oracle,specattn",
    "default,paper_exact",
    [("full", None), ("quest", None), ("oracle", None), ("specattn", "default"), ("specattn", "paper_exact")],
)


@pytest.mark.parametrize(
    ("methods", "policies", "wanted"), [SMALL, pytest.param(*LARGE, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_the_table_and_everything_beside_it(evaluate, tmp_path, methods, policies, wanted):
    result = run(*evaluate, "--methods", methods, "--policy", policies, "--kv-reduction", 0.6, "--json")
    assert result.exit_code == 0
    report, out = json.loads(result.stdout), tmp_path / "out"
    rows = read_table(out)
    assert report["rows"] == rows
    assert [(row["method"], row["policy"]) for row in rows] == wanted
    full = rows[0]
    assert list(full)[: len(CONTRACT)] == CONTRACT
    assert (full["kl"], full["top1_fidelity"], full["kv_reduction"], full["relative_increase"]) == (0, 1, 0, 0)
    for row in rows:
        assert row["context"] == CONTEXT
        assert row["documents"] == 4
        assert row["tokens"] == 4 * ((CONTEXT - 29 - 1) // 3) * 3
        assert row["relative_increase"] == row["perplexity"] / full["perplexity"] - 1
        assert np.mean(row["kv_reduction_by_head"]) == pytest.approx(row["kv_reduction"])
        assert np.shape(row["kv_reduction_by_head"]) == (3, 2)
        np.testing.assert_allclose(np.mean(row["kv_reduction_by_head"], 1), row["kv_reduction_by_layer"])
    for row in rows[1:]:
        assert row["kl"] > 0
        assert row["kl_se"] > 0
        assert row["wanted_kv_reduction"] == 0.6
    oracle = next(row for row in rows if row["method"] == "oracle")
    assert oracle["p"] is not None
    assert oracle["kv_reduction"] == pytest.approx(0.6, abs=0.05)
    for name in ("pareto.png", "alignment.png", "selection.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    note = json.loads((out / "run.json").read_text())
    assert set(note) == {"command", "versions", "commit", "hardware", "draft_reads"}
    # Of documents this short the draft reads everything.
    assert set(note["draft_reads"].values()) == {1.0}
    assert note["command"]["seed"] == 0
    lines = (out / "table.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(rows)
    assert report["drift"] == []


@pytest.mark.slow
def test_drift_beside_the_table(evaluate, tmp_path):
    options = ["--methods", "specattn", "--policy", "default", "--kv-reduction", 0.5, "--drift-tokens", 12, "--json"]
    report, out = json.loads(run(*evaluate, *options).stdout), tmp_path / "out"
    drift = json.loads((out / "drift.json").read_text())
    assert report["drift"] == drift
    (line,) = drift
    assert (line["policy"], line["saving"], line["new_tokens"]) == ("default", 0.5, 12)
    assert len(line["kl_by_position"]) == 11
    assert (line["prompt_tokens"], line["documents"]) == (CONTEXT - 12, 4)
    assert (out / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_evaluation_goes_on_to_the_same_bits(evaluate, tmp_path, monkeypatch):
    options = ["--methods", "streaming,specattn", "--kv-reduction", "0.6"]
    out = tmp_path / "out"
    assert run(*evaluate, *options).exit_code == 0
    once = {name: (out / name).read_bytes() for name in ("table.json", "table.md", "pareto.png")}
    # Finished: nothing is read again.
    with monkeypatch.context() as patch:
        patch.setattr("specattn_jax.evaluation.perplexity.read_documents", interrupt)
        assert run(*evaluate, *options).exit_code == 0
    assert once == {name: (out / name).read_bytes() for name in once}
    # Killed in the middle, with some parts of each method.
    for name in ("full-001", "streaming-saving0.6-000", "specattn-default-saving0.6-001"):
        (out / "parts" / f"{name}.json").unlink()
    (out / "table.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("specattn_jax.evaluation.perplexity._values", interrupt)
        assert run(*evaluate, *options).exit_code == 130
    assert not (out / "table.json").exists()
    assert run(*evaluate, *options).exit_code == 0
    assert once == {name: (out / name).read_bytes() for name in once}


def test_what_fails_before_the_first_part_leaves_nothing(evaluate, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("specattn_jax.evaluation.perplexity.read_documents", interrupt)
        assert run(*evaluate, "--methods", "full").exit_code == 130
    assert not (tmp_path / "out").exists()


def test_another_configuration_in_the_same_folder(evaluate, tmp_path):
    out = tmp_path / "out"
    assert run(*evaluate, "--methods", "full").exit_code == 0
    said = "holds an evaluation of another configuration (texts, context differ)"
    assert said in mistake(*evaluate, "--methods", "full", "--context", CONTEXT - 2)
    assert "(batch differ)" in mistake(*evaluate, "--methods", "full", "--batch", 1)
    result = run(*evaluate, "--methods", "full")
    assert result.exit_code == 0
    assert "perplexity" in result.stderr
    assert len(read_table(out)) == 1
    # Another method may join.
    assert run(*evaluate, "--methods", "streaming", "--kv-reduction", 0.5).exit_code == 0
    assert len(read_table(out)) == 2


def test_a_damaged_part(evaluate, tmp_path):
    run(*evaluate, "--methods", "full")
    part = tmp_path / "out" / "parts" / "full-000.json"
    part.write_text(part.read_text()[:40])
    assert "full-000.json: is damaged" in mistake(*evaluate, "--methods", "full")


def test_a_folder_of_something_else(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "exists already and holds no evaluation" in mistake(*evaluate)


@pytest.mark.slow
def test_given_masses_leave_out_what_reads_a_share(evaluate, tmp_path):
    result = run(*evaluate, "--methods", "streaming,specattn", "--policy", "paper_exact", "--p", "0.9,0.5")
    assert result.exit_code == 0
    assert "Left out, because they read a given share and know no p: streaming." in result.stderr
    rows = read_table(tmp_path / "out")
    assert [(row["method"], row["p"]) for row in rows] == [("full", None), ("specattn", 0.5), ("specattn", 0.9)]
    assert rows[1]["kv_reduction"] > rows[2]["kv_reduction"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--p", 0.9, "--kv-reduction", 0.5], "--p and --kv-reduction both say how much to read"),
        (["--p", "0.9,high"], "--p names 'high'; expected numbers"),
        (["--p", 1.5], "p is 1.5; expected a number between 0 and 1"),
        (["--kv-reduction", 1], "kv_reduction is 1.0; expected a number between 0 and 1"),
        (["--kv-reduction", 0.95, "--methods", "specattn"], "calibrated for 0.50 to 0.90"),
        (["--methods", "streaming", "--p", 0.9], "which read a given share and know no p"),
        (["--methods", "magic"], "methods names 'magic'; expected some of full, streaming, quest, vegas"),
        (["--methods", ","], "--methods is ','; expected names"),
        (["--policy", "best"], "policy is 'best'; expected one of default, paper, paper_exact"),
        (["--prefill", 0], "prefill is 0.0; expected a share between 0 and 1"),
        (["--batch", 0], "batch is 0; expected at least 1"),
        (["--window", 0], "window is 0; expected 1 to 64"),
        (["--documents", 0], "documents is 0; expected at least 1"),
        (["--documents", 50], "documents is 50, but the texts hold"),
        (["--context", 100_000], "context is 100000, but the longest text has"),
        (["--context", 400, "--documents", 1], "context is 400; expected at least"),
        (["--drift-tokens", 90], "drift_tokens is 90; expected 2 to 72"),
        (["--dataset", "pg19"], "--text and --dataset pg19 both say what to read"),
        (["--alignment", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(evaluate, tmp_path, options, said):
    assert said in mistake(*evaluate, *options)
    assert not (tmp_path / "out").exists()


class TestDatasets:
    """Texts from the hub."""

    @pytest.fixture
    def command(self, evaluate):
        at = evaluate.index("--text")
        return [*evaluate[:at], *evaluate[at + 2 :], "--methods", "full"]

    def test_offline(self, command, monkeypatch):
        def unreachable(*_, **__):
            raise ConnectionError("Couldn't reach 'emozilla/pg19' on the Hub (LocalEntryNotFoundError)")

        monkeypatch.setattr("datasets.load_dataset", unreachable)
        said = mistake(*command, "--dataset", "pg19")
        assert "emozilla/pg19 on the Hugging Face hub" in said
        assert "Couldn't reach" in said
        assert "--text F..." in said

    def test_unknown(self, command):
        assert "dataset is 'wikitext'; expected one of pg19" in mistake(*command, "--dataset", "wikitext")

    def test_streamed(self, command, tmp_path, novel, monkeypatch):
        rows = [{"text": "short"}, {"text": novel.read_text()}, {"text": novel.read_text()[::-1]}]
        monkeypatch.setattr("datasets.load_dataset", lambda hub, *, split, streaming: iter(rows))
        assert run(*command, "--dataset", "pg19", "--documents", 2).exit_code == 0
        assert read_table(tmp_path / "out")[0]["documents"] == 2


def test_documents_are_spread_and_do_not_overlap():
    book, tale, note = list(range(100)), list(range(1000, 1040)), [1, 2, 3]
    got = cut_documents([book, tale, note], 10, 7)
    assert [document[0] for document in got] == [10, 30, 50, 70, 90, 1010, 1030]
    assert all(len(document) == 10 and document[-1] - document[0] == 9 for document in got)
    assert len({document[0] for document in got}) == 7
    assert cut_documents([book], 100, 1) == [book]
    assert take_documents(["abc", "abcdef"], lambda text: [ord(letter) for letter in text], 4, 1) == [[97, 98, 99, 100]]


class TestSearch:
    """The search for p."""

    @pytest.mark.parametrize("wanted", [0.3, 0.75, 0.9, 0.97])
    @pytest.mark.parametrize("power", [0.2, 0.5, 1.3])
    def test_smooth_curves_are_met(self, wanted, power):
        known: dict[float, float] = {}
        mass = find_left_out(lambda x: 1 - min(1.0, 0.02 * x**-power), wanted, known)
        if 0.02 * 1e-6**-power > 1 - wanted > 0.0201:
            assert known[mass] == pytest.approx(wanted, abs=TOLERANCE)
        assert len(known) <= READINGS

    def test_stairs_end_beside_the_step(self):
        calls = []

        def stairs(mass):
            calls.append(mass)
            return 0.2 if mass < 0.0312 else 0.7

        known: dict[float, float] = {}
        mass = find_left_out(stairs, 0.6, known)
        assert known[mass] == 0.7
        assert len(calls) == len(set(calls)) <= READINGS

    def test_what_is_known_is_not_measured_again(self):
        known = {0.05: 0.75, 0.2: 0.9}

        def measure(_):
            pytest.fail("it was measured")

        assert find_left_out(measure, 0.9, known) == 0.2


# What Vegas reads depends on what it read before, so its saving jumps with p.
@pytest.mark.parametrize(
    ("method", "tolerance"), [("oracle_layer", TOLERANCE), pytest.param("vegas", 0.02, marks=pytest.mark.slow)]
)
def test_a_search_ends_within_its_tolerance(tiny_pair, novel, tmp_path, method, tolerance):
    tokens = tiny_pair.tokenizer.encode(novel.read_text(), add_special=False)
    settings, documents = EvaluationSettings(prefill=0.3, window=3), cut_documents([tokens], CONTEXT, 2)
    store = open_store(tmp_path / "out", tiny_pair, documents, settings)
    told = []
    run = Evaluation(tiny_pair, documents, settings, store, lambda *event: told.append(event))
    rows = run.run(list_cases([method], [], savings=[0.5]))
    assert rows[1][1]["kv_reduction"] == pytest.approx(0.5, abs=tolerance)
    assert told[0][0] == 0
    assert all(done <= total for done, total, *_ in told)
    assert any(case == f"{method}, 50% saved" and "perplexity" in result for _, _, case, result in told)


def test_standard_errors_compare_document_by_document(tiny_pair):
    rng = np.random.default_rng(0)
    documents, shape = 6, (6, 3, 2)
    hard = rng.normal(3, 1, documents)
    full = Measured(10, hard, np.zeros(documents), np.ones(documents), np.ones(shape), np.ones((6, 3)))
    sparse = Measured(10, hard + 0.1, np.full(6, 0.2), np.ones(6), np.full(shape, 0.25), np.ones((6, 3)))
    row = make_row(Case("oracle", p=0.9), sparse, full, 64)
    assert row["relative_increase"] == pytest.approx(math.exp(0.1) - 1)
    assert row["relative_increase_se"] == pytest.approx(0, abs=1e-12)
    assert row["perplexity_se"] == pytest.approx(row["perplexity"] * hard.std(ddof=1) / math.sqrt(6))
    assert (row["kv_reduction"], row["kl"], row["tokens"]) == (0.75, pytest.approx(0.2), 60)
    assert standard_error(np.ones(1)) is None


def test_the_picture_shows_what_the_plan_reads(tiny_pair):
    document = np.random.default_rng(3).integers(0, 256, 61).tolist()
    mask = slots_read(tiny_pair, choose_reading(tiny_pair, policy="paper_exact", p=0.5), document, window=4)
    assert mask.shape == (3, 2, 30)
    assert mask[:2].all()
    assert (mask[2, 0] == mask[2, 1]).all()
    assert 0 < mask[2].mean() < 1
    assert selection_picture(mask, "title").startswith(b"\x89PNG")


class TestDrift:
    """Free-running generation against a clean pass."""

    PROMPTS = np.random.default_rng(7).integers(0, 256, (2, 40)).tolist()

    @pytest.mark.slow
    @pytest.mark.parametrize("p", [None, 1.0])
    def test_dense_reading_does_not_drift(self, tiny_pair, p):
        selection = None if p is None else choose_reading(tiny_pair, p=p)
        drift = measure_drift(tiny_pair, selection, self.PROMPTS, 20, window=3)
        assert drift.kl.shape == (2, 19)
        assert np.abs(drift.kl).max() < 1e-5
        np.testing.assert_allclose(drift.read, 1.0)

    def test_sparse_reading_drifts_from_what_a_dense_pass_says(self, tiny_pair):
        drift = measure_drift(tiny_pair, choose_reading(tiny_pair, p=0.3), self.PROMPTS, 20, window=3)
        assert drift.kl.min() > -1e-6
        assert drift.kl.max() > 1e-7
        assert drift.tokens.shape == (2, 20)
        assert (drift.read < 1).all()

    def test_the_clean_pass_is_the_dense_reading(self, tiny_pair):
        document = np.random.default_rng(8).integers(0, 256, 150)
        dense = read_documents(tiny_pair.target, tiny_pair.draft, None, [document], prefill_share=0.1, window=5)
        hidden = read_densely(tiny_pair.target, jnp.asarray(document[None], jnp.int32))
        want = jnp.moveaxis(dense.hidden, 0, 1).reshape(1, dense.tokens, -1)
        np.testing.assert_allclose(hidden[:, 15 : 15 + dense.tokens], want, atol=1e-5)

    def test_too_long(self, tiny_pair):
        with pytest.raises(UserError, match="drift_tokens is 300; expected at least 2, and at most 216 after a prompt"):
            measure_drift(tiny_pair, None, self.PROMPTS, 300)
