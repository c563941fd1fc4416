"""Choosing the mode: predicted times, decisions, and switches in the middle of a text."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import jax
import pytest

from specattn_jax.decoding import loop
from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.decoding.work import Scenario
from specattn_jax.errors import UserError
from specattn_jax.examples import tiny_pair
from specattn_jax.planning.acceptance import Acceptance
from specattn_jax.planning.cost import load_shape
from specattn_jax.planning.device import DeviceProfile, load_profile, seconds_per_token, window_seconds
from specattn_jax.planning.gate import (
    HYSTERESIS,
    TIE,
    WINDOWS,
    Choice,
    Decision,
    Situation,
    choose_strategy,
    expected_saving,
    make_gate,
)
from specattn_jax.runtime import generate as generation
from specattn_jax.runtime.clock import Clock
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import NEVER_DRAFTED, Mode, Request, choose_reading, find_candidates
from specattn_jax.runtime.segments import TRIAL_WINDOWS
from specattn_jax.selection.policy import load_policy

LLAMA = Scenario(load_shape("llama-3.1-8b"), load_shape("llama-3.2-1b"), kv_reduction=0.88, draft_reads=0.3)
SMOLLM2 = Scenario(load_shape("smollm2-135m"), load_shape("smollm2-draft"), itemsize=4)
GPU = load_profile("gpu", bandwidth=2.6e12)
CPU = load_profile("cpu", bandwidth=3e9, flops=12e9)
CONTEXTS = [2**power for power in range(9, 18)]
PROMPTS = ("Call me Ishmael.", "Once upon a time there was a cache")


MODES = ("autoregressive", "speculative", "specattn")
STRATEGIES = (
    Autoregressive(),
    *(Speculative(window=window) for window in WINDOWS),
    *(SpecAttn(window=window) for window in WINDOWS),
)


def choose(scenario, profile, context, rate=0.8, strategies=STRATEGIES):
    return choose_strategy(scenario, profile, Situation(context, 1000, Acceptance(rate)), strategies)


def gate_of(pair, **options):
    """The gate of all strategies that a request may be answered with."""
    strategies, selection = find_candidates(pair, Request(**options))
    return make_gate(pair, 1, strategies, selection, profile=GPU)


class TestWindowTime:
    def verify(self, scenario, profile):
        """Seconds of the target's pass, alone and for a window."""
        return [
            window_seconds(scenario, strategy.cost(scenario), profile).verify
            for strategy in (Autoregressive(), Speculative())
        ]

    def test_where_arithmetic_counts_tokens_cost_as_much_as_they_are(self):
        alone, verify = self.verify(SMOLLM2._replace(context=1), DeviceProfile(bandwidth=1e30, flops=1e10))
        assert verify == pytest.approx(6 * alone)

    def test_a_pass_over_many_sequences_is_bound_by_arithmetic_on_a_gpu_too(self):
        alone, verify = self.verify(LLAMA._replace(batch=512, context=1), GPU)
        assert verify > 2 * alone

    def test_devices_that_are_not_known(self):
        with pytest.raises(UserError, match="device is 'npu'; expected one of gpu, cpu, tpu"):
            load_profile("npu", bandwidth=1.0)


class TestDecision:
    @pytest.mark.slow
    @pytest.mark.parametrize("profile", [GPU, CPU], ids=["gpu", "cpu"])
    @pytest.mark.parametrize("scenario", [LLAMA, SMOLLM2], ids=["llama", "smollm2"])
    def test_nothing_faster_is_left_out(self, scenario, profile):
        for context, rate, batch in itertools.product(CONTEXTS, (0.1, 0.5, 0.9), (1, 8)):
            decision = choose(scenario._replace(batch=batch), profile, context, rate)
            seconds = {one.choice: one.request for one in decision.predictions}
            assert seconds[decision.choice] <= min(seconds.values()) * (1 + TIE)

    def test_longer_contexts_and_larger_batches_make_it_sparse_and_never_dense_again(self):
        for scenarios in (
            [LLAMA._replace(context=context) for context in CONTEXTS],
            [LLAMA._replace(context=16384, batch=batch) for batch in (1, 2, 4, 8, 16)],
        ):
            modes = [MODES.index(choose(one, GPU, one.context).mode) for one in scenarios]
            assert modes == sorted(modes)
            assert MODES[modes[-1]] == "specattn"
        assert choose(LLAMA, GPU, 512).mode == "speculative"

    def test_the_more_is_accepted_the_longer_the_window(self):
        windows = [choose(LLAMA, GPU, 2048, rate).window for rate in (0.05, 0.3, 0.5, 0.7, 0.9)]
        assert windows == sorted(windows)
        assert windows[0] < 2 < windows[-1]

    def test_a_draft_that_is_never_right_is_left_alone(self):
        assert choose(LLAMA, GPU, 2048, 0.01).mode == "autoregressive"

    def test_what_computes_slowly_decodes_alone(self):
        for context in (128, 2048):
            assert choose(SMOLLM2, CPU, context, 0.25).mode == "autoregressive"

    def test_only_what_can_be_had(self):
        only = (Autoregressive(), Speculative(window=3))
        assert choose(LLAMA, GPU, 2**17, strategies=only).choice == Choice("speculative", 3)

    def test_a_draft_reads_no_long_prompt_for_a_few_tokens(self):
        few, many = (choose_strategy(LLAMA, GPU, Situation(32768, count), STRATEGIES) for count in (2, 1000))
        assert (few.mode, many.mode) == ("autoregressive", "specattn")
        assert "but not by as much as its draft needs to read the prompt" in few.reason
        # What a prompt takes does not count once it was read.
        running = Situation(32768, 2, current=many.choice)
        assert choose_strategy(LLAMA, GPU, running, STRATEGIES).choice == many.choice

    def test_equals_go_to_the_simpler_mode(self):
        # p = 1: nothing is saved.
        decision = choose(LLAMA._replace(kv_reduction=0.0, draft_reads=1.0), GPU, 32768)
        assert decision.mode == "speculative"
        assert "predicted" in decision.reason

    def test_it_says_what_it_knew(self):
        told = "\n".join(choose(LLAMA, GPU, 32768).explain())
        for said in ("32,768 tokens", "80% of drafted", "2,600.0 GB/s", "autoregressive: ", "specattn (window"):
            assert said in told


class TestPolicy:
    @pytest.mark.parametrize(
        ("options", "reads"),
        [
            # Of a short text the draft reads everything.
            ({}, 1.0),
            ({"policy": "paper"}, 1.0),
            ({"lossless": True}, None),
        ],
    )
    def test_one_is_considered(self, monkeypatch, options, reads):
        seen = []

        def gate(pair, batch, strategies, selection, **_):
            seen.append(selection and selection.policy.draft_reads)
            assert ("specattn" in {strategy.name for strategy in strategies}) == (selection is not None)
            return lambda _: Decision(Choice("autoregressive", 0), is_final=True)

        monkeypatch.setattr("specattn_jax.runtime.generate.make_gate", gate)
        generate(tiny_pair(), ["a"], max_new_tokens=2, **options)
        assert seen == [reads]

    def test_of_an_alignment_by_layers_the_draft_reads_everything(self):
        pair = tiny_pair()
        pair = dataclasses.replace(pair, alignment=dataclasses.replace(pair.alignment, granularity="layer"))
        assert choose_reading(pair).policy == load_policy("default").with_draft_reads(1.0)


def switch(scenario, profile, situation):
    return choose_strategy(scenario, profile, situation, STRATEGIES)


class TestSwitching:
    def situation(self, **changes):
        known = Situation(131072, 20_000, Acceptance(0.8), current=Choice("speculative", 5), compile_s=10.0)
        return known._replace(**changes)

    def test_pays_over_what_remains(self):
        assert switch(LLAMA, GPU, self.situation()).mode == "specattn"
        stays = switch(LLAMA, GPU, self.situation(remaining=100))
        assert stays.choice == Choice("speculative", 5)
        assert "would save" in stays.reason

    def test_to_what_is_compiled_is_free(self):
        better = switch(LLAMA, GPU, self.situation())
        again = self.situation(remaining=100, compiled=frozenset({better.choice}))
        assert switch(LLAMA, GPU, again).choice == better.choice

    def test_where_a_program_came_from_a_cache_another_need_not(self):
        known = self.situation(remaining=500, compile_s=0.0)
        assert switch(LLAMA, GPU, known).choice == known.current
        assert switch(LLAMA, dataclasses.replace(GPU, compile_s=0.0), known).mode == "specattn"

    def test_what_takes_less_than_compiling_is_decided_once(self):
        short = switch(SMOLLM2, GPU, Situation(6144, 256))
        assert short.is_final
        assert not switch(SMOLLM2, GPU, Situation(6144, 10**5)).is_final
        other = frozenset({short.choice, Choice("specattn", 3)})
        assert not switch(SMOLLM2, GPU, Situation(6144, 256, compiled=other)).is_final

    def test_few_windows_are_no_evidence(self):
        """Half of what was hoped for, seen in a few windows, may be chance; seen in many it is not."""
        known = Situation(6144, 10**6, current=Choice("speculative", 5))
        few, many = Acceptance(0.7, 12.0), Acceptance(0.7, 64.0)
        low, high = few.bounds(5)
        assert low.rate < many.bounds(5)[0].rate < 0.7 < many.bounds(5)[1].rate < high.rate
        assert switch(SMOLLM2, GPU, known._replace(acceptance=few)).choice == known.current
        assert switch(SMOLLM2, GPU, known._replace(acceptance=many)).window < 5

    @pytest.mark.slow
    def test_little_is_not_enough(self):
        """Just past the point where two modes are equally fast, either goes on if it runs."""
        crossing = next(context for context in range(256, 2**17, 256) if choose(LLAMA, GPU, context).mode == "specattn")
        for current in (choose(LLAMA, GPU, crossing).choice, choose(LLAMA, GPU, crossing - 256).choice):
            known = Situation(crossing, 10**9, Acceptance(0.8), current=current)
            assert switch(LLAMA, GPU, known).choice == current
        assert HYSTERESIS > TIE


class TestGate:
    def test_a_pair_without_alignment_is_never_sparse(self):
        gate = gate_of(dataclasses.replace(tiny_pair(), alignment=None))
        lossless = [mode for mode in get_args(Mode) if mode != "specattn"]
        assert {strategy.name for strategy in gate.strategies} == set(lossless)
        assert [one.choice.mode for one in gate(Situation(10**6, 100)).predictions] == lossless

    def test_without_the_drafts_cache_there_is_no_way_back(self):
        gate = gate_of(tiny_pair())
        decision = gate(Situation(100, 10**6, Acceptance(0.99), can_draft=False))
        assert {one.choice.mode for one in decision.predictions} == set(NEVER_DRAFTED)
        # Others that need no draft may become faster.
        assert not decision.is_final
        few = choose(LLAMA, GPU, 2048, 0.001)
        assert (few.mode, few.is_final) == ("autoregressive", True)

    def test_a_short_cache_is_read_nearly_whole(self):
        gate = gate_of(tiny_pair())
        assert gate.always_read == 20
        assert gate.scenario.kv_reduction == pytest.approx(0.75)
        assert gate.scenario.draft_reads == load_policy("default").draft_reads
        short = gate(Situation(20, 100)).predictions
        assert short == gate_of(tiny_pair(), p=1.0)(Situation(20, 100)).predictions

    @pytest.mark.parametrize(("given", "saved"), [({"kv_reduction": 0.6}, 0.6), ({"p": 1.0}, 0.0), ({"p": 0.9}, 0.5)])
    def test_what_it_would_save(self, given, saved):
        assert expected_saving(choose_reading(tiny_pair(), **given)) == pytest.approx(saved, abs=1e-5)

    def test_what_was_saved_counts_more_than_what_is_wanted(self):
        gate = gate_of(tiny_pair(), kv_reduction=0.9)

        def sparse(known):
            return min(one.seconds for one in gate(known).predictions if one.choice.mode == "specattn")

        known = Situation(10**6, 100)
        assert sparse(known._replace(kv_reduction=0.2)) > sparse(known)
        scenario = gate.scenario._replace(context=10**6, window=1, accepted=0.7)
        assert sparse(known) <= seconds_per_token(scenario, SpecAttn(window=1).cost(scenario), GPU)


@pytest.fixture(scope="module")
def alone():
    run = generate(tiny_pair(), PROMPTS, mode="autoregressive", max_new_tokens=240, stop_at_eos=False)
    return [result.tokens for result in run.results]


class TestGenerate:
    @pytest.mark.slow
    def test_switches_leave_a_lossless_text_as_it_is(self, alone):
        named = [("speculative", 2), ("specattn", 6), ("specattn", 4), ("autoregressive", 0)]
        choices = [Choice(*one) for one in named]
        situations, told = list[Situation](), list[Decision]()

        def decide(situation):
            situations.append(situation)
            choice = choices[len(situations) - 1]
            # Without the draft there is no way back.
            return Decision(choice, is_final=choice.mode == "autoregressive")

        run = generate(
            tiny_pair(), PROMPTS, max_new_tokens=240, p=1.0, stop_at_eos=False, decide=decide, on_decision=told.append
        )
        assert [result.tokens for result in run.results] == alone
        assert [decision.choice for decision in run.decisions] == choices
        assert told == run.decisions
        # At the start, after the first windows, at 32 (or at once, where it is past), 64 and 128 entries; then never.
        assert [situation.current for situation in situations] == [None, *choices[:3]]
        assert [known.context.bit_length() for known in situations[2:]] == [7, 8]
        assert situations[-1].compiled == set(choices[:3])
        assert situations[-1].compile_s > 0
        assert situations[2].kv_reduction == pytest.approx(0.0, abs=1e-6)
        assert situations[3].kv_reduction == pytest.approx(0.0, abs=1e-6)
        result = run.results[0]
        assert (result.mode, result.window) == ("autoregressive", None)
        assert result.windows > TRIAL_WINDOWS

    @pytest.mark.parametrize(
        "on_text",
        [pytest.param(None, marks=pytest.mark.slow, id="whole"), pytest.param(lambda index, text: None, id="streamed")],
    )
    def test_statistics_are_those_of_all_segments(self, alone, on_text):
        windows = itertools.cycle([3, 5])
        run = generate(
            tiny_pair(),
            PROMPTS,
            max_new_tokens=240,
            stop_at_eos=False,
            on_text=on_text,
            decide=lambda _: Decision(Choice("speculative", next(windows))),
        )
        for result, tokens in zip(run.results, alone, strict=True):
            assert result.tokens == tokens
            # Every window gives what was accepted and one token more, but for the last, which may be cut.
            given = 1 + result.windows * (1 + result.accepted_per_window)
            assert 240 <= round(given) < 240 + 6
            assert result.kv_reduction == 0
        assert run.results[0].mode == "speculative"
        assert run.results[0].window in (3, 5)

    def test_nobody_looks_again_where_a_decision_is_final(self, alone):
        asked = []

        def decide(situation):
            asked.append(situation)
            return Decision(Choice("speculative", 3), is_final=True)

        run = generate(tiny_pair(), PROMPTS, max_new_tokens=240, stop_at_eos=False, decide=decide)
        assert [result.tokens for result in run.results] == alone
        assert len(asked) == len(run.decisions) == 1

    @pytest.mark.parametrize("mode", [*(pytest.param(one, marks=pytest.mark.slow) for one in MODES[:-1]), MODES[-1]])
    def test_a_final_decision_runs_the_program_of_the_fixed_mode(self, monkeypatch, mode):
        programs = []

        decode = loop.decode

        def record(strategy, models, state, windows):
            shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
            programs.append((jax.tree.structure(strategy), models.draft is None, shapes))
            return decode(strategy, models, state, windows)

        monkeypatch.setattr(loop, "decode", record)
        decided = Decision(Choice(mode, 0 if mode == "autoregressive" else 5), is_final=True)
        texts = [
            generate(tiny_pair(), PROMPTS[:1], max_new_tokens=20, stop_at_eos=False, **how).results[0].tokens
            for how in ({"mode": mode}, {"mode": "auto", "decide": lambda _: decided})
        ]
        assert texts[0] == texts[1]
        fixed, auto = programs[: len(programs) // 2], programs[len(programs) // 2 :]
        assert fixed == auto

    @pytest.mark.slow
    def test_what_a_start_takes_to_compile_is_no_decoding(self, monkeypatch):
        laps = []

        class Watched(Clock):
            def lap(self, kind, value=None):
                laps.append(kind)
                return super().lap(kind, value)

        original = loop.start

        class Start:
            def __call__(self, strategy, models, state):
                laps.append(f"start {strategy.name}")
                return original(strategy, models, state)

            def lower(self, strategy, models, state):
                laps.append(f"lower {strategy.name}")
                return original.lower(strategy, models, state)

        monkeypatch.setattr(generation, "Clock", Watched)
        monkeypatch.setattr(loop, "start", Start())
        choices = iter([("specattn", 3), ("speculative", 3), ("specattn", 3), ("autoregressive", 0)])

        def decide(_):
            choice = Choice(*next(choices))
            return Decision(choice, is_final=choice.mode == "autoregressive")

        generate(
            tiny_pair(),
            PROMPTS[:1],
            max_new_tokens=240,
            stop_at_eos=False,
            decide=decide,
        )
        started = [index for index, what in enumerate(laps) if what == "start specattn"]
        assert laps[started[0] - 3 : started[0] + 3] == [
            *("decode", "lower specattn", "compile", "start specattn", "decode", "compile")
        ]
        # The second time its program is there.
        assert len(started) == 2
        assert laps.count("lower specattn") == 1

    def test_sparse_without_an_alignment(self):
        pair = dataclasses.replace(tiny_pair(), alignment=None)
        with pytest.raises(
            ValueError, match=r"decide chose specattn \(window 3\); expected one of autoregressive, look"
        ):
            generate(pair, ["a"], max_new_tokens=4, decide=lambda _: Decision(Choice("specattn", 3)))

    def test_a_window_beyond_the_room(self):
        with pytest.raises(ValueError, match=r"decide chose speculative \(window 9\); expected one of"):
            generate(tiny_pair(), ["a"], max_new_tokens=4, decide=lambda _: Decision(Choice("speculative", 9)))

    def test_auto_is_the_default_and_explains_itself(self):
        run = generate(tiny_pair(), ["a"], max_new_tokens=2)
        assert run.results[0].mode == run.decisions[0].mode
        assert {one.choice.mode for one in run.decisions[0].predictions} == set(get_args(Mode))
        fixed = generate(tiny_pair(), ["a"], max_new_tokens=2, mode="autoregressive")
        assert fixed.decisions == []

    @pytest.mark.parametrize(
        "mode", [mode for mode in get_args(Mode) if mode not in ("autoregressive", "hierarchical")]
    )
    def test_a_named_mode_may_leave_its_window_open(self, mode):
        """Every window that `auto` considers, of this mode alone; a window that is named, or the usual one, is one."""
        strategies = find_candidates(tiny_pair(), Request(mode=mode, window="auto")).strategies
        assert [Choice.of(one)[:2] for one in strategies] == [(mode, window) for window in WINDOWS]
        for asked, found in ((None, 5), (3, 3)):
            (strategy,) = find_candidates(tiny_pair(), Request(mode=mode, window=asked)).strategies
            assert strategy.window == found

    @pytest.mark.parametrize("mode", ["autoregressive", "hierarchical"])
    def test_modes_that_have_one_window(self, mode):
        one, same = (
            find_candidates(tiny_pair(), Request(mode=mode, window=asked)).strategies for asked in (None, "auto")
        )
        assert one == same
        assert len(one) == 1

    def test_the_window_is_chosen_and_the_text_stays(self, alone):
        run = generate(tiny_pair(), PROMPTS, mode="speculative", window="auto", max_new_tokens=240, stop_at_eos=False)
        assert [result.tokens for result in run.results] == alone
        assert {decision.mode for decision in run.decisions} == {"speculative"}
        assert run.results[0].window in WINDOWS

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"keep_selection": True}, "mode auto may select nothing"),
            ({"mode": "specattn", "lossless": True}, "lossless is set, but mode specattn is approximate"),
            ({"mode": "fast"}, "expected one of auto, autoregressive"),
            ({"window": 0}, "window is 0"),
            ({"window": "five"}, "window is 'five'; expected a number of drafted tokens, or auto"),
        ],
    )
    def test_mistakes(self, arguments, said):
        with pytest.raises(UserError, match=said):
            generate(tiny_pair(), ["a"], max_new_tokens=2, **arguments)
