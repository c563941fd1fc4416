"""Text in, text out: what Python users see around the loop."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

from specattn_jax.errors import UserError
from specattn_jax.reporting.shading import SelectionRecord, shade_window
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import Request
from specattn_jax.runtime.writer import Pace


@pytest.mark.parametrize(
    ("mode", "windows"),
    [pytest.param("autoregressive", 1, marks=pytest.mark.slow), ("specattn", 1), ("specattn", None)],
)
def test_text_arrives_in_pieces_of_whole_characters(tiny_pair, monkeypatch, mode, windows):
    if windows is not None:
        monkeypatch.setattr("specattn_jax.runtime.generate.Pace", lambda *_: Pace(windows))
    pieces: dict[int, list[str]] = {0: [], 1: []}
    run = generate(
        tiny_pair,
        ["naïve 日本語", "🙂"],
        mode=mode,
        max_new_tokens=24,
        temperature=1.0,
        on_text=lambda index, text: pieces[index].append(text),
    )
    for index, result in enumerate(run.results):
        assert "".join(pieces[index]) == result.text
        assert len(pieces[index]) > 1


class TestPace:
    def test_grows_from_one_window_to_what_fits_a_fifth_of_a_second(self):
        pace, taken = Pace(), []
        for _ in range(6):
            taken.append(pace.windows)
            pace.took(pace.windows, 0.024 * pace.windows)
        assert taken == [1, 2, 4, 8, 8, 8]

    @pytest.mark.parametrize(("windows", "seconds", "then"), [(8, 4.0, 1), (8, 0.8, 2), (1, 0.0, 2)])
    def test_slow_calls_shorten_it_at_once(self, windows, seconds, then):
        pace = Pace()
        pace.took(windows, seconds)
        assert pace.windows == then

    def test_a_fixed_number_stays(self):
        pace = Pace(4)
        pace.took(4, 10.0)
        assert pace.windows == 4


class TestRequest:
    def test_what_is_given_beside_it_changes_it(self, tiny_pair):
        request = Request(max_new_tokens=5, mode="speculative", window=2, temperature=1.0, seed=3)
        run = generate(tiny_pair, ["a"], request, max_new_tokens=9)
        plain = {"mode": "speculative", "window": 2, "temperature": 1.0, "seed": 3}
        assert run.results[0].tokens == generate(tiny_pair, ["a"], max_new_tokens=9, **plain).results[0].tokens
        assert run.results[0].tokens[:5] == generate(tiny_pair, ["a"], request).results[0].tokens

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"colour": "red"}, "colour is no option of generate; expected some of max_new_tokens, mode"),
            ({"mode": "fast"}, "mode is 'fast'; expected one of auto, autoregressive, lookup, self"),
            ({"window": 65}, "window is 65; expected 1 to 64"),
            ({"temperature": -1.0}, "temperature is -1.0"),
        ],
    )
    def test_mistakes(self, changes, said):
        with pytest.raises(UserError, match=said):
            Request().change(**changes)


PROMPTS = ("It is a truth universally acknowledged", "naïve 日本語 🙂")


@pytest.fixture(scope="module")
def run(tiny_pair):
    return generate(tiny_pair, PROMPTS, mode="specattn", max_new_tokens=20, keep_selection=True, p=0.6)


class TestKeptSelection:
    def test_text_and_numbers_are_those_of_a_run_without(self, tiny_pair, run):
        plain = generate(tiny_pair, PROMPTS, mode="specattn", max_new_tokens=20, p=0.6)
        for kept, other in zip(run.results, plain.results, strict=True):
            assert kept.tokens == other.tokens
            assert kept.stats == pytest.approx(other.stats)

    def test_readers_are_the_reads_that_were_counted(self, tiny_pair, run):
        for prompt, result in zip(PROMPTS, run.results, strict=True):
            record = result.selection
            assert len(record.past) == result.windows
            assert record.past[0] == result.prompt_tokens
            windows = list(zip(record.readers, record.past, strict=True))
            shares = [readers[:past].mean() / record.num_readers for readers, past in windows]
            assert 1 - np.mean(shares) == pytest.approx(result.kv_reduction, abs=1e-5)
            assert all((readers[past:] == 0).all() for readers, past in windows)
            assert "".join(record.pieces).startswith(prompt)

    def test_the_picture_holds_the_text(self, run):
        picture = run.results[0].plot_selection(0)
        body = re.search(r"line-height[^>]*>(.*)</p>", picture._repr_html_()).group(1)
        assert html.unescape(re.sub(r"<[^>]*>", "", body)) == PROMPTS[0]
        assert f"Window 1 of {run.results[0].windows}" in picture.html

    def test_what_cannot_be_shown(self, tiny_pair, run):
        with pytest.raises(UserError, match="window is 99; expected a number below"):
            run.results[0].plot_selection(99)
        plain = generate(tiny_pair, ["a"], max_new_tokens=24, mode="speculative")
        with pytest.raises(UserError, match="keep_selection=True"):
            plain.results[0].plot_selection()
        with pytest.raises(UserError, match="mode speculative selects nothing"):
            generate(tiny_pair, ["a"], max_new_tokens=24, mode="speculative", keep_selection=True)


def test_shades_escape_text_and_grow_with_readers():
    record = SelectionRecord(["a <b>", " & c", " d"], np.array([3]), np.array([[0, 5, 10]]), 10)
    page = shade_window(record, 0, most_tokens=2).html
    assert "a &lt;b&gt;" not in page
    assert '0.30)"> &amp; c</span>' in page
    assert '0.60)"> d</span>' in page
    assert "a &lt;b&gt;" in shade_window(record).html
