"""What `auto` chooses where nothing may be approximate, or where there is no draft."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import pytest

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.hierarchical import Hierarchical
from specattn_jax.decoding.hierarchical_lookup import HierarchicalLookup
from specattn_jax.decoding.itself import SelfSpeculative
from specattn_jax.decoding.lookup import PromptLookup
from specattn_jax.decoding.protocol import DecodeSettings, Strategy
from specattn_jax.decoding.speculative import SparselyDrafted, SpecAttn, Speculative
from specattn_jax.decoding.work import Scenario
from specattn_jax.examples import tiny_pair
from specattn_jax.planning.acceptance import Acceptance
from specattn_jax.planning.cost import load_shape, window_bytes
from specattn_jax.planning.device import DeviceProfile, load_profile, window_seconds
from specattn_jax.planning.gate import WINDOWS, Choice, Situation, choose_strategy
from specattn_jax.runtime.request import NEVER_DRAFTED, UNDRAFTED, Mode, Request, find_candidates, strategies_of
from specattn_jax.runtime.session import DRAFT_REACH

LLAMA = Scenario(load_shape("llama-3.1-8b"), load_shape("llama-3.2-1b"), kv_reduction=0.88, draft_reads=0.3)
GPU = load_profile("gpu", bandwidth=2.6e12)
# What the card of docs/results.md copied at.
H100 = load_profile("gpu", bandwidth=2.42e12)
ONE_EACH: tuple[Strategy, ...] = (Autoregressive(), Speculative(), SpecAttn())
LOSSLESS: tuple[Strategy, ...] = (PromptLookup(), SelfSpeculative(), SparselyDrafted(), Hierarchical())
ON_TEXT = HierarchicalLookup()


def choose(known, strategies=(ONE_EACH[0], *LOSSLESS)):
    return choose_strategy(LLAMA._replace(batch=8), GPU, known, strategies)


@pytest.mark.parametrize("strategy", [*ONE_EACH, *LOSSLESS, ON_TEXT], ids=lambda one: type(one).__name__)
def test_without_anything_fixed_it_is_bytes_over_bandwidth(strategy):
    ideal, work = DeviceProfile(bandwidth=2e12, flops=1e30), strategy.cost(LLAMA)
    assert window_seconds(LLAMA, work, ideal).total == pytest.approx(window_bytes(LLAMA, work).total / 2e12)


def test_without_a_draft_the_target_drafts_where_caches_are_large():
    known = Situation(32768, 1000, can_draft=False)
    assert choose(known._replace(text_acceptance=Acceptance(0.05))).mode == "self"
    assert choose(known._replace(context=512, text_acceptance=Acceptance(0.01))).mode == "autoregressive"


def test_a_text_that_repeats_itself_is_looked_up():
    decision = choose(Situation(512, 1000, can_draft=False, text_acceptance=Acceptance(0.9)))
    assert decision.mode == "lookup"
    assert "90% of those by the text" in decision.explain()[0]


def test_of_a_text_in_rows_longer_windows_are_looked_up():
    """As of code, whose tokens are found rarely, but then one after the other."""
    shape, windows = load_shape("qwen2.5-coder-1.5b"), [PromptLookup(window=window) for window in WINDOWS]

    def chosen(further):
        known = Situation(8192, 1000, can_draft=False, text_acceptance=Acceptance(0.4, further=further))
        return choose_strategy(Scenario(shape, shape), H100, known, windows).choice.window

    assert chosen(0.4) > chosen(1.0) > 1


def test_a_text_that_helps_is_looked_up_below_the_target_where_caches_are_large():
    by_windows = [kind(window=window) for kind in (PromptLookup, SelfSpeculative) for window in WINDOWS]

    def chosen(context, text, own=0.97):
        known = Situation(context, 1000, own_acceptance=Acceptance(own), text_acceptance=Acceptance(text))
        return choose(known, (ONE_EACH[0], *by_windows, ON_TEXT)).mode

    assert [chosen(2**17, rate) for rate in (0.05, 0.6, 0.9)] == ["self", "hierarchical", "lookup"]
    assert chosen(2**9, 0.6) == "lookup"
    # It runs ahead of its dense pass only where that keeps what it gives.
    assert chosen(2**17, 0.6, own=0.8) == "lookup"


def test_without_a_draft_the_hierarchy_stands_on_the_text():
    pair = dataclasses.replace(tiny_pair(), draft=None, alignment=None)
    strategies = find_candidates(pair, Request()).strategies
    assert {strategy.name for strategy in strategies} == set(UNDRAFTED)
    assert not any(strategy.needs_draft for strategy in strategies)
    # So few tokens leave the dense pass none to verify.
    narrow = find_candidates(pair, Request(window=3)).strategies
    assert {strategy.name for strategy in narrow} == set(NEVER_DRAFTED)


def test_what_the_target_gets_wrong_over_few_entries_is_no_longer_asked_of_it():
    known = Situation(32768, 10**5, can_draft=False, text_acceptance=Acceptance(0.01), current=Choice("self", 5))
    bad = known._replace(own_acceptance=Acceptance(0.2, 64.0))
    assert (choose(known).mode, choose(bad).mode) == ("self", "autoregressive")
    assert "switches from self (window 5) to autoregressive" in choose(bad).reason


def test_a_draft_of_a_long_cache_reads_few_entries():
    dense: list[Strategy] = [Autoregressive(), *(Speculative(window=window) for window in WINDOWS)]
    strategies = [*dense, *(SparselyDrafted(window=window) for window in WINDOWS)]
    long, short = (choose(Situation(context, 1000, Acceptance(0.8)), strategies).choice for context in (2**15, 2**8))
    assert (long.mode, long.sparse_draft) == ("speculative", True)
    assert "sparse draft" in str(long)
    assert (short.mode, short.sparse_draft) == ("speculative", False)


def test_windows_count_for_who_proposed_them():
    known = Situation(1000, 1000)
    for strategy in (*LOSSLESS, ON_TEXT):
        seen = known.observe(strategy, 5, 1000, 0)
        assert seen.accepted_of(strategy).rate < 0.1
        changed = [name for name in known._fields if getattr(seen, name) != getattr(known, name)]
        assert len(changed) == 1


def test_lossless_leaves_the_approximate_out():
    strategies, selection = find_candidates(tiny_pair(), Request(lossless=True))
    assert selection is None
    assert all(strategy.lossless for strategy in strategies)
    assert {strategy.name for strategy in strategies} == set(get_args(Mode)) - {"specattn"}


def takes(context, batch, own, text, draft=0.78, *, has_draft):
    """What `auto --lossless` takes for 4,096 tokens of the Llama pair; None where their caches do not fit an H200."""
    shapes = (LLAMA.target, LLAMA.draft) if has_draft else (LLAMA.target,)
    if sum(one.cache_bytes(batch, context, 2) for one in shapes) + 19e9 > 141e9:
        return None
    known = Situation(context, 4096, Acceptance(draft), Acceptance(own), Acceptance(text), draft_reach=DRAFT_REACH)
    strategies = tuple(strategies_of(Request(lossless=True), DecodeSettings(), None, has_draft))
    return choose_strategy(LLAMA._replace(batch=batch), H100, known, strategies).mode


def test_beside_a_draft_the_hierarchy_is_never_taken():
    sizes = itertools.product((2**13, 2**15, 2**17), (1, 4, 16))
    rates = list(itertools.product((0.96,), (0.05, 0.4), (0.3, 0.78, 0.9)))
    found = [takes(*size, *each, has_draft=True) for size in sizes for each in rates]
    assert len(found) - found.count(None) == 48
    assert "hierarchical" not in found


def test_without_a_draft_the_hierarchy_is_taken_for_large_caches_and_a_text_that_helps_a_little():
    sizes = (2**15, 8), (2**17, 1), (2**17, 2), (2**17, 4), (2**18, 1), (2**18, 2)
    assert {takes(*size, 0.96, 0.4, has_draft=False) for size in sizes} == {"hierarchical"}
    for own, text in ((0.9, 0.4), (0.96, 0.05), (0.96, 0.8)):
        assert "hierarchical" not in {takes(*size, own, text, has_draft=False) for size in sizes}
