"""How many drafted tokens will be accepted: what is believed before, and after some were seen."""

from __future__ import annotations

import pytest

from specattn_jax.examples import tiny_pair
from specattn_jax.loading import get_preset
from specattn_jax.planning.acceptance import Acceptance, Replay, text_acceptance
from specattn_jax.planning.gate import prior_acceptance


@pytest.mark.parametrize("further", [1.0, 0.4])
def test_what_is_seen_is_believed_in_the_end(further):
    true = Acceptance(0.6, further=further)
    seen = Acceptance(0.9, further=further).observe(5, 2000, round(2000 * true.expected(5)))
    assert seen.rate == pytest.approx(0.6, abs=0.01)
    # Another window tells the same rate.
    assert seen.observe(3, 2000, round(2000 * true.expected(3))).rate == pytest.approx(0.6, abs=0.01)


def test_few_windows_move_it_little():
    assert 0.7 > Acceptance(0.7).observe(5, 1, 0).rate > 0.6
    assert Acceptance(0.7).observe(5, 0, 0) == Acceptance(0.7)


@pytest.mark.parametrize("further", [1.0, 0.4, 0.0])
def test_rows_tell_what_becomes_of_further_tokens(further):
    true = Acceptance(0.3, further=further)
    assert true.expected(1) == pytest.approx(0.3)
    assert Acceptance(0.3).in_rows(8, true.expected(8)).further == pytest.approx(further, abs=1e-6)
    # Less than tokens that are all alike give is no news of further ones.
    assert Acceptance(0.3).in_rows(8, 0.1).further == pytest.approx(1.0)


@pytest.mark.parametrize("accepted", [0, 5 * 1000])
def test_all_and_nothing(accepted):
    rate = Acceptance().observe(5, 1000, accepted).rate
    assert 0 <= rate < 1


def test_greedy_words_repeat_more_than_the_prompt():
    replay = Replay()
    replay.push([*range(100), *range(50)])
    drawn, greedy = (text_acceptance([replay], greedy=whether) for whether in (False, True))
    assert drawn.rate < greedy.rate < 1
    assert (drawn.further, drawn.weight) == (greedy.further, greedy.weight)
    # Where the prompt tells nearly everything, little is left that its words could repeat besides.
    replay.push([*range(50)] * 40)
    most = text_acceptance([replay])
    assert text_acceptance([replay], greedy=True).rate - most.rate < 0.5 * (1 - most.rate) < 0.05


def test_what_is_known_before():
    assert prior_acceptance(tiny_pair()) == Acceptance()
    assert get_preset("smollm2").acceptance == 0.86
