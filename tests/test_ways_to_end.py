"""How texts end, and with whose random draws: stop texts, reasons, seeds, and drafts whose context is shorter."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_jax.errors import UserError
from specattn_jax.examples import byte_tokenizer
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.planning.gate import Choice, Decision
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.writer import Writer, find_stop

PROMPTS = ["Call me Ishmael.", "Once upon a time"]
MODES = ["autoregressive", "speculative", "specattn", "auto"]


# Whole or streamed the programs are the same, but each call is made of other lengths.
@pytest.mark.parametrize(
    ("mode", "streamed"),
    [
        (MODES[2], False),
        (MODES[3], True),
        *(
            pytest.param(mode, streamed, marks=pytest.mark.slow)
            for mode, streamed in itertools.product(MODES, (False, True))
            if (mode, streamed) not in ((MODES[2], False), (MODES[3], True))
        ),
    ],
)
def test_a_stop_text_ends_the_text_before_it(tiny_pair, mode, streamed):
    whole = generate(tiny_pair, PROMPTS, mode=mode, max_new_tokens=40).results
    stop = whole[0].text[7:10]
    pieces = ["", ""]

    def on_text(index, text):
        pieces[index] += text

    run = generate(
        tiny_pair,
        PROMPTS,
        mode=mode,
        max_new_tokens=40,
        stop=["never there", stop],
        on_text=on_text if streamed else None,
    )
    for got, full, told in zip(run.results, whole, pieces, strict=True):
        ends = full.text.find(stop)
        assert got.text == (full.text if ends < 0 else full.text[:ends])
        assert got.tokens == full.tokens[: len(got.tokens)]
        assert got.finish_reason == (full.finish_reason if ends < 0 else "stop text")
        assert not streamed or told == got.text
        if ends >= 0:
            assert stop in tiny_pair.tokenizer.decode(got.tokens)
            assert stop not in tiny_pair.tokenizer.decode(got.tokens[:-1])
    assert run.results[0].finish_reason == "stop text"


@settings(deadline=None)
@given(
    st.text("ab<", min_size=1, max_size=40),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_what_is_told_is_the_text_up_to_the_first_stop(text, stops, data):
    tokenizer = byte_tokenizer()
    ids, told, shown = tokenizer.encode(text, add_special=False), [], 0
    writer = Writer(tokenizer, 1, lambda _, piece: told.append(piece), stops)
    while shown < len(ids):
        shown = data.draw(st.integers(shown + 1, len(ids)))
        writer.show([ids[:shown]])
    writer.finish([ids])
    assert "".join(told) == text[: find_stop(text, stops)]
    assert writer.stopped == [find_stop(text, stops) is not None]


def test_the_stop_text_that_is_complete_first_ends_the_text():
    for text, stops, ends in (
        ("<<b<", ["b", "<b<"], 2),
        ("ab<", ["b<", "ab<"], 0),
        ("abab", ["ba", "ab"], 0),
        ("aa", ["b"], None),
    ):
        assert find_stop(text, stops) == ends


def test_what_cannot_stop(tiny_pair):
    for stop, said in (("###", "into brackets"), (["a", ""], "empty text")):
        with pytest.raises(UserError, match=said):
            generate(tiny_pair, PROMPTS, stop=stop)


def test_reasons(tiny_pair):
    whole = generate(tiny_pair, PROMPTS, mode="speculative", max_new_tokens=40).results[0]
    assert whole.finish_reason == "length"
    tokenizer = dataclasses.replace(tiny_pair.tokenizer, eos_ids=(whole.tokens[5],))
    pair = dataclasses.replace(tiny_pair, tokenizer=tokenizer)
    ended = generate(pair, PROMPTS, mode="speculative", max_new_tokens=40).results[0]
    assert ended.finish_reason == "end token"
    assert ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[5]) + 1]


@pytest.mark.parametrize(
    "mode", [MODES[1], *(pytest.param(other, marks=pytest.mark.slow) for other in (MODES[0], MODES[2]))]
)
def test_each_prompt_draws_by_its_seed_as_it_would_alone(tiny_pair, mode):
    def texts(prompts, seed):
        run = generate(tiny_pair, prompts, mode=mode, max_new_tokens=12, temperature=1.0, seed=seed)
        return [result.tokens for result in run.results]

    together = texts([*PROMPTS, PROMPTS[0]], [3, 4, 5])
    assert together == [
        texts([prompt], seed)[0] for prompt, seed in zip([*PROMPTS, PROMPTS[0]], (3, 4, 5), strict=True)
    ]
    assert together[0] != together[2]
    with pytest.raises(UserError, match="seed holds 1 seeds for 2 prompts"):
        texts(PROMPTS, [3])


def with_context(pair, draft_context):
    config = dataclasses.replace(pair.draft.config, max_context=draft_context)
    return dataclasses.replace(pair, draft=LanguageModel(pair.draft.params, pair.draft.graphdef, config))


class TestShortDrafts:
    @pytest.mark.parametrize("context", [17, 22, 30, 56, 57])
    def test_auto_goes_on_without_the_draft(self, tiny_pair, context):
        pair = with_context(tiny_pair, context)
        want = [
            result.tokens for result in generate(tiny_pair, PROMPTS, mode="autoregressive", max_new_tokens=40).results
        ]
        told: list[Decision] = []
        run = generate(pair, PROMPTS, mode="auto", lossless=True, max_new_tokens=40, on_decision=told.append)
        assert [result.tokens for result in run.results] == want
        assert run.decisions == told or not told[-1].predictions

    def test_decoding_leaves_the_draft_where_its_context_ends(self, tiny_pair):
        """Whatever the gate wishes for."""
        pair, drafted = with_context(tiny_pair, 32), Choice("speculative", 5)
        want = [
            result.tokens for result in generate(tiny_pair, PROMPTS, mode="autoregressive", max_new_tokens=60).results
        ]
        run = generate(
            pair,
            PROMPTS,
            mode="auto",
            lossless=True,
            window=5,
            max_new_tokens=60,
            decide=lambda _: Decision(drafted, "wished for"),
        )
        assert [result.tokens for result in run.results] == want
        assert run.decisions[0].choice == drafted
        assert run.decisions[-1].choice.mode == "autoregressive"
        assert "the draft's context ends at 32" in run.decisions[-1].reason

    @pytest.mark.parametrize("mode", [pytest.param("speculative", marks=pytest.mark.slow), "specattn"])
    def test_a_mode_that_insists_names_the_draft(self, tiny_pair, mode):
        longest = max(len(tiny_pair.tokenizer.encode(prompt)) for prompt in PROMPTS)
        pair = with_context(tiny_pair, longest + 20)
        generate(pair, PROMPTS, mode=mode, max_new_tokens=20)
        with pytest.raises(UserError, match=rf"the draft, .*draft.*, whose context is {longest + 20}; use mode auto"):
            generate(pair, PROMPTS, mode=mode, max_new_tokens=21)

    def test_the_targets_context_still_counts(self, tiny_pair):
        longest = max(len(tiny_pair.tokenizer.encode(prompt)) for prompt in PROMPTS)
        room = tiny_pair.target.config.max_context - longest
        with pytest.raises(UserError, match=f"leaves room for {room}; ask for fewer"):
            generate(with_context(tiny_pair, 64), PROMPTS, max_new_tokens=room + 1)


def test_numpy_seeds_are_numbers(tiny_pair):
    one, other = (
        generate(tiny_pair, PROMPTS, mode="autoregressive", temperature=1.0, max_new_tokens=4, seed=seed)
        .results[0]
        .tokens
        for seed in (7, np.int64(7))
    )
    assert one == other
