"""What a draft reads of its own cache: chosen by what that costs its pair, where context and batch are known."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import selection_for

from specattn_jax import generate
from specattn_jax.calibration.draft_reads import SHARES
from specattn_jax.decoding.work import Scenario
from specattn_jax.errors import UserError
from specattn_jax.evaluation.methods import SPECATTN, Case, Variant, fit_case, make_selection
from specattn_jax.examples import tiny_pair
from specattn_jax.planning.cost import load_shape
from specattn_jax.planning.draft_reads import choose_draft_reads, fit_draft_reads
from specattn_jax.runtime.request import choose_reading
from specattn_jax.selection.policy import load_policy

LLAMA = Scenario(load_shape("llama-3.1-8b"), load_shape("llama-3.2-1b"))
FREE = dict.fromkeys(SHARES, 0.01)
DEFAULT = load_policy("default")


def measured(pair, losses):
    """The pair, as if this had been measured."""
    arrays = {"draft_shares": jnp.array(list(losses)), "draft_kl": jnp.array(list(losses.values()))}
    return dataclasses.replace(pair, alignment=dataclasses.replace(pair.alignment, **arrays))


def losses_of(*kl):
    return dict(zip(SHARES, kl, strict=True))


class TestChoice:
    def test_short_contexts_are_read_whole_and_long_ones_sparsely(self):
        assert choose_draft_reads(LLAMA._replace(context=2048), FREE) == 1.0
        assert choose_draft_reads(LLAMA._replace(context=131072), FREE) == 0.05
        assert choose_draft_reads(LLAMA._replace(context=100), FREE) == 1.0

    def test_so_are_few_sequences_and_many(self):
        assert choose_draft_reads(LLAMA._replace(context=2048, batch=16), FREE) < 1.0

    def test_what_costs_more_is_read_more_densely(self):
        case = LLAMA._replace(context=32768)
        # Windows become 13, 16 and 17 % faster: half of the loss has to be less.
        assert choose_draft_reads(case, losses_of(0.01, 0.01, 0.01, 0.02)) == 0.1
        assert choose_draft_reads(case, losses_of(0.01, 0.0105, 0.0125, 0.02)) == 0.25
        assert choose_draft_reads(case, losses_of(0.01, 0.0126, 0.0133, 0.02)) == 0.25
        assert choose_draft_reads(case, losses_of(0.01, 0.0128, 0.0135, 0.02)) == 1.0

    def test_a_sparser_reading_is_no_better_than_a_denser_one(self):
        case = LLAMA._replace(context=32768)
        lucky = losses_of(0.01, 0.02, 0.001, 0.001)
        assert choose_draft_reads(case, lucky) == choose_draft_reads(case, losses_of(0.01, 0.02, 0.02, 0.02)) == 1.0

    def test_of_no_loss_at_all_speed_decides(self):
        case = LLAMA._replace(context=131072)
        assert choose_draft_reads(case, losses_of(0.0, 0.0, 0.0, 0.0)) == 0.05
        assert choose_draft_reads(case, losses_of(0.0, 0.0, 0.0, 1e-4)) == 0.1

    @given(
        st.lists(st.floats(1e-4, 1.0), min_size=4, max_size=4),
        st.integers(1, 64),
        st.integers(64, 200_000),
        st.sampled_from([1.0, 1.3, 3.0]),
    )
    def test_longer_contexts_and_smaller_losses_never_mean_denser(self, kl, batch, context, factor):
        here = choose_draft_reads(LLAMA._replace(batch=batch, context=context), losses_of(*kl))
        longer = choose_draft_reads(LLAMA._replace(batch=batch, context=2 * context), losses_of(*kl))
        assert longer <= here
        worse = losses_of(kl[0], *(factor * one for one in kl[1:]))
        assert choose_draft_reads(LLAMA._replace(batch=batch, context=context), worse) >= here


class TestFitting:
    def test_what_was_measured_is_chosen_from(self):
        pair = measured(tiny_pair(), {1.0: 0.01, 0.25: 0.01, 0.1: 0.5})
        assert choose_reading(pair, context=100_000, batch=8).policy == DEFAULT.with_draft_reads(0.25)
        assert choose_reading(pair, context=200).policy == DEFAULT.with_draft_reads(1.0)

    def test_of_what_was_not_measured_the_policy_speaks_where_it_pays(self):
        assert choose_reading(tiny_pair(), context=100_000).policy == DEFAULT.with_draft_reads(DEFAULT.draft_reads)
        assert choose_reading(tiny_pair(), context=200).policy == DEFAULT.with_draft_reads(1.0)

    @pytest.mark.parametrize("context", [200, 100_000])
    def test_a_share_of_ones_own_holds(self, context):
        mine = DEFAULT.with_draft_reads(0.3)
        pair = measured(tiny_pair(), {1.0: 0.01, 0.25: 0.01})
        assert choose_reading(pair, policy=mine, context=context).policy == mine
        paper = selection_for(pair.target, pair.draft, "paper", 0.9)
        assert fit_draft_reads(paper, context=context) == paper

    def test_where_no_context_is_known_the_policy_speaks(self):
        assert choose_reading(measured(tiny_pair(), {1.0: 0.01, 0.25: 0.01})).policy == DEFAULT

    def test_rows_of_tables_say_it(self):
        pair = measured(tiny_pair(), {1.0: 0.01, 0.25: 0.01})
        case = Case(SPECATTN, "default", saving=0.75)
        fitted = fit_case(pair, case, context=100_000)
        assert (fitted.draft_reads, fitted.describe()["policy"]["draft_reads"]) == (0.25, 0.25)
        assert make_selection(pair, fitted).policy == DEFAULT.with_draft_reads(0.25)
        assert fit_case(pair, fitted, context=200) is fitted
        assert fit_case(pair, case, context=200).draft_reads == 1.0
        mine = Case(SPECATTN, "mine", saving=0.75, variant=Variant(DEFAULT.with_draft_reads(0.3)))
        for other in (mine, Case("oracle", p=0.9), Case(SPECATTN, "paper", p=0.9)):
            assert fit_case(pair, other, context=100_000) is other

    def test_results_say_it(self):
        results = generate(tiny_pair(), ["a", "bc"], mode="specattn", max_new_tokens=3).results
        assert [result.draft_reads for result in results] == [1.0, 1.0]
        assert generate(tiny_pair(), ["a"], mode="speculative", max_new_tokens=3).results[0].draft_reads is None

    def test_a_layer_map_has_nothing_to_choose(self):
        with pytest.raises(UserError, match=r"draft_reads is 1\.0, to be fitted, but prediction 'layer_map'"):
            dataclasses.replace(load_policy("paper"), fits_draft_reads=True)
