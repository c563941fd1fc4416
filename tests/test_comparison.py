"""Modes side by side, sweeps, and what notebooks show of them."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from specattn_jax.errors import UserError
from specattn_jax.evaluation.documents import cut_documents
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.examples import tiny_pair
from specattn_jax.notebook.compare import COMPARED, Comparison, compare
from specattn_jax.notebook.sweep import sweep
from specattn_jax.reporting.display import PngPicture, Table, columns
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import choose_reading

PROMPT = "Once upon a time there was a cache. "
TEXT = PROMPT * 8
# Its attention is sharp, so that reading less shows.
PAIR = tiny_pair()


@pytest.fixture(scope="module")
def updates():
    return []


@pytest.fixture(scope="module")
def comparison(updates):
    return compare(PAIR, PROMPT, p=0.5, max_new_tokens=16, on_update=updates.append)


class TestCompare:
    def test_each_mode_is_what_generate_gives(self, comparison):
        for mode in COMPARED:
            reads = {"p": 0.5} if mode == "specattn" else {}
            alone = generate(PAIR, [PROMPT], mode=mode, max_new_tokens=16, **reads).results[0]
            assert comparison[mode].tokens == alone.tokens
            assert comparison[mode].stats == pytest.approx(alone.stats)
            assert comparison.texts[mode] == alone.text

    def test_text_arrives_mode_by_mode(self, comparison, updates):
        assert updates[0].texts.keys() == {"autoregressive"}
        assert updates[-1].texts == comparison.texts
        for before, after in itertools.pairwise(updates):
            assert all(after.texts[mode].startswith(text) for mode, text in before.texts.items())
            assert len(after.runs) >= len(before.runs)
        assert sum(not update.runs for update in updates) > 1

    def test_a_notebook_shows_texts_and_numbers(self, comparison, updates):
        assert [row[0] for row in comparison.table.rows] == list(COMPARED)
        assert comparison.table._repr_html_() in comparison._repr_html_()
        assert "<table" not in updates[0]._repr_html_()

    def test_a_text_is_tinted_from_where_it_leaves_the_first(self):
        page = Comparison({"autoregressive": "one <two", "speculative": "one <two", "specattn": "one <six"}, {})
        assert re.findall(r"<span[^>]*>([^<]*)</span>", page._repr_html_()) == ["six"]
        assert page._repr_html_().count("one &lt;two") == 2

    def test_no_modes(self):
        with pytest.raises(UserError, match="modes is empty"):
            compare(PAIR, PROMPT, modes=())


class TestSweep:
    @pytest.mark.slow
    def test_points_are_single_readings(self):
        found = sweep(PAIR, TEXT, p=[0.5, 0.9], window=[3, 5], context=96)
        assert [(point.window, point.p) for point in found.points] == [(3, 0.5), (3, 0.9), (5, 0.5), (5, 0.9)]
        documents = cut_documents([PAIR.encode(TEXT)], 96, 1)
        models = PAIR.target, PAIR.draft
        for point in found.points:
            setting = {"prefill_share": 0.5, "window": point.window}
            full = read_documents(*models, None, documents, **setting)
            chosen = choose_reading(PAIR, p=point.p)
            alone = read_documents(*models, chosen, documents, reference=full.hidden, **setting)
            assert point.kv_reduction == pytest.approx(alone.kv_reduction, abs=1e-5)
            assert point.kl == pytest.approx(float(np.mean(alone.kl)), rel=1e-3)
            assert point.top1 == pytest.approx(float(np.mean(alone.top1)))
            assert point.relative_increase == pytest.approx(alone.perplexity / full.perplexity - 1, abs=1e-4)
        assert len(found.table.rows) == 4
        assert found.table.rows[0][:2] == ("3", "p = 0.5")
        assert found.plot().png.startswith(b"\x89PNG")

    @pytest.mark.slow
    def test_wanted_savings(self):
        found = sweep(PAIR, TEXT, kv_reduction=[0.5, 0.9], context=96)
        assert [point.wanted for point in found.points] == [0.5, 0.9]
        assert "50% saved" in found._repr_html_()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({}, "p and kv_reduction both say how much to read"),
            ({"p": [0.5], "kv_reduction": [0.5]}, "some values of one of them"),
            ({"p": [0.0]}, "p is 0.0"),
            ({"p": [0.5], "context": 10_000}, "the longest text has"),
        ],
    )
    def test_mistakes(self, arguments, said):
        with pytest.raises(UserError, match=re.escape(said)):
            sweep(PAIR, TEXT, **arguments)


class TestDisplay:
    def test_tables_escape_their_cells(self):
        table = Table.of([{"a": "<b>", "n": 0.12345}])
        assert str(table) == "| a | n |\n| --- | --- |\n| <b> | 0.123 |"
        assert "&lt;b&gt;" in table._repr_html_()

    def test_titles_are_escaped(self):
        assert "a &amp; b" in columns([("a & b", "")])

    def test_pictures_are_saved_whole(self, tmp_path):
        picture = PngPicture(b"\x89PNG...")
        picture.save(tmp_path / "new" / "one.png")
        assert (tmp_path / "new" / "one.png").read_bytes() == picture._repr_png_() == b"\x89PNG..."

    def test_no_colour_is_bound_to_a_light_or_dark_page(self):
        page = columns([("a", "b")]) + Table(("a",), (("b",),))._repr_html_()
        assert not re.search(r"(?<![-\w])color:|#[0-9a-fA-F]{3}|white;|black", page)
