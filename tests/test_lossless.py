"""Strategies that draft in other ways: all write what the target writes alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import mistake
from command import run as run_command
from tiny import outputs, run, start, tiny_model

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.hierarchical import Hierarchical
from specattn_jax.decoding.hierarchical_lookup import HierarchicalLookup
from specattn_jax.decoding.itself import SelfSpeculative
from specattn_jax.decoding.looking import look_up
from specattn_jax.decoding.lookup import PromptLookup
from specattn_jax.decoding.middle import propose
from specattn_jax.decoding.pacing import LEAST_CHANCE, Tally, passes_for, tokens_ahead
from specattn_jax.decoding.protocol import DecodeSettings, Models
from specattn_jax.decoding.sampling import Sampling, Verdict, token_distribution, verify
from specattn_jax.decoding.speculative import SparselyDrafted
from specattn_jax.errors import UserError
from specattn_jax.planning.acceptance import Replay, text_acceptance
from specattn_jax.planning.gate import Choice, Decision
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import Request, find_candidates
from specattn_jax.runtime.session import Session, begin_alike
from specattn_jax.selection.own import OwnReads, SparseDraft
from specattn_jax.texts import find_text, read_text

RAGGED = [[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 4], [5], [2, 2, 7, 1, 1, 3, 6], [3, 1]]
LIMIT = 40
# Of such short caches next to nothing, so that drafts go wrong.
FEW = OwnReads(0.1, num_sink=0, num_recent=1, least=1)
KINDS: dict[str, Callable[..., Any]] = {
    "self": lambda **settings: SelfSpeculative(window=4, reads=FEW, every=3, **settings),
    "sparse draft": lambda **settings: SparselyDrafted(SparseDraft(FEW), window=4, **settings),
    "lookup": lambda **settings: PromptLookup(window=4, **settings),
    "hierarchical": lambda **settings: Hierarchical(window=7, inner=2, reads=FEW, **settings),
    "hierarchical lookup": lambda **settings: HierarchicalLookup(window=7, inner=2, reads=FEW, **settings),
}


@pytest.fixture(scope="module")
def models():
    return tiny_model(0, num_layers=3), tiny_model(1, num_kv_heads=1)


@pytest.fixture(scope="module")
def alone(models):
    return outputs(run(Autoregressive(), models[0], None, RAGGED, LIMIT))


@pytest.mark.parametrize("kind", KINDS)
class TestEach:
    def test_writes_what_the_target_writes(self, kind, models, alone):
        state = run(KINDS[kind](), models[0], models[1], RAGGED, LIMIT)
        assert outputs(state) == alone
        counts = state.statistics
        assert counts.accepted.sum() > 0
        assert (counts.accepted <= counts.drafted).all()
        # Every window gives what was accepted and one token more, but for the last, which may be cut.
        given = 1 + counts.windows + counts.accepted
        assert ((given >= LIMIT) & (given <= LIMIT + KINDS[kind]().window)).all()
        if KINDS[kind]().needs_text:
            # What was proposed and refused is not part of the text.
            for row, prompt, new in zip(getattr(state.own, "text", state.own), RAGGED, alone, strict=True):
                assert row[: len(prompt) + LIMIT].tolist() == prompt + new

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [2])
    def test_limits_inside_a_window(self, kind, models, alone, limit):
        assert outputs(run(KINDS[kind](), models[0], models[1], RAGGED, limit)) == [row[:limit] for row in alone]

    @pytest.mark.slow
    def test_stop_tokens_inside_a_window(self, kind, models, alone):
        stop = alone[0][LIMIT // 2]
        state = run(KINDS[kind](settings=DecodeSettings(stop_tokens=(stop,))), models[0], models[1], RAGGED, LIMIT)
        assert outputs(state) == [row[: row.index(stop) + 1] if stop in row else row for row in alone]

    @pytest.mark.slow
    def test_to_the_last_slots_of_the_cache(self, kind, models):
        # Slots come in multiples of 128: prompt, tokens and the last window fill them.
        strategy = KINDS[kind]()
        prompt = [1, 2, 3, 4, 5, 6, 7, 1] * 8
        limit = 128 - len(prompt) - strategy.window - 1
        expected = outputs(run(Autoregressive(), models[0], None, [prompt], limit))
        assert outputs(run(strategy, models[0], models[1], [prompt], limit)) == expected

    @pytest.mark.slow
    def test_draws_do_not_depend_on_the_batch(self, kind, models):
        strategy = KINDS[kind](settings=DecodeSettings(Sampling(1.0)))
        keys = jax.random.split(jax.random.key(3), len(RAGGED))
        together = outputs(run(strategy, models[0], models[1], RAGGED, 12, keys))
        alone = [
            outputs(run(strategy, models[0], models[1], [p], 12, keys[i : i + 1]))[0] for i, p in enumerate(RAGGED)
        ]
        assert together == alone

    @pytest.mark.slow
    def test_draws_from_the_targets_distribution(self, kind, models):
        """Chi-square over 20,000 texts of two drafted tokens, beside as many that the target drew alone."""
        count, limit = 20_000, 3
        settings = DecodeSettings(Sampling(1.5))
        tables = []
        for seed, strategy in enumerate((KINDS[kind](settings=settings), Autoregressive(settings))):
            keys = jax.random.split(jax.random.key(seed), count)
            texts: np.ndarray = np.array(
                outputs(run(strategy, models[0], models[1], [[1, 2, 3, 1, 2]] * count, limit, keys))
            )
            tables.append(np.bincount(texts @ [64, 8, 1], minlength=512).astype(float))
        often = sum(tables) >= 10
        rows = [np.append(table[often], table[~often].sum()) for table in tables]
        total = sum(rows)
        chi2 = float(np.sum((rows[0] - rows[1]) ** 2 / np.maximum(total, 1)))
        freedom = len(total) - 1
        assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom)


def test_what_is_read_is_chosen_every_so_many_windows(models):
    session, strategy = Session(Models(models[0])), SelfSpeculative(window=4, reads=FEW, every=2)
    state = start(strategy, session, RAGGED, LIMIT)
    plans = [jax.device_get(state.own)]
    for _ in range(4):
        state = session.decode(strategy, state, 1)
        plans.append(jax.device_get(state.own))
    kept = [np.array_equal(one.counts, two.counts) for one, two in itertools.pairwise(plans)]
    assert kept == [True, False, True, False]
    with pytest.raises(UserError, match="every is 0; expected at least 1 window"):
        SelfSpeculative(every=0)


TEXTS = ["Call me Ishmael. Call me", "a", "Once upon a time there was a cache", "to be, or not to be"]
BY_NAME: dict[str, dict[str, Any]] = {
    "lookup": {"mode": "lookup"},
    "self": {"mode": "self", "window": 3},
    "sparse draft": {"mode": "speculative", "draft_reads": 0.3},
    "hierarchical": {"mode": "hierarchical", "window": 6},
    "hierarchical lookup": {"mode": "hierarchical", "window": 6},
}
# The strategies themselves are tested above; of their names, which compile them anew, one that chooses among two.
QUICK = {"hierarchical lookup"}
# Asked of a pair without a draft.
BY_ONE_MODEL = {"lookup", "self", "hierarchical lookup"}


@pytest.fixture(scope="module")
def written(tiny_pair):
    found = generate(tiny_pair, TEXTS, mode="autoregressive", max_new_tokens=20, stop_at_eos=False)
    return [result.tokens for result in found.results]


class TestByName:
    @pytest.mark.parametrize("count", [len(TEXTS), pytest.param(1, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in BY_NAME]
    )
    def test_writes_what_the_target_writes(self, kind, count, tiny_pair, written):
        how = BY_NAME[kind]
        pair = dataclasses.replace(tiny_pair, draft=None) if kind in BY_ONE_MODEL else tiny_pair
        run = generate(pair, TEXTS[:count], max_new_tokens=20, stop_at_eos=False, **how)
        assert [result.tokens for result in run.results] == written[:count]
        result = run.results[0]
        assert (result.mode, result.lossless, result.kv_reduction) == (how["mode"], True, 0.0)
        if how["mode"] == "hierarchical":
            assert 0 <= result.inner_accepted_per_window <= 3
        else:
            assert result.inner_accepted_per_window is None

    def test_strategies_are_what_was_asked_for(self, tiny_pair):
        def only(pair=tiny_pair, **how):
            (strategy,) = find_candidates(pair, Request(**how)).strategies
            return strategy

        assert only(mode="speculative", draft_reads=0.2).selection.reads.share == 0.2
        assert only(mode="speculative", draft_reads=1.0) == only(mode="speculative")
        assert (only(mode="hierarchical").window, only(mode="self").window, only(mode="lookup", window=8).window) == (
            *(15, 5, 8),
        )
        by_text = only(dataclasses.replace(tiny_pair, draft=None), mode="hierarchical")
        assert (only(mode="hierarchical").needs_draft, by_text.needs_draft) == (True, False)
        assert (by_text.name, by_text.window) == ("hierarchical", 15)

    @pytest.mark.parametrize("mode", ["speculative", "specattn"])
    def test_modes_that_need_a_draft_say_so(self, mode, tiny_pair):
        with pytest.raises(UserError, match=f"draft is 'none', but mode {mode} needs one; name a draft, or use mode"):
            generate(dataclasses.replace(tiny_pair, draft=None), ["a"], mode=mode)

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ({"mode": "self", "window": 65}, "window is 65; expected 1 to 64 drafted tokens, which one pass verifies"),
            ({"mode": "hierarchical", "window": 3}, "window is 3, but mode hierarchical drafts 3 tokens at a time"),
            ({"draft_reads": 0.0}, "draft_reads is 0; expected a share above 0, of at most 1"),
            ({"draft_reads": float("nan")}, "draft_reads is nan; expected"),
            ({"draft_reads": 0.1, "mode": "self"}, "draft_reads is 0.1, which is for modes speculative and auto, but"),
        ],
    )
    def test_mistakes(self, how, said, tiny_pair):
        for pair in (tiny_pair, dataclasses.replace(tiny_pair, draft=None)):
            with pytest.raises(UserError, match=said):
                find_candidates(pair, Request(**how))

    def test_what_needs_a_draft_besides_modes(self, tiny_pair):
        with pytest.raises(UserError, match="draft is 'none', but this needs one beside"):
            dataclasses.replace(tiny_pair, draft=None).calibrate(["a text"])


def test_the_command_without_a_draft(tiny_folders):
    arguments = ["--target", tiny_folders.target, "--draft", "none", "--prompt", "Call me", "--max-new-tokens", 4]
    report = json.loads(run_command("generate", *arguments, "--json", "--mode", "hierarchical").stdout)
    assert (report["mode"], report["window"], report["draft"]) == ("hierarchical", 15, None)
    assert "window is 2, but mode hierarchical drafts 3 tokens at a time" in mistake(
        "generate", *arguments, "--mode", "hierarchical", "--window", 2
    )
    assert "mode speculative needs one" in mistake("generate", *arguments, "--mode", "speculative")
    for wrong in ("0", "1.5", "half"):
        assert f"--draft-reads is {wrong!r}"[:-1].replace("'", "") in mistake(
            "generate", *arguments, "--draft-reads", wrong
        ).replace("'", "")
    with_alignment = [*arguments, "--alignment", tiny_folders.alignment]
    assert "leave one of them out" in mistake("generate", *with_alignment)


# Of hundreds of entries a tenth, and none for the shortness of the text.
TENTH = OwnReads(0.1, least=16)
ON_REAL_TEXT: dict[str, Callable[..., Any]] = {
    "lookup": lambda settings: PromptLookup(settings),
    "self": lambda settings: SelfSpeculative(settings, reads=TENTH),
    "sparse draft": lambda settings: SparselyDrafted(SparseDraft(TENTH), settings),
    "hierarchical": lambda settings: Hierarchical(settings, reads=TENTH),
    "hierarchical lookup": lambda settings: HierarchicalLookup(settings, reads=TENTH),
}


@pytest.fixture(scope="module")
def chapters(smollm2):
    """Passages of a novel, and what the target writes behind them alone."""
    text = smollm2.encode(read_text(find_text("pride_and_prejudice"))[:20_000])
    prompts = [list(text[start : start + length]) for start, length in ((0, 300), (300, 9), (309, 128), (437, 40))]
    found = generate(smollm2, prompts, mode="autoregressive", max_new_tokens=128, stop_at_eos=False)
    return prompts, [result.tokens for result in found.results]


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("kind", ON_REAL_TEXT)
def test_real_models_write_what_the_target_writes(kind, smollm2, chapters):
    prompts, expected = chapters
    strategy = ON_REAL_TEXT[kind](DecodeSettings())
    for count in (1, len(prompts)):
        found = generate(smollm2, prompts[:count], mode=strategy, max_new_tokens=128)
        assert [result.tokens for result in found.results] == expected[:count]
    assert sum(result.accepted_per_window for result in found.results) > 0


def test_no_more_is_accepted_than_was_proposed():
    """Greedy, all are right; drawn, the draft is the target, so that every proposed token is accepted."""
    logits = 3 * jax.random.normal(jax.random.key(0), (3, 5, 8))
    count = jnp.array([0, 2, 4], jnp.int32)
    keys = jax.random.split(jax.random.key(1), 3)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    for sampling in (Sampling(), Sampling(1.0)):
        probs = None if sampling.greedy else token_distribution(logits[:, :-1], sampling)
        verdict = verify(keys, best[:, :-1], probs, logits, sampling, count)
        assert verdict.accepted.tolist() == count.tolist()
    # The token behind what was proposed is the target's own, whatever the draft said of that place.
    many = jax.random.split(jax.random.key(2), 20_000)
    drafted, q, p = (jnp.broadcast_to(one, (len(many), *one.shape)) for one in (best[0, :-1], probs[0], logits[0]))
    tokens = verify(many, drafted, q, p, sampling, jnp.zeros(len(many), jnp.int32)).tokens[:, 0]
    shares = np.bincount(tokens, minlength=8) / len(many)
    assert np.abs(shares - token_distribution(logits[0, 0], sampling)).max() < 0.02


def test_a_level_runs_ahead_as_far_as_it_is_trusted():
    rates = (0.1, 0.5, 0.7, 0.9, 0.97)
    ahead = [tokens_ahead(rate, 12) for rate in rates]
    assert ahead == sorted(ahead)
    assert (ahead[0], ahead[-1]) == (1, 12)
    for rate, wanted in zip(rates, ahead, strict=True):
        assert wanted in (1, 12) or rate**wanted >= LEAST_CHANCE > rate ** (wanted + 1)
    tally = Tally.start(2)
    begun = tally.tokens_ahead(12)
    verdict = Verdict(jnp.zeros((2, 13), jnp.int32), jnp.array([0, 6], jnp.int32))
    for _ in range(20):
        tally = tally.add(verdict, jnp.array([6, 6], jnp.int32), jnp.array([True, True]))
    assert tally.tokens_ahead(12).tolist() == [1, 12]
    assert begun.tolist() == [tokens_ahead(0.9, 12)] * 2
    idle = tally.add(verdict, jnp.array([6, 6], jnp.int32), jnp.array([False, False]))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, idle, tally))


def test_all_sequences_wait_for_the_slowest():
    assert passes_for(7, 0.0, 3, 8) == 7
    assert [passes_for(wanted, 1.0, 3, 8) for wanted in (1, 4, 5, 12)] == [1, 1, 2, 3]
    rng, wanted, proposed, batch = np.random.default_rng(0), 9, 3, 4
    for rate in (0.2, 0.7):
        refused = rng.random((20_000, batch, wanted, proposed)) >= rate
        kept = np.where(refused.any(axis=-1), refused.argmax(axis=-1), proposed)
        passes = 1 + np.sum(np.cumsum(kept + 1, axis=-1) < wanted, axis=-1)
        assert passes_for(wanted, rate, proposed, batch) == pytest.approx(passes.max(axis=-1).mean(), abs=0.05)
        assert passes_for(wanted, rate, proposed, 1) == pytest.approx(passes.mean(), abs=0.05)


def followed(text: list[int], longest: int, window: int) -> list[int]:
    """What stands behind the last place before which most of the newest tokens stand, as a person would look it up."""
    best, begun = 0, len(text) - 1
    for place in range(1, len(text)):
        same = next((i for i in range(min(longest, place)) if text[place - 1 - i] != text[-1 - i]), min(longest, place))
        if same >= max(best, 1):
            best, begun = same, place
    known = list(text)
    while len(known) < begun + window:
        known.append(known[len(known) - len(text) + begun])
    return known[begun : begun + window]


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=3, max_size=3), st.integers(1, 3)
)
def test_looks_up_what_followed_the_newest_tokens(texts, longest):
    lengths = jnp.array([len(text) for text in texts], jnp.int32)
    # What lies beyond a text is meaningless.
    padded = jnp.array([text + [1] * (16 - len(text)) for text in texts], jnp.int32)
    found = jax.jit(look_up, static_argnames=("longest", "window"))(padded, lengths, longest=longest, window=5)
    assert found.tolist() == [followed(text, longest, 5) for text in texts]


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.lists(st.integers(0, 2), min_size=2, max_size=20))
def test_a_replay_counts_what_looking_up_would_have_found(text):
    replay = Replay()
    replay.push(text[:1])
    begun = replay.found
    for token in text[1:]:
        replay.push([token])
    known = [text[:place] for place in range(1, len(text))]
    # A token that was never written before is proposed by no replay.
    right = [
        followed(before, 3, 1) == [token] and before[-1] in before[:-1]
        for before, token in zip(known, text[1:], strict=True)
    ]
    assert replay.found - begun == sum(right)
    assert replay.tokens == len(text)
    assert 0.0 <= text_acceptance([replay]).rate < 1.0


def test_what_repeats_itself_is_expected_in_rows():
    """A text of long quotations and new tokens: windows of every length accept what looking up would give."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 2000, 400).tolist()
    while len(text) < 3000:
        begin = int(rng.integers(0, len(text) - 20))
        text += [*rng.integers(0, 2000, 6).tolist(), *text[begin : begin + int(rng.integers(5, 20))]]
    replay = Replay()
    replay.push(text)
    expected = text_acceptance([replay])
    proposed = [(text[place : place + 8], followed(text[:place], 3, 8)) for place in range(600, 2990, 11)]
    right = [begin_alike(after, ahead) for after, ahead in proposed]
    for window in (1, 3, 5, 8):
        found = np.minimum(right, window).mean()
        assert expected.expected(window) == pytest.approx(found, rel=0.15)
    # As if tokens of a window were alike, not half of that would be expected.
    assert expected._replace(further=1.0).expected(8) < found / 2


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [True, False])
def test_a_run_that_changes_its_mind_writes_the_same(tiny_pair, drafts):
    pair = tiny_pair if drafts else dataclasses.replace(tiny_pair, draft=None)
    choices = iter([("hierarchical", 4), ("lookup", 4), ("self", 4), ("autoregressive", 0)])
    situations = []

    def decide(known):
        situations.append(known)
        choice = Choice(*next(choices))
        return Decision(choice, is_final=choice.mode == "autoregressive")

    how = {"max_new_tokens": 80, "stop_at_eos": False}
    found = generate(pair, [TEXTS[1]], lossless=True, window=4, decide=decide, **how)
    alone = generate(tiny_pair, [TEXTS[1]], mode="autoregressive", **how)
    assert found.results[0].tokens == alone.results[0].tokens
    # Without the draft's cache there is no way back.
    assert [known.can_draft for known in situations] == [True, drafts, False, False]
    assert situations[1].own_acceptance != situations[0].own_acceptance
    # How often the text would have been right is counted whoever drafts; the draft was asked at most below the target.
    assert situations[1].text_acceptance != situations[0].text_acceptance
    assert situations[1].acceptance == situations[0].acceptance


@pytest.mark.parametrize("kind", [Hierarchical, HierarchicalLookup])
def test_inner_windows_that_leave_nothing_to_verify_are_refused(kind):
    with pytest.raises(UserError, match="window is 5, but mode hierarchical drafts 5 tokens at a time"):
        kind(window=5, inner=5)


@pytest.mark.slow
def test_a_text_that_goes_in_circles_spares_passes_over_few_entries(models):
    """Caches so short are read whole, so that the middle level writes what the target writes."""
    session, strategy, prompt = Session(Models(models[0])), HierarchicalLookup(window=7, inner=2), [5]
    state = session.decode(strategy, start(strategy, session, [prompt], 120), 16)
    begun = int(state.emitted[0])
    draft, carried = strategy.lowest(session.models, state)
    middle = propose(
        session.models,
        state,
        state.keys,
        jnp.array([5], jnp.int32),
        draft,
        carried,
        plan=state.own.plan,
        sampling=Sampling(),
        inner=2,
        most=5,
    )
    (written,) = outputs(session.decode(strategy, state, 120))
    assert middle.tokens[0, :5].tolist() == written[begun : begun + 5]
    place, rounds, found = begun, 0, 0
    while place < begun + 5:
        guessed = followed(prompt + written[:place], 3, 2)
        right = next((i for i in range(2) if guessed[i] != written[place + i]), 2)
        place, rounds, found = place + right + 1, rounds + 1, found + right
    assert middle.round == rounds < 5
    assert (middle.windows.tolist(), middle.accepted.tolist()) == ([rounds], [found])
