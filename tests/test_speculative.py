"""The decoding loop: losslessness, ragged batches, stopping, rollback, statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import causal_attention, outputs, run, selection_for, start, tiny_model

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import DecodeSettings, Models
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.errors import UserError
from specattn_jax.models.forward import read_sequence
from specattn_jax.runtime.session import Session

RAGGED = [[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 4], [5], [2, 2, 7, 1, 1, 3, 6], [3, 1]]
LIMIT = 40


@pytest.fixture(scope="module")
def models():
    return tiny_model(0, num_layers=3), tiny_model(1, num_layers=1, num_kv_heads=1)


@jax.jit
def logits_of_one_pass(model, tokens):
    return model.logits(read_sequence(model, tokens, causal_attention))[0]


def greedy_by_hand(model, prompt: list[int], limit: int) -> list[int]:
    """Greedy continuation that re-reads the whole sequence densely for every token."""
    tokens = list(prompt)
    # Of one length, so that it is one program for all prompts.
    size = 64
    for _ in range(limit):
        padded = jnp.array([tokens + [0] * (size - len(tokens))], jnp.int32)
        tokens.append(int(jnp.argmax(logits_of_one_pass(model, padded)[len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_autoregressive_is_greedy_decoding_by_hand(models):
    target, _ = models
    state = run(Autoregressive(), target, None, RAGGED, LIMIT)
    assert outputs(state) == [greedy_by_hand(target, prompt, LIMIT) for prompt in RAGGED]


# Each window compiles a program of its own for each draft.
@pytest.mark.parametrize(
    ("drafting", "window"),
    [
        ("other", 1),
        ("other", 5),
        ("self", 5),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("other", 2), ("self", 1), ("self", 2))),
    ],
)
def test_speculative_is_lossless(models, drafting, window):
    target, draft = models
    draft = target if drafting == "self" else draft
    expected = outputs(run(Autoregressive(), target, None, RAGGED, LIMIT))
    state = run(Speculative(window=window), target, draft, RAGGED, LIMIT)
    assert outputs(state) == expected
    counts = state.statistics
    assert (counts.drafted == counts.windows * window).all()
    np.testing.assert_allclose(counts.read, np.broadcast_to(np.asarray(counts.windows)[:, None], counts.read.shape))
    if drafting == "self":
        assert (counts.accepted == counts.drafted).all()


@pytest.mark.parametrize("policy", [pytest.param("paper", marks=pytest.mark.slow), "default"])
def test_reading_everything_is_lossless(models, policy):
    target, draft = models
    expected = outputs(run(Autoregressive(), target, None, RAGGED, LIMIT))
    selection = selection_for(target, draft, policy, 1.0, dense_layers=0)
    state = run(SpecAttn(selection), target, draft, RAGGED, LIMIT)
    assert outputs(state) == expected
    counts = state.statistics
    np.testing.assert_allclose(counts.read, np.broadcast_to(np.asarray(counts.windows)[:, None], counts.read.shape))


@pytest.mark.parametrize(
    ("policy", "block_size"),
    [
        ("default", 4),
        pytest.param("default", 1, marks=pytest.mark.slow),
        pytest.param("paper", 4, marks=pytest.mark.slow),
        pytest.param("paper", 1, marks=pytest.mark.slow),
    ],
)
def test_sparse_decoding_reads_less_and_does_not_depend_on_the_batch(models, policy, block_size):
    target, draft = models
    forced = {"num_sink": 1, "num_recent": 2, "block_size": block_size, "dense_layers": 1}
    strategy = SpecAttn(selection_for(target, draft, policy, 0.6, **forced), window=3)
    state = run(strategy, target, draft, RAGGED, LIMIT)
    alone = [run(strategy, target, draft, [prompt], LIMIT) for prompt in RAGGED]
    assert outputs(state) == [outputs(one)[0] for one in alone]
    share = np.asarray(state.statistics.read) / np.asarray(state.statistics.windows)[:, None]
    np.testing.assert_allclose(
        share, [np.asarray(one.statistics.read[0] / one.statistics.windows[0]) for one in alone], rtol=1e-5
    )
    np.testing.assert_allclose(share[:, 0], 1.0)
    assert share[:, 1:].mean() < 1.0
    assert (share[:, 1:] > 0.0).all()


def test_stop_tokens_end_a_sequence_and_are_kept(models):
    target, draft = models
    free = outputs(run(Speculative(), target, draft, RAGGED, LIMIT))
    stop = free[0][LIMIT // 2]
    state = run(Speculative(settings=DecodeSettings(stop_tokens=(stop,))), target, draft, RAGGED, LIMIT)
    for got, whole in zip(outputs(state), free, strict=True):
        assert got == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert state.done.all()


@pytest.mark.parametrize("limit", [1, pytest.param(2, marks=pytest.mark.slow), 7])
def test_limit_is_met_exactly(models, limit):
    target, draft = models
    state = run(Speculative(), target, draft, RAGGED, limit)
    expected = outputs(run(Autoregressive(), target, None, RAGGED, limit))
    assert outputs(state) == expected
    assert (state.emitted == limit).all()


def test_streaming_in_small_calls_changes_nothing(models):
    target, draft = models
    strategy, session = Speculative(window=4), Session(Models(target, draft))
    whole = run(strategy, target, draft, RAGGED, LIMIT)
    state = start(strategy, session, RAGGED, LIMIT)
    calls = 0
    while not state.done.all():
        state = session.decode(strategy, state, 2)
        calls += 1
    assert calls > 1
    assert outputs(state) == outputs(whole)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(state.statistics), jax.tree.leaves(whole.statistics))


def test_sampling_does_not_depend_on_the_batch(models):
    target, draft = models
    strategy = Speculative(settings=DecodeSettings(Sampling(temperature=1.0)), window=3)
    keys = jax.random.split(jax.random.key(3), len(RAGGED))
    together = outputs(run(strategy, target, draft, RAGGED, LIMIT, keys))
    alone = [outputs(run(strategy, target, draft, [p], LIMIT, keys[i : i + 1]))[0] for i, p in enumerate(RAGGED)]
    assert together == alone


def test_padded_draft_vocabulary_is_tolerated(models):
    target, _ = models
    prompts = [[token % 6 for token in prompt] for prompt in RAGGED]
    expected = outputs(run(Autoregressive(), target, None, prompts, LIMIT))
    for size in (6, 11):
        draft = tiny_model(5, vocab_size=size, num_layers=1)
        assert outputs(run(Speculative(), target, draft, prompts, LIMIT)) == expected


@pytest.mark.parametrize("kind", [Speculative, SpecAttn])
@pytest.mark.parametrize("window", [0, 65])
def test_impossible_windows_are_refused(kind, window):
    with pytest.raises(UserError, match=f"window is {window}; expected 1 to 64"):
        kind(window=window)


def test_a_speculative_strategy_needs_a_draft(models):
    with pytest.raises(ValueError, match=r"models\.draft or state\.draft_cache is None"):
        run(Speculative(), models[0], None, RAGGED, 2)


@pytest.mark.parametrize("window", [*(pytest.param(other, marks=pytest.mark.slow) for other in (1, 2)), 5])
def test_a_sparse_draft_that_has_room_for_all_drafts_as_a_dense_one(models, window):
    """With a share just under 1 every entry is read, but through plans."""
    target, draft = models
    selections = [selection_for(target, draft, "default", 0.8, draft_reads=reads) for reads in (1.0, 0.9999)]
    states = [run(SpecAttn(one, window=window), target, draft, RAGGED, LIMIT) for one in selections]
    assert outputs(states[0]) == outputs(states[1])
    np.testing.assert_allclose(states[0].statistics.read, states[1].statistics.read, rtol=1e-5)
    assert (states[0].statistics.accepted == states[1].statistics.accepted).all()


def test_a_sparse_draft_loses_nothing_where_the_target_reads_everything(models):
    target, draft = models
    selection = selection_for(target, draft, "default", 1.0, draft_reads=0.2, num_recent=2)
    state = run(SpecAttn(selection), target, draft, RAGGED, LIMIT)
    alone = run(Autoregressive(), target, None, RAGGED, LIMIT)
    assert outputs(state) == outputs(alone)
