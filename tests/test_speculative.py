"""The decoding loop: losslessness, ragged batches, stopping, rollback, statistics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from specattn_jax.selection.TODO import Selector
from tiny import causal_attention, outputs, random_alignment, run, start, tiny_model

from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import DecodeSettings, decode
from specattn_jax.errors import UserError
from specattn_jax.models.forward import read_sequence
from specattn_jax.selection.alignment import NucleusMass
from specattn_jax.selection.policy import load_policy

RAGGED = [[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 4], [5], [2, 2, 7, 1, 1, 3, 6], [3, 1]]
LIMIT = 40


@pytest.fixture(scope="module")
def models():
    return tiny_model(0, num_layers=3), tiny_model(1, num_kv_heads=1)


def selector_for(target, draft, policy: str, p: float, **changes) -> Selector:
    return Selector(
        alignment=random_alignment(target.config, draft.config),
        mass=NucleusMass.uniform(p, target.config.num_layers),
        policy=dataclasses.replace(load_policy(policy), **changes),
        target=target.config,
        draft=draft.config,
    )


def greedy_by_hand(model, prompt: list[int], limit: int) -> list[int]:
    """Greedy continuation that re-reads the whole sequence densely for every token."""

    @jax.jit
    def logits(tokens):
        return model.logits(read_sequence(model, tokens, causal_attention))[0]

    tokens = list(prompt)
    size = len(prompt) + limit
    for _ in range(limit):
        padded = jnp.array([tokens + [0] * (size - len(tokens))], jnp.int32)
        tokens.append(int(jnp.argmax(logits(padded)[len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_autoregressive_is_greedy_decoding_by_hand(models):
    target, _ = models
    state = run(target, None, None, RAGGED, DecodeSettings("autoregressive"), LIMIT)
    assert outputs(state) == [greedy_by_hand(target, prompt, LIMIT) for prompt in RAGGED]


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("drafting", ["other", "self"])
def test_speculative_is_lossless(models, window, drafting):
    target, draft = models
    draft = target if drafting == "self" else draft
    expected = outputs(run(target, None, None, RAGGED, DecodeSettings("autoregressive"), LIMIT))
    state = run(target, draft, None, RAGGED, DecodeSettings("speculative", window), LIMIT)
    assert outputs(state) == expected
    counts = state.statistics
    assert (counts.drafted == counts.windows * window).all()
    np.testing.assert_allclose(counts.read, np.broadcast_to(np.asarray(counts.windows)[:, None], counts.read.shape))
    if drafting == "self":
        assert (counts.accepted == counts.drafted).all()


@pytest.mark.parametrize("policy", ["paper", "default"])
def test_reading_everything_is_lossless(models, policy):
    target, draft = models
    expected = outputs(run(target, None, None, RAGGED, DecodeSettings("autoregressive"), LIMIT))
    selector = selector_for(target, draft, policy, 1.0, dense_layers=0)
    state = run(target, draft, selector, RAGGED, DecodeSettings("specattn"), LIMIT)
    assert outputs(state) == expected
    counts = state.statistics
    np.testing.assert_allclose(counts.read, np.broadcast_to(np.asarray(counts.windows)[:, None], counts.read.shape))


@pytest.mark.parametrize(
    ("policy", "block_size"),
    [
        ("default", 1),
        ("paper", 4),
        pytest.param("default", 4, marks=pytest.mark.slow),
        pytest.param("paper", 1, marks=pytest.mark.slow),
    ],
)
def test_sparse_decoding_reads_less_and_does_not_depend_on_the_batch(models, policy, block_size):
    target, draft = models
    forced = {"num_sink": 1, "num_recent": 2, "block_size": block_size, "dense_layers": 1}
    selector = selector_for(target, draft, policy, 0.6, **forced)
    settings = DecodeSettings("specattn", 3)
    state = run(target, draft, selector, RAGGED, settings, LIMIT)
    alone = [run(target, draft, selector, [prompt], settings, LIMIT) for prompt in RAGGED]
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
    free = outputs(run(target, draft, None, RAGGED, DecodeSettings("speculative"), LIMIT))
    stop = free[0][LIMIT // 2]
    state = run(target, draft, None, RAGGED, DecodeSettings("speculative", stop_tokens=(stop,)), LIMIT)
    for got, whole in zip(outputs(state), free, strict=True):
        assert got == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert state.done.all()


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_limit_is_met_exactly(models, limit):
    target, draft = models
    state = run(target, draft, None, RAGGED, DecodeSettings("speculative"), limit)
    expected = outputs(run(target, None, None, RAGGED, DecodeSettings("autoregressive"), limit))
    assert outputs(state) == expected
    assert (state.emitted == limit).all()


def test_streaming_in_small_calls_changes_nothing(models):
    target, draft = models
    settings = DecodeSettings("speculative", 4)
    whole = run(target, draft, None, RAGGED, settings, LIMIT)
    state = start(target, draft, RAGGED, settings, LIMIT)
    calls = 0
    while not state.done.all():
        state = decode(target, draft, None, state, jnp.int32(2), settings=settings)
        calls += 1
    assert calls > 1
    assert outputs(state) == outputs(whole)
    jax.tree.map(np.testing.assert_array_equal, state.statistics, whole.statistics)


def test_sampling_does_not_depend_on_the_batch(models):
    target, draft = models
    settings = DecodeSettings("speculative", 3, Sampling(temperature=1.0))
    keys = jax.random.split(jax.random.key(3), len(RAGGED))
    together = outputs(run(target, draft, None, RAGGED, settings, LIMIT, keys))
    alone = [outputs(run(target, draft, None, [p], settings, LIMIT, keys[i : i + 1]))[0] for i, p in enumerate(RAGGED)]
    assert together == alone


def test_padded_draft_vocabulary_is_tolerated(models):
    target, _ = models
    expected = outputs(run(target, None, None, RAGGED, DecodeSettings("autoregressive"), LIMIT))
    for size in (6, 11):
        draft = tiny_model(5, vocab_size=size)
        prompts = [[token % 6 for token in prompt] for prompt in RAGGED]
        expected = outputs(run(target, None, None, prompts, DecodeSettings("autoregressive"), LIMIT))
        assert outputs(run(target, draft, None, prompts, DecodeSettings("speculative"), LIMIT)) == expected


@pytest.mark.parametrize(("change", "message"), [({"mode": "fast"}, "mode is 'fast'"), ({"window": 0}, "window is 0")])
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        DecodeSettings(**change)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_sparse_draft_that_has_room_for_all_drafts_as_a_dense_one(models, window):
    """With a share just under 1 every entry is read, but through plans."""
    target, draft = models
    settings = DecodeSettings("specattn", window)
    states = [
        run(
            target,
            draft,
            selector_for(target, draft, "default", 0.8, draft_reads=reads),
            RAGGED,
            settings,
            LIMIT,
        )
        for reads in (1.0, 0.9999)
    ]
    assert outputs(states[0]) == outputs(states[1])
    np.testing.assert_allclose(states[0].statistics.read, states[1].statistics.read, rtol=1e-5)
    assert (states[0].statistics.accepted == states[1].statistics.accepted).all()


def test_a_sparse_draft_loses_nothing_where_the_target_reads_everything(models):
    target, draft = models
    selector = selector_for(target, draft, "default", 1.0, draft_reads=0.2, num_recent=2)
    state = run(target, draft, selector, RAGGED, DecodeSettings("specattn", 5), LIMIT)
    alone = run(target, None, None, RAGGED, DecodeSettings("autoregressive"), LIMIT)
    assert outputs(state) == outputs(alone)
