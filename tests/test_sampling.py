"""Sampling: token distributions, and that speculative output has exactly the target's distribution."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import causal_attention, outputs, run, selection_for, tiny_model

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import DecodeSettings
from specattn_jax.decoding.sampling import Sampling, choose, match_vocabulary, token_distribution, verify
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.errors import UserError
from specattn_jax.models.forward import read_sequence

DRAWS, FEW_DRAWS = 24_000, 3_000
PROMPT = [1, 3, 2]


def oracle_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Float64: temperature, top-k, top-p, min-p, one row."""
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        scaled[scaled < np.sort(scaled)[-sampling.top_k]] = -np.inf
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= sampling.top_p - 1e-7]] = 0.0
    probs[probs < sampling.min_p * probs.max() * (1 - 1e-6)] = 0.0
    return probs / probs.sum()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 16),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_token_distribution_matches_the_oracle(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 3, 16).astype(np.float32)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    got = np.asarray(token_distribution(jnp.asarray(logits), sampling))
    np.testing.assert_allclose(got, oracle_distribution(logits, sampling), atol=2e-6)


# Every positive number is a temperature, down to those that float32 does not have.
@settings(deadline=None)
@given(temperature=st.floats(min_value=0.0, exclude_min=True, allow_infinity=False), seed=st.integers(0, 99))
def test_every_temperature_has_a_distribution(temperature, seed):
    logits = np.random.default_rng(seed).normal(0, 30, 16).astype(np.float32)
    logits[3] = -np.inf
    sampling = Sampling(temperature)
    if sampling.greedy:
        assert (
            int(choose(jax.random.split(jax.random.key(0), 1), jnp.asarray(logits)[None], sampling)[0][0])
            == logits.argmax()
        )
        return
    got = np.asarray(token_distribution(jnp.asarray(logits), sampling), np.float64)
    assert np.isfinite(got).all()
    assert got[3] == 0
    np.testing.assert_allclose(got.sum(), 1.0, rtol=1e-5)
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    np.testing.assert_allclose(got, np.exp(scaled) / np.exp(scaled).sum(), atol=1e-5)


# To float32 these are nothing, and a number like any other; then its smallest, and more.
@pytest.mark.parametrize(
    "temperature",
    [1e-300, *(pytest.param(other, marks=pytest.mark.slow) for other in (1e-45, 1e-38, 1e-9, 1e-7, 1e-5))],
)
def test_the_limit_of_small_temperatures_is_greedy(temperature):
    target, draft = tiny_model(10, scale=6.0), tiny_model(11, scale=6.0)

    def tokens(sampling, make=Speculative):
        return outputs(run(make(settings=DecodeSettings(sampling)), target, draft, [PROMPT, [5]], 24))

    assert tokens(Sampling(temperature)) == tokens(Sampling()) == tokens(Sampling(temperature), Autoregressive)


def test_large_temperatures_are_uniform_over_what_is_kept():
    logits = jnp.array([5.0, 1.0, -jnp.inf, 3.0])
    for temperature in (1e12, 1e38, 1e300):
        np.testing.assert_allclose(
            token_distribution(logits, Sampling(temperature)), [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6
        )
        np.testing.assert_allclose(token_distribution(logits, Sampling(temperature, 2)), [0.5, 0, 0, 0.5], atol=1e-6)


PENALTY = 1.8


def penalised(logits: np.ndarray, before: list[int]) -> np.ndarray:
    """What transformers makes of logits after these tokens."""
    processor = transformers.RepetitionPenaltyLogitsProcessor(PENALTY)
    return processor(torch.tensor([before]), torch.tensor(np.array(logits)[None])).numpy()[0]


PENALISED_PROMPTS, PENALISED_TOKENS = [PROMPT, [5]], 20


# Of one length, so that it is one program: what follows a place does not change it.
READ = jax.jit(lambda model, tokens: model.logits(read_sequence(model, tokens, causal_attention)))


@pytest.mark.parametrize("window", [*(pytest.param(other, marks=pytest.mark.slow) for other in (0, 1)), 4])
def test_greedy_text_with_a_penalty_is_that_of_transformers_rule(window):
    target, draft = tiny_model(10, scale=6.0, vocab_size=40), tiny_model(11, scale=6.0, vocab_size=40)

    def tokens(sampling):
        how = DecodeSettings(sampling)
        strategy = Speculative(settings=how, window=window) if window else Autoregressive(how)
        return outputs(run(strategy, target, draft, PENALISED_PROMPTS, PENALISED_TOKENS))

    got = tokens(Sampling(repetition_penalty=PENALTY))
    for prompt, new in zip(PENALISED_PROMPTS, got, strict=True):
        text = list(prompt)
        for _ in range(PENALISED_TOKENS):
            padded = jnp.array([text + [0] * (32 - len(text))])
            text.append(int(penalised(READ(target, padded)[0, len(text) - 1], text).argmax()))
        assert new == text[len(prompt) :]
    assert got != tokens(Sampling())


def exact_sequences(model, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of three tokens, by reading all of them densely."""
    size = model.config.vocab_size
    everything = list(itertools.product(range(size), repeat=3))
    tokens = jnp.array([PROMPT + list(sequence) for sequence in everything], jnp.int32)
    logits = model.logits(read_sequence(model, tokens, causal_attention))[:, len(PROMPT) - 1 : -1]
    if sampling.minds_history:
        rows = [
            [penalised(row, PROMPT + list(sequence[:place])) for place, row in enumerate(rows)]
            for sequence, rows in zip(everything, np.asarray(logits), strict=True)
        ]
        logits = jnp.asarray(np.array(rows))
    probs = np.asarray(token_distribution(logits, sampling), np.float64)
    return {
        sequence: float(np.prod([row[place, token] for place, token in enumerate(sequence)]))
        for sequence, row in zip(everything, probs, strict=True)
    }


def assert_same_distribution(sequences: list[list[int]], exact: dict[tuple[int, ...], float]) -> None:
    """Chi-square with rare cells merged."""
    counts = dict.fromkeys(exact, 0)
    for sequence in sequences:
        counts[tuple(sequence)] += 1
    expected = np.array(list(exact.values())) * len(sequences)
    observed = np.array([counts[sequence] for sequence in exact])
    assert not observed[expected == 0].any()
    common = expected >= 8
    expected = np.append(expected[common], expected[~common].sum())
    observed = np.append(observed[common], observed[~common].sum())
    keep = expected > 0
    assert keep.sum() >= 20
    assert stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > 1e-3


# With many draws running takes longer than compiling.
MANY = (pytest.mark.optimised, pytest.mark.slow)


@pytest.mark.parametrize(
    ("make", "sampling", "draws"),
    [
        pytest.param(lambda how, _: Autoregressive(how), Sampling(1.0), DRAWS, marks=MANY),
        pytest.param(lambda how, _: Speculative(settings=how, window=1), Sampling(1.0), DRAWS, marks=MANY),
        pytest.param(lambda how, _: Speculative(settings=how, window=2), Sampling(1.0), DRAWS, marks=MANY),
        pytest.param(
            lambda how, _: Speculative(settings=how, window=3),
            Sampling(1.3, top_k=6, top_p=0.95),
            DRAWS,
            marks=MANY,
        ),
        (lambda how, selection: SpecAttn(selection, how, window=2), Sampling(0.8), FEW_DRAWS),
        pytest.param(lambda how, selection: SpecAttn(selection, how, window=2), Sampling(0.8), DRAWS, marks=MANY),
        pytest.param(lambda how, _: Speculative(settings=how, window=2), Sampling(1.2, min_p=0.05), DRAWS, marks=MANY),
        pytest.param(lambda how, _: Autoregressive(how), Sampling(1.0, repetition_penalty=PENALTY), DRAWS, marks=MANY),
        pytest.param(
            lambda how, _: Speculative(settings=how, window=2),
            Sampling(1.0, repetition_penalty=PENALTY),
            DRAWS,
            marks=MANY,
        ),
    ],
    ids=[
        "autoregressive",
        "window 1",
        "window 2",
        "window 3",
        "specattn, few draws",
        "specattn",
        "min_p",
        "autoregressive, penalty",
        "window 2, penalty",
    ],
)
def test_output_has_exactly_the_targets_distribution(make, sampling, draws):
    target, draft = tiny_model(10, scale=6.0), tiny_model(11, scale=6.0)
    strategy = make(DecodeSettings(sampling), selection_for(target, draft, "default", 1.0))
    keys = jax.random.split(jax.random.key(42), draws)
    state = run(strategy, target, draft, [PROMPT] * draws, 3, keys)
    if strategy.window:
        rate = float(state.statistics.accepted.sum() / state.statistics.drafted.sum())
        assert 0.05 < rate < 0.95, "the test must exercise acceptance and rejection"
    assert_same_distribution(outputs(state), exact_sequences(target, sampling))


def test_identical_distributions_are_always_accepted():
    logits = jax.random.normal(jax.random.key(0), (64, 4, 8))
    sampling = Sampling(1.0)
    probs = token_distribution(logits[:, :-1], sampling)
    keys = jax.random.split(jax.random.key(1), 64)
    drafted = jax.random.categorical(jax.random.key(2), jnp.log(probs)).astype(jnp.int32)
    verdict = verify(keys, drafted, probs, logits, sampling)
    assert (verdict.accepted == 3).all()
    np.testing.assert_array_equal(verdict.tokens[:, :3], drafted)


def test_vocabularies_are_matched_without_inventing_tokens():
    logits = jnp.zeros((2, 5))
    assert match_vocabulary(logits, 3).shape == (2, 3)
    padded = jax.nn.softmax(match_vocabulary(logits, 7))
    np.testing.assert_allclose(padded[:, 5:], 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "temperature is -1.0"),
        ((1.0, -2), "top_k is -2"),
        ((1.0, 0, 0.0), "top_p is 0.0"),
        ((1.0, 0, 1.5), "top_p"),
    ],
)
def test_bad_sampling_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Sampling(*arguments)
