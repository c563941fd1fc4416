"""What the page on quality says, from the files that it was measured into."""

from __future__ import annotations

import json

import pytest
from test_readme import PAGES, RESULTS, ROOT, check_cells, rows, section

# Rows of the table of quality, by rows of the ablation; that of `default` is measured with today's draft.
QUALITY = {
    "StreamingLLM, first two layers dense": "streaming, dl2",
    "Quest, pages of 16, first two layers dense": "quest, dl2",
    "oracle: the target's own attention": "oracle, budgets",
}
KINDS = ("code", "dialogue", "languages", "tables", "prose")
# Lines of the page, and rows of both ablation tables.
INGREDIENTS = {
    "published, exact nucleus, first two layers dense": "published with exact nucleus, dl2",
    "mixture for each kv head, first two layers dense": "mixture per target kv head, dl2",
    "mixture for each kv head, none dense": "mixture per target kv head, dl0",
    "the same with budgets": "default",
    "and a quarter of the last verification": "last verification blended, 1/4",
    "and a half of it": "last verification blended, 1/2",
    "and a quarter of its first token alone": "last verification's first token blended, 1/4",
    "the last verification alone": "last verification alone",
    "no sinks, no recent window": "no sinks, no recent window",
    "centroids of 256 unread keys": "centroids of 256 unread keys",
    "blocks of 16, by their sum": "blocks of 16, sum",
    "first draft step only": "first draft step only",
    "selection reused for 2 windows": "selection reused for 2 windows",
    "dense verification every 64 windows": "dense verification every 64 windows",
    "oracle with budgets": "oracle, budgets",
}


@pytest.mark.parametrize("label", QUALITY)
def test_the_table_of_quality(label):
    """Each row: KL, top-1 and increase of perplexity, at 75 and at 90 % saved."""
    ablation = json.loads((RESULTS / "ablation.json").read_text(encoding="utf-8"))["rows"]
    (cells,) = rows(PAGES["docs/quality.md"], label)
    for saving, shown in ((0.75, cells[1:4]), (0.9, cells[5:8])):
        (row,) = (one for one in ablation if (one["row"], one["wanted_saving"]) == (QUALITY[label], saving))
        check_cells(shown, [row["kl"], 100 * row["top1_fidelity"], 100 * row["relative_increase"]])


@pytest.mark.parametrize(("policy", "label"), [("default", "**`default`**"), ("paper", "SpecAttn as published")])
def test_what_a_policy_costs(policy, label):
    """Its row, from the table of `specattn perplexity`."""
    table = json.loads((RESULTS / "quality_2048" / "table.json").read_text(encoding="utf-8"))
    (cells,) = rows(PAGES["docs/quality.md"], label)
    for saving, shown in ((0.75, cells[1:4]), (0.9, cells[5:8])):
        (row,) = (one for one in table if (one["policy"], one["wanted_kv_reduction"]) == (policy, saving))
        check_cells(shown, [row["kl"], 100 * row["top1_fidelity"], 100 * row["relative_increase"]])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_draft_learns_from_kinds_of_text(kind):
    """Each row: KL before and now, the oracle's, how many times that, top-1, at 75 and at 90 % saved; the card too."""
    runs = {
        name: json.loads((RESULTS / "kinds-nvidia-h100" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        for name in ("new", "old")
    }
    (cells,) = rows(section("docs/quality.md", "What a draft learns from kinds of text"), kind)
    (short,) = rows((ROOT / "specattn_jax/data/drafts/smollm2/README.md").read_text(encoding="utf-8"), kind)
    for saving, shown, brief in ((0.75, cells[1:6], short[1]), (0.9, cells[6:11], short[2])):
        before, now, oracle = (
            one
            for run, method in (("old", "specattn"), ("new", "specattn"), ("new", "oracle"))
            for one in runs[run]
            if (one["kind"], one["method"], one["wanted_kv_reduction"]) == (kind, method, saving)
        )
        kl = [one["kl"] for one in (before, now, oracle)]
        check_cells(shown, [*kl, kl[1] / kl[2], 100 * now["top1_fidelity"]])
        assert brief == f"{shown[1].strip('*')} ({shown[0]})"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pair", "label"), [("smollm2", "SmolLM2"), ("qwen2.5-coder", "Qwen2.5-Coder")])
def test_the_table_of_kinds(pair, label, kind):
    """Each row: KL without memory and now, the oracle's, how often that both are, top-1, at 75 and at 90 % saved."""
    measured = json.loads((RESULTS / "memory-nvidia-h100" / "kinds.json").read_text(encoding="utf-8"))[pair]
    (cells,) = rows(section("docs/quality.md", "Kinds of text"), f"{label}, {kind}")
    for saving, shown in ((0.75, cells[1:7]), (0.9, cells[7:13])):
        without, now, oracle = (
            one
            for method, policy in (("specattn", "forgetful"), ("specattn", "default"), ("oracle", None))
            for one in measured
            if (one["kind"], one["method"], one.get("policy"), one.get("wanted_kv_reduction"))
            == (kind, method, policy, saving)
        )
        kl = [one["kl"] for one in (without, now, oracle)]
        check_cells(shown, [*kl, kl[0] / kl[2], kl[1] / kl[2], 100 * now["top1_fidelity"]])


def test_the_table_of_long_texts():
    """The last two rows: savings, KL, and how many times the oracle's that is."""
    measured = json.loads((RESULTS / "memory-nvidia-h100" / "long.json").read_text(encoding="utf-8"))["rows"]
    text = section("docs/quality.md", "Long texts")
    found = {(one["method"], one["policy"], one["wanted_kv_reduction"]): one for one in measured}
    (cells,) = rows(text, "**the same and what was seen since (`default`)**")
    (oracle_cells,) = rows(text, "oracle")
    for saving, at in ((0.75, 1), (0.9, 4)):
        now, oracle = found["specattn", "default", saving], found["oracle", None, saving]
        check_cells(cells[at : at + 3], [100 * now["kv_reduction"], now["kl"], now["kl"] / oracle["kl"]])
        check_cells(oracle_cells[at : at + 2], [100 * oracle["kv_reduction"], oracle["kl"]])


def test_the_table_of_ingredients():
    """KL of both pairs, at 75 and at 90 % saved."""
    text, kl = section("docs/quality.md", "What each ingredient is worth"), dict[tuple[str, str, float], float]()
    for name in ("ablation", "ablation_qwen"):
        for one in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
            kl[name, one["row"], one["wanted_saving"]] = one["kl"]
    for label, row in INGREDIENTS.items():
        (cells,) = rows(text, label)
        for cell, name in zip(cells[1:], ("ablation", "ablation_qwen"), strict=True):
            measured = [kl[name, row, saving] for saving in (0.75, 0.9) if (name, row, saving) in kl]
            assert cell == " / ".join(f"{value:.4f}".removeprefix("0") for value in measured)
