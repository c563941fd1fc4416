"""Tasks: the unmodified harness on a tiny pair, answers and likelihoods against independent ones, resuming."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny import random_alignment, tiny_model
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from specattn_jax import generate
from specattn_jax.evaluation.methods import FULL, SPECATTN, Case
from specattn_jax.evaluation.tasks.answering import SPECULATIVE, Asked, answer
from specattn_jax.evaluation.tasks.likelihood import Continuation, likelihoods
from specattn_jax.evaluation.tasks.run import RULER
from specattn_jax.loading.pair import ModelPair
from specattn_jax.loading.tokenizer import Tokenizer, make_tokenizer
from specattn_jax.models.forward import forward
from specattn_jax.texts import read_text, shipped_books

VOCABULARY = 1024
# What RULER's samples repeat. With more tokens its example of a chain of variables, of 500 tokens, is never made.
RULERS_PHRASES = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",
    "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR = VAR Question: Find all "
    "variables that are assigned the value in the text above. Answer: According to the chain(s) of variable assignment "
    "in the text above, 5 variables are assgined the value, they are: ",
    "One of the special magic uuids for is: One of the special magic numbers for is: ",
]
CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<assistant>"
SPARSE = [Case(SPECATTN, "default", p=0.7), Case("streaming", saving=0.5), Case("quest", saving=0.5)]


def words_tokenizer() -> Tokenizer:
    """A tokenizer that has words: RULER's shortest samples are too long for one of bytes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([read_text(shipped_books("valid")[0])[:100_000], *RULERS_PHRASES * 50], trainer)
    return make_tokenizer(backend, {"eos_token": "<|endoftext|>"}, (), CHAT)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    shape = {"vocab_size": VOCABULARY, "max_context": 1024}
    # The baselines read the first two layers whole.
    target, draft = tiny_model(0, num_layers=3, **shape), tiny_model(1, **shape)
    alignment = random_alignment(target.config, draft.config)
    return ModelPair("tiny target", "tiny draft", target, draft, words_tokenizer(), alignment)


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'specattn-jax[eval]'")
    from specattn_jax.evaluation.tasks import harness

    return harness


def prompts(pair: ModelPair, count: int, length: int = 60) -> list[tuple[int, ...]]:
    tokens = pair.encode(read_text(shipped_books("valid")[0])[20_000:30_000])
    return [tuple(tokens[at * 100 : at * 100 + length + 3 * at]) for at in range(count)]


def test_answers_are_those_of_one_prompt_at_a_time(pair):
    asked = [Asked(tokens, limit) for tokens, limit in zip(prompts(pair, 5), (8, 8, 8, 5, 5), strict=True)]
    together = answer(pair, Case(FULL), asked, batch=2)
    for one, result in zip(asked, together.results, strict=True):
        alone = generate(pair, [one.tokens], mode="autoregressive", max_new_tokens=one.limit).results[0]
        assert (result.tokens, result.text) == (alone.tokens, alone.text)
    assert len(together.seconds) == 3
    assert together.requests_per_minute > 0


def test_lossless_methods_give_the_same_answers(pair):
    asked = [Asked(tokens, 12) for tokens in prompts(pair, 3)]
    full, speculative = (answer(pair, Case(method), asked, batch=3) for method in (FULL, SPECULATIVE))
    assert [one.tokens for one in full.results] == [one.tokens for one in speculative.results]
    assert all(one.lossless for one in speculative.results)


def test_sparse_methods_answer_and_save_reads(pair):
    asked = [Asked(tokens, 12) for tokens in prompts(pair, 2)]
    for case in SPARSE:
        found = answer(pair, case, asked, batch=2)
        assert all(0 < one.kv_reduction < 1 and one.windows > 1 for one in found.results), case


def reference(pair: ModelPair, one: Continuation) -> tuple[float, bool]:
    """The whole text in one pass, in float64 from the logits on."""
    from specattn_jax.models.cache import KVCache

    tokens = np.asarray([one.tokens], np.int32)
    cache = KVCache.empty(pair.target.config, 1, 128, pair.target.dtype)
    logits = np.asarray(pair.target.logits(forward(pair.target, jax.numpy.asarray(tokens), cache).hidden), np.float64)
    log_probs = logits[0] - np.log(np.exp(logits[0] - logits[0].max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probs -= logits[0].max(-1, keepdims=True)
    places = np.arange(one.first, len(one.tokens))
    given = tokens[0, places]
    chosen = log_probs[places - 1]
    return float(chosen[np.arange(len(places)), given].sum()), bool((chosen.argmax(-1) == given).all())


def test_likelihoods_are_sums_of_log_probabilities(pair):
    asked = [Continuation(list(tokens), first) for tokens, first in zip(prompts(pair, 3), (1, 20, 58), strict=True)]
    for one, found in zip(asked, likelihoods(pair, Case(FULL), asked, batch=2), strict=True):
        wanted, greedy = reference(pair, one)
        assert found.log_prob == pytest.approx(wanted, abs=1e-3)
        assert found.greedy == greedy


def test_a_sparse_method_that_reads_everything_is_as_likely(pair):
    asked = [Continuation(list(tokens), first) for tokens, first in zip(prompts(pair, 3), (1, 2, 50), strict=True)]
    everything = Case(SPECATTN, "default", p=1.0)
    for one, found in zip(asked, likelihoods(pair, everything, asked, batch=3), strict=True):
        assert found.log_prob == pytest.approx(reference(pair, one)[0], abs=1e-3)
    less = likelihoods(pair, Case("streaming", saving=0.8), asked, batch=3)
    assert abs(less[2].log_prob - reference(pair, asked[2])[0]) > 1e-3


@pytest.fixture
def few_words(monkeypatch):
    """RULER multiplies all nouns with all adjectives when it is imported, which takes half a minute."""
    wonderwords = pytest.importorskip("wonderwords")
    make = wonderwords.RandomWord.__init__

    def trimmed(self, *arguments, **options):
        make(self, *arguments, **options)
        self._categories = {name: list(words)[:300] for name, words in self._categories.items()}

    monkeypatch.setattr(wonderwords.RandomWord, "__init__", trimmed)


# Samples of the harness number 500 whatever is asked for.
LENGTH = 900


@pytest.mark.filterwarnings("ignore")
def test_the_harness_runs_rulers_offline_tasks(harness, few_words, pair):
    from specattn_jax.evaluation.tasks.ruler import load_task, run_task

    for name in RULER:
        task = load_task(name, LENGTH, pair.tokenizer)
        model = harness.SpecAttnLM(pair, Case(SPECATTN, "default", p=0.7), batch_size=2)
        scored = run_task(model, name, task, LENGTH, 2)
        assert len(scored.scores) == 2
        assert all(0 <= score <= 1 for score in scored.scores)
        assert scored.texts == [one.text for one in model.answers.results]
        assert all(one.kv_reduction > 0 for one in model.answers.results)
